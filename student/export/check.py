"""An exported file against the student that it was made from: the same frames through both, by ONNX Runtime."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from mmkd.cache_tools.frames.records import Float32Array, UInt8Array
from mmkd.data_manifests.errors import VerificationError
from mmkd.student.evaluation.trained import TrainedStudent
from mmkd.student.export.program import INPUT

TOLERANCE = 1e-3
"""Largest difference of a logit, as a share of the largest logit or of 1, with which an export is good."""
BATCH = 3
"""Views that are compared together: another number than that with which the file was traced."""

Runner = Callable[[UInt8Array], Mapping[str, Float32Array]]
"""From views, uint8 (B, T, S, S, 3), to head -> float32 (B, classes)."""


@dataclass(frozen=True)
class Agreement:
    """How far a file's logits are from the student's, over all heads."""

    largest: float
    """Largest absolute difference of a logit."""
    mean: float
    """Mean absolute difference."""
    top1: float
    """Share of views and heads whose best class is the same, 0 to 1."""
    views: int
    """How many views went through both."""
    scale: float
    """Largest absolute logit of the student's."""


def onnx_runner(file: bytes, student: TrainedStudent) -> Runner:
    """Return what runs an ONNX file on the CPU, with as many threads as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    heads = list(student.heads)
    return lambda frames: dict(zip(heads, session.run(heads, {INPUT: frames}), strict=True))


def check(run: Runner, student: TrainedStudent, views: Iterable[UInt8Array], *, what: str) -> Agreement:
    """Run views, each uint8 (T, S, S, 3), through both; VerificationError, naming `what`, where they differ."""
    found = agreement(run, student, views)
    allowed = TOLERANCE * max(1.0, found.scale)
    if not found.largest <= allowed:  # so written, NaN is refused
        raise VerificationError(
            f"{what}: its logits differ from the student's by up to {found.largest:.2g}, where {allowed:.2g} is "
            "allowed; nothing was written"
        )
    return found


def agreement(run: Runner, student: TrainedStudent, views: Iterable[UInt8Array]) -> Agreement:
    """Return how far a file is from the student on views, each uint8 (T, S, S, 3)."""
    largest = total = scale = 0.0
    numbers = same = pairs = count = 0
    for frames in batches(views):
        found, wanted = run(frames), student.logits(frames)
        count += len(frames)
        for head in student.heads:
            gap = np.abs(found[head].astype(np.float64) - wanted[head])
            largest = float(np.maximum(largest, gap.max()))  # of NaN and a number: NaN
            total, numbers = total + float(gap.sum()), numbers + gap.size
            scale = max(scale, float(np.abs(wanted[head]).max()))
            same += int((found[head].argmax(1) == wanted[head].argmax(1)).sum())
            pairs += len(frames)
    return Agreement(largest, total / numbers, same / pairs, count, scale)


def batches(views: Iterable[UInt8Array]) -> Iterator[UInt8Array]:
    """Yield views, each (T, S, S, 3), as (B, T, S, S, 3) with B of `BATCH`, the last one smaller."""
    waiting: list[UInt8Array] = []
    for view in views:
        waiting.append(view)
        if len(waiting) == BATCH:
            yield np.stack(waiting)
            waiting = []
    if waiting:
        yield np.stack(waiting)
