"""Who looks on while a network trains: told of its steps, by named parts; what looks changes no number."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch.profiler import record_function

from mmkd.student.training.epoch_metrics import EpochMetrics
from mmkd.student.training.step_log import Interval

TRACE_FILE = "trace.json"
"""Beside a run's metrics, where its steps were profiled."""
PARTS = "mmkd: "
"""Begins the names of a step's parts in a trace."""
WAITING, TARGETS, FORWARD, BACKWARD, OPTIMISER, SETTLING, KEEPING = (
    "waiting for clips",
    "labels and targets",
    "forward",
    "backward",
    "optimiser",
    "waiting for the device",
    "epochs' ends, checkpoints",
)
"""The parts, none of which lies within another."""


class Watch:
    """Looks at nothing; what looks has its own methods in place of these."""

    @contextmanager
    def over(self, step: int, total_steps: int) -> Iterator[None]:
        """Enclose the loop, which begins with `step` and ends before `total_steps`, unless it stops earlier."""
        yield

    def step_done(self) -> None:
        """Learn that a step was queued."""

    def interval_done(self, interval: Interval) -> None:
        """Learn how some steps went."""

    def epoch_done(self, metrics: EpochMetrics) -> None:
        """Learn how an epoch went."""

    def evaluated(self, metrics: Mapping[str, Any], step: int) -> None:
        """Learn how the finished student did, after that many steps: split or group -> head -> metrics."""


NOBODY = Watch()


class Watches(Watch):
    """Several that look."""

    def __init__(self, watches: Sequence[Watch]) -> None:
        """Tell each of them, in order."""
        self._watches = watches

    @contextmanager
    def over(self, step: int, total_steps: int) -> Iterator[None]:
        """Enclose the loop in all of them."""
        with ExitStack() as stack:
            for watch in self._watches:
                stack.enter_context(watch.over(step, total_steps))
            yield

    def step_done(self) -> None:
        """Tell all of them."""
        for watch in self._watches:
            watch.step_done()

    def interval_done(self, interval: Interval) -> None:
        """Tell all of them."""
        for watch in self._watches:
            watch.interval_done(interval)

    def epoch_done(self, metrics: EpochMetrics) -> None:
        """Tell all of them."""
        for watch in self._watches:
            watch.epoch_done(metrics)


def part(name: str) -> record_function:
    """Return a context that a trace shows as this part of a step; it costs 6 microseconds where there is none."""
    return record_function(PARTS + name)
