"""An exported file against the student that it was made from: the same frames through both, by ONNX Runtime."""

from dataclasses import dataclass

import numpy as np

from mmkd.cache_tools.frames.records import UInt8Array
from mmkd.data_manifests.errors import VerificationError
from mmkd.student.evaluation.trained import TrainedStudent
from mmkd.student.export.onnx_file import INPUT

TOLERANCE = 1e-3
"""Largest difference of a logit, as a share of the largest logit or of 1, with which an export is good."""
MADE_CLIPS = 3
"""An odd number other than the batch with which the file was traced."""


@dataclass(frozen=True)
class Agreement:
    """How far a file's logits are from the student's, over all heads."""

    largest: float
    """Largest absolute difference of a logit."""
    mean: float
    """Mean absolute difference."""
    top1: float
    """Share of clips and heads whose best class is the same, 0 to 1."""
    clips: int
    """How many clips went through both."""


def made_frames(student: TrainedStudent) -> UInt8Array:
    """Return uint8 (3, T, S, S, 3) of noise, the same every time: no real frames, and to be named so."""
    size = student.policy.size_px
    shape = (MADE_CLIPS, student.policy.frames, size, size, 3)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def check_onnx(file: bytes, student: TrainedStudent, frames: UInt8Array) -> Agreement:
    """Run `frames`, uint8 (B, T, S, S, 3), through both; VerificationError where they differ by too much."""
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    found = dict(zip(student.heads, session.run(list(student.heads), {INPUT: frames}), strict=True))
    wanted = student.logits(frames)
    gaps = np.concatenate([np.abs(found[head] - wanted[head]).ravel() for head in student.heads])
    scale = max(1.0, *(float(np.abs(wanted[head]).max()) for head in student.heads))
    same = [found[head].argmax(1) == wanted[head].argmax(1) for head in student.heads]
    if not gaps.max() <= TOLERANCE * scale:  # so written, NaN is refused
        raise VerificationError(
            f"the ONNX file's logits differ from the student's by up to {gaps.max():.2g}, where "
            f"{TOLERANCE * scale:.2g} is allowed; nothing was written"
        )
    return Agreement(float(gaps.max()), float(gaps.mean()), float(np.mean(same)), len(frames))
