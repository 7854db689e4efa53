"""The metrics of a run's epochs: a line each in metrics.jsonl for people, and a copy in every checkpoint."""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmkd.data_manifests.regular_file import read_regular
from mmkd.data_manifests.typed_json import STRICT, typed

log = logging.getLogger("mmkd")
METRICS_FILE = "metrics.jsonl"

HeldOutMetrics = dict[str, dict[str, float]]
"""Head -> metric -> value on held-out clips: `clips`, `top1`, `nll`."""


@dataclass(frozen=True)
class EpochMetrics:
    """A line of metrics.jsonl."""

    __pydantic_config__ = STRICT
    epoch: int
    """Counted from 0."""
    steps: int
    """Steps done at its end."""
    loss: float
    """Mean over the epoch's clips."""
    learning_rate: float
    """Of its last step."""
    clips_per_second: float
    """Over the part of the epoch that this run did."""
    held_out: HeldOutMetrics | None = None
    """Of the network at its end, where clips are held out."""

    def to_json(self) -> dict[str, Any]:
        """Return it for a line or a checkpoint, without what is not known."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def metrics_lines(metrics: Sequence[EpochMetrics]) -> str:
    """Return the text of metrics.jsonl."""
    return "".join(json.dumps(values.to_json()) + "\n" for values in metrics)


def old_metrics(path: Path, epochs: int) -> list[EpochMetrics]:
    """Return the metrics of the first `epochs` epochs from metrics.jsonl, where an earlier version kept them alone.

    They only report on the run: damaged ones are left out, with a warning, and the run goes on.
    """
    try:
        lines = read_regular(path).splitlines()[:epochs] if epochs else []
        metrics = [typed(EpochMetrics, json.loads(line)) for line in lines]
        if [values.epoch for values in metrics] != list(range(epochs)):
            raise ValueError(f"it has not each of {epochs} epochs in order")
        return metrics
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        log.warning(
            "%s is damaged (%s): the metrics of the epochs so far are left out; training goes on", path, reason
        )
        return []
