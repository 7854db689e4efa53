"""A training in TensorBoard's event files, while it runs: what steps.csv, metrics.jsonl and evaluations say.

A run that goes on adds a file, and says in it from which step on those before no longer count.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmkd.data_manifests.atomic import storage_errors
from mmkd.data_manifests.errors import InputError
from mmkd.student.training.epoch_metrics import EpochMetrics
from mmkd.student.training.step_log import Interval
from mmkd.student.training.watch import Watch

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

MISSING = (
    "--tensorboard needs the package tensorboard: pip install 'mmkd[tensorboard]'; steps.csv has the numbers, too"
)
EVENT_FILES = "events.out.tfevents.*"
OF_INTERVAL = ("loss", "gradient_norm", "learning_rate", "clips_per_second")
OF_EVALUATION = ("top1", "top5", "mean_class", "ece", "nll", "teacher_agreement")


class EventFiles(Watch):
    """Writes event files into a folder."""

    def __init__(self, folder: Path) -> None:
        """Write nothing yet."""
        self._folder = folder
        self._writer: SummaryWriter | None = None

    @contextmanager
    def over(self, step: int, total_steps: int) -> Iterator[None]:
        """Keep a file open within the loop; of those before, steps after `step` no longer count."""
        with self._open(step + 1):
            yield

    def interval_done(self, interval: Interval) -> None:
        """Write how some steps went, at the last of them."""
        self._add({f"train/{name}": getattr(interval, name) for name in OF_INTERVAL}, interval.last_step)

    def epoch_done(self, metrics: EpochMetrics) -> None:
        """Write how an epoch went, at its last step."""
        values: dict[str, float | None] = {"epoch/loss": metrics.loss}
        for head, found in (metrics.held_out or {}).items():
            values |= {f"held_out/{head}/{name}": value for name, value in found.items() if name != "clips"}
        self._add(values, metrics.steps)

    def evaluated(self, metrics: Mapping[str, Any], step: int) -> None:
        """Write how the finished student did, at its last step."""
        values = {
            f"evaluation/{part}/{head}/{name}": found.get(name)
            for part, heads in metrics.items()
            for head, found in heads.items()
            for name in OF_EVALUATION
        }
        with self._open(None):
            self._add(values, step)

    @contextmanager
    def _open(self, purge_step: int | None) -> Iterator[None]:
        from torch.utils.tensorboard import SummaryWriter

        with storage_errors(self._folder):
            before = any(self._folder.glob(EVENT_FILES))
            self._writer = SummaryWriter(str(self._folder), purge_step=purge_step if before else None)
        try:
            yield
        finally:
            with storage_errors(self._folder):
                self._writer.close()
            self._writer = None

    def _add(self, values: Mapping[str, float | None], step: int) -> None:
        if self._writer is None:
            return
        with storage_errors(self._folder):
            for tag, value in values.items():
                if value is not None:
                    self._writer.add_scalar(tag, value, step)


def check_tensorboard() -> None:
    """Raise InputError without TensorBoard."""
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: F401
    except ImportError as error:
        raise InputError(MISSING) from error
