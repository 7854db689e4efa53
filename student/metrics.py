"""Metrics from logits: top-k accuracy, calibration error, cross-entropy; on arrays, without torch.

All take logits (N, C) and labels (N,) in which -1 means absent: such rows are left out. All are computed in
float64, and all are fractions or nats, never percent. Without any labelled row the value is NaN.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mmkd.cache_tools.records import Float32Array, Float64Array, IntArray

ECE_BINS = 15
"""Equal-width bins of the confidence, as the papers report it."""


@dataclass(frozen=True)
class Metrics:
    """The metrics of one head on one set of clips."""

    count: int
    """Number of labelled clips."""
    top1: float
    """Fraction whose label has the largest logit."""
    top5: float
    """Fraction whose label is among the five largest logits (of fewer than five classes: always 1)."""
    ece: float
    """Expected calibration error, 0..1, in 15 equal-width bins; smaller is better calibrated."""
    nll: float
    """Mean cross-entropy with the labels, in nats."""


def evaluate(logits: npt.NDArray[np.floating], labels: IntArray) -> Metrics:
    """Return all metrics of logits (N, C) against labels (N,)."""
    return Metrics(
        count=int((labels >= 0).sum()),
        top1=top_k_accuracy(logits, labels, k=1),
        top5=top_k_accuracy(logits, labels, k=5),
        ece=expected_calibration_error(logits, labels),
        nll=negative_log_likelihood(logits, labels),
    )


def average_views(logits: npt.NDArray[np.floating]) -> Float32Array:
    """Return the mean over views of logits (N, V, C) as float32 (N, C)."""
    if logits.ndim != 3 or logits.shape[1] == 0:
        raise ValueError(f"logits must be (N, V, C) with at least one view, got {logits.shape}")
    mean: Float32Array = logits.mean(1, dtype=np.float64).astype(np.float32)
    return mean


def top_k_accuracy(logits: npt.NDArray[np.floating], labels: IntArray, *, k: int) -> float:
    """Return the fraction of labels among the k largest logits; ties go to the lower class."""
    logits, labels = labelled(logits, labels)
    if not len(labels):
        return float("nan")
    own = np.take_along_axis(logits, labels[:, None], 1)
    earlier = np.arange(logits.shape[1]) < labels[:, None]
    rank = ((logits > own) | ((logits == own) & earlier)).sum(1)
    return float((rank < k).mean())


def expected_calibration_error(
    logits: npt.NDArray[np.floating], labels: IntArray, *, bins: int = ECE_BINS
) -> float:
    """Return sum over bins of (share of clips) * |accuracy - mean confidence|.

    Bin m of M holds confidences in ((m - 1) / M, m / M] (Guo et al. 2017); the confidence is the largest
    softmax probability.
    """
    logits, labels = labelled(logits, labels)
    if not len(labels):
        return float("nan")
    confidence = np.exp(log_softmax(logits).max(1))
    correct = logits.argmax(1) == labels
    index = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    gap = np.bincount(index, weights=correct - confidence, minlength=bins)
    return float(np.abs(gap).sum() / len(labels))


def negative_log_likelihood(logits: npt.NDArray[np.floating], labels: IntArray) -> float:
    """Return the mean cross-entropy with the labels, in nats."""
    logits, labels = labelled(logits, labels)
    if not len(labels):
        return float("nan")
    return float(-np.take_along_axis(log_softmax(logits), labels[:, None], 1).mean())


def log_softmax(logits: Float64Array) -> Float64Array:
    """Return log softmax over the last axis."""
    shifted = logits - logits.max(-1, keepdims=True)
    result: Float64Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def labelled(logits: npt.NDArray[np.floating], labels: IntArray) -> tuple[Float64Array, IntArray]:
    """Return the rows that have a label, in float64; ValueError for bad shapes, labels or logits."""
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"need logits (N, C) and labels (N,), got {logits.shape} and {labels.shape}")
    if len(labels) and not -1 <= labels.min() <= labels.max() < logits.shape[1]:
        raise ValueError(f"labels must be -1..{logits.shape[1] - 1}, got {labels.min()}..{labels.max()}")
    keep = labels >= 0
    kept = logits[keep].astype(np.float64)
    if not np.isfinite(kept).all():
        raise ValueError("logits hold NaN or infinity: leave those clips out, and count them")
    return kept, labels[keep]
