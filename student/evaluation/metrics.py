"""Metrics from logits: top-k accuracy, calibration error, cross-entropy; on arrays, without torch.

All take logits (N, C) and labels (N,) in which -1 means absent: such rows are left out. All are computed in
float64, and all are fractions or nats, never percent. Without any labelled row the value is NaN.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import numpy.typing as npt

from mmkd.cache_tools.cache.softmax import log_softmax
from mmkd.cache_tools.frames.records import Float32Array, Float64Array, IntArray

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


@dataclass(frozen=True)
class ClipScores:
    """How single labelled clips fared: all that the metrics of any part of them need."""

    rank: IntArray
    """(n,) classes before the label's in the order of the logits; of equal ones the lower class comes first."""
    confidence: Float64Array
    """(n,) the largest softmax probability."""
    nll: Float64Array
    """(n,) cross-entropy with the label, in nats."""

    def metrics(self) -> Metrics:
        """Return the metrics over all of the clips; NaN without any."""
        return Metrics(
            count=len(self.rank),
            top1=self.top_k(1),
            top5=self.top_k(5),
            ece=self.calibration_error(ECE_BINS),
            nll=float(self.nll.mean()) if len(self.nll) else float("nan"),
        )

    def top_k(self, k: int) -> float:
        """Return the fraction of clips whose label is among the k largest logits."""
        return float((self.rank < k).mean()) if len(self.rank) else float("nan")

    def mean_class(self, classes: Sequence[Hashable]) -> float:
        """Return the mean over classes of the fraction of their clips whose label has the largest logit.

        `classes` (n,) are the clips' labels; classes without a clip do not count (mean per-class accuracy).
        """
        right: dict[Hashable, list[bool]] = {}
        for label, rank in zip(classes, self.rank.tolist(), strict=True):
            right.setdefault(label, []).append(rank == 0)
        return fmean(fmean(own) for own in right.values()) if right else float("nan")

    def calibration_error(self, bins: int) -> float:
        """Return sum over bins of (share of clips) * |accuracy - mean confidence|.

        Bin m of M holds confidences in ((m - 1) / M, m / M] (Guo et al. 2017).
        """
        if not len(self.rank):
            return float("nan")
        index = np.clip(np.ceil(self.confidence * bins).astype(np.int64) - 1, 0, bins - 1)
        gap = np.bincount(index, weights=(self.rank == 0) - self.confidence, minlength=bins)
        return float(np.abs(gap).sum() / len(self.rank))


def clip_scores(logits: npt.NDArray[np.floating], labels: IntArray) -> ClipScores:
    """Return the scores of the labelled rows of logits (N, C); ValueError for bad shapes, labels or logits."""
    logits, labels = labelled(logits, labels)
    own = np.take_along_axis(logits, labels[:, None], 1)
    earlier = np.arange(logits.shape[1]) < labels[:, None]
    rank = ((logits > own) | ((logits == own) & earlier)).sum(1)
    log_p = log_softmax(logits)
    nll = -np.take_along_axis(log_p, labels[:, None], 1)[:, 0]
    return ClipScores(rank, np.exp(log_p.max(1)), nll)


def evaluate(logits: npt.NDArray[np.floating], labels: IntArray) -> Metrics:
    """Return all metrics of logits (N, C) against labels (N,)."""
    return clip_scores(logits, labels).metrics()


def average_views(logits: npt.NDArray[np.floating]) -> Float32Array:
    """Return the mean over views of logits (N, V, C) as float32 (N, C)."""
    if logits.ndim != 3 or logits.shape[1] == 0:
        raise ValueError(f"logits must be (N, V, C) with at least one view, got {logits.shape}")
    mean: Float32Array = logits.mean(1, dtype=np.float64).astype(np.float32)
    return mean


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
