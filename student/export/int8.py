"""A student in 8 bits: ONNX Runtime's static quantisation, ranges from training clips, its price on other clips.

Weights have a scale for each output channel, activations one for each tensor (QDQ form, signed 8 bits; ranges are
the smallest and largest value seen). The file is a quarter as large. Whether it is quicker depends on network and
processor (2D convolutions are, 3D convolutions are slower by far), so it is measured.
"""

import json
import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmkd.cache_tools.frames.records import Float32Array, UInt8Array
from mmkd.data_manifests.errors import InputError, VerificationError
from mmkd.student.evaluation.metrics import average_views
from mmkd.student.export.check import Runner
from mmkd.student.export.onnx_file import METADATA
from mmkd.student.export.program import INPUT
from mmkd.student.export.real_frames import ClipViews


def int8_bytes(file: bytes, views: Iterable[UInt8Array], description: Mapping[str, Any]) -> bytes:
    """Return an ONNX file of ours in 8 bits; its ranges are those that `views`, uint8 (T, S, S, 3), give.

    Raises InputError where ONNX Runtime cannot quantise the network.
    """
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.calibrate import CalibrationDataReader
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Views(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
        """Views as ONNX Runtime asks for them: one after the other, then None."""

        def __init__(self) -> None:
            self._views = iter(views)

        def get_next(self) -> dict[str, UInt8Array] | None:
            view = next(self._views, None)
            return None if view is None else {INPUT: view[None]}

    with tempfile.TemporaryDirectory(prefix="mmkd-int8-") as name, quiet():
        plain, folded, small = (Path(name) / part for part in ("plain.onnx", "folded.onnx", "small.onnx"))
        plain.write_bytes(file)
        try:
            quant_pre_process(plain, folded, skip_symbolic_shape=True)
            quantize_static(
                folded,
                small,
                Views(),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QInt8,
                weight_type=QuantType.QInt8,
            )
        except (RuntimeError, ValueError, NotImplementedError, AttributeError, KeyError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"--int8: ONNX Runtime cannot quantise this network: {reason:.300}") from error
        model = onnx.load(small)
    del model.metadata_props[:]  # the quantiser's own marks
    onnx.helper.set_model_props(model, {METADATA: json.dumps({**description, "bits": 8})})
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the quantiser's warnings, hundreds of lines about its own insides, from the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@dataclass
class Count:
    """How often each form of a student was right on one head."""

    clips: int = 0
    """Clips with a label."""
    right: int = 0
    """Of them, where the student in 32 bits was."""
    right_int8: int = 0
    """Where it was in 8 bits."""
    same: int = 0
    """Where both name the same class, right or not."""


def price(full: Runner, small: Runner, clips: Iterable[ClipViews]) -> dict[str, dict[str, float | int]]:
    """Return head -> `clips` with a label, `top1` and `top1_int8` over them, and `same`, where both agree; 0 to 1.

    By the mean logits over each clip's views, as evaluation counts. A head without a labelled clip is left out.
    Raises VerificationError for logits in 8 bits that are no numbers.
    """
    counts: dict[str, Count] = {}
    for clip in clips:
        wanted, found = best(full(clip.pixels)), best(small(clip.pixels))
        for head, label in clip.labels.items():
            if label is None:
                continue
            count = counts.setdefault(head, Count())
            count.clips += 1
            count.right += wanted[head] == label
            count.right_int8 += found[head] == label
            count.same += wanted[head] == found[head]
    return {
        head: {
            "clips": count.clips,
            "top1": count.right / count.clips,
            "top1_int8": count.right_int8 / count.clips,
            "same": count.same / count.clips,
        }
        for head, count in counts.items()
    }


def best(logits: Mapping[str, Float32Array]) -> dict[str, int]:
    """Return head -> the best class by the mean of logits (V, classes); VerificationError for NaN or infinity."""
    if not all(np.isfinite(value).all() for value in logits.values()):
        raise VerificationError("the student in 8 bits gives NaN or infinity; nothing was written")
    return {head: int(average_views(value[None])[0].argmax()) for head, value in logits.items()}
