"""The best epoch so far, by held-out clips of the training split; never by a split that is reported."""

from collections.abc import Callable, Mapping, Sequence

from torch import nn

from mmkd.student.training.epoch_metrics import EpochMetrics, HeldOutMetrics

Validate = Callable[[nn.Module], HeldOutMetrics]
"""Tells how a network does on held-out clips: head -> metric -> value, with `top1` and `nll`."""


def merit(found: Mapping[str, Mapping[str, float]]) -> tuple[float, float]:
    """Return what the best epoch has most of: top-1, and among equals a low cross-entropy; means over heads."""
    values = list(found.values())
    return sum(v["top1"] for v in values) / len(values), -sum(v["nll"] for v in values) / len(values)


def best_epoch(metrics: Sequence[EpochMetrics]) -> int | None:
    """Return the number of the best epoch, the first of equals; None where none was validated."""
    validated = [values for values in metrics if values.held_out]
    best: EpochMetrics | None = None
    for values in validated:
        if best is None or merit(values.held_out or {}) > merit(best.held_out or {}):
            best = values
    return None if best is None else best.epoch


def is_over(metrics: Sequence[EpochMetrics], patience_epochs: int | None) -> bool:
    """Return whether so many epochs have passed since the best one."""
    best = best_epoch(metrics)
    if patience_epochs is None or best is None:
        return False
    return metrics[-1].epoch - best >= patience_epochs
