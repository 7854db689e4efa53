"""How the steps of a run went, by intervals: a row for every `log_steps` of them in steps.csv, for people.

Rows follow each other without a gap: one ends at each checkpoint and each epoch's end, too, and a run that goes on
from an earlier checkpoint leaves out those that it does again. Nothing is read back but for that.
"""

import csv
import io
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from pydantic import TypeAdapter

from mmkd.data_manifests.atomic import storage_errors, write_atomically
from mmkd.data_manifests.regular_file import read_regular
from mmkd.student.training.late import StepResult

log = logging.getLogger("mmkd")
STEPS_FILE = "steps.csv"
WRITE_SECONDS = 10.0
"""The file is written at most so often between checkpoints."""


@dataclass(frozen=True)
class Interval:
    """A row of steps.csv: some steps of one epoch."""

    first_step: int
    """Its first step, counted from 1."""
    last_step: int
    """Its last step."""
    epoch: int
    """The epoch that they belong to, counted from 1."""
    loss: float
    """Mean over their clips."""
    gradient_norm: float | None
    """Before clipping, mean over those steps where it is finite; None without any (fp16 leaves such steps out)."""
    learning_rate: float
    """Of the last step."""
    clips_per_second: float
    """While they were done; what lies between them, such as checkpoints, is left out."""


COLUMNS = tuple(field.name for field in fields(Interval))


class StepLog:
    """Collects the results of steps, tells of each interval, and keeps steps.csv."""

    def __init__(self, log_steps: int, tell: Callable[[Interval], None]) -> None:
        """Begin at step 0, without a file; `tell` learns of each interval."""
        self._log_steps, self._tell = log_steps, tell
        self._path: Path | None = None
        self._check: Callable[[], None] = lambda: None
        self._rows: list[Interval] = []
        self._found: list[StepResult] = []
        self._since = self._written = time.perf_counter()

    def open(self, path: Path, step: int, check: Callable[[], None]) -> None:
        """Keep the rows in `path`, after those of the first `step` steps; `check` is called before each write."""
        self._path, self._check = path, check
        self._rows = [row for row in read_intervals(path) if row.last_step <= step] if step else []

    def begin(self) -> None:
        """Count the time of the next steps from here."""
        self._since = time.perf_counter()

    def add(self, found: StepResult, *, epoch: int, learning_rate: float) -> None:
        """Note a step of an epoch, counted from 0."""
        self._found.append(found)
        self._epoch, self._rate = epoch, learning_rate
        if (found.step + 1) % self._log_steps == 0:
            self.end_interval()

    def end_interval(self) -> None:
        """End an interval here, where it has a step."""
        if not self._found:
            return
        found, self._found = self._found, []
        now, since = time.perf_counter(), self._since
        self._since = now
        clips = sum(step.clips for step in found)
        norms = [step.norm for step in found if math.isfinite(step.norm)]
        row = Interval(
            first_step=found[0].step + 1,
            last_step=found[-1].step + 1,
            epoch=self._epoch + 1,
            loss=sum(step.loss * step.clips for step in found) / clips,
            gradient_norm=sum(norms) / len(norms) if norms else None,
            learning_rate=self._rate,
            clips_per_second=round(clips / max(now - since, 1e-9), 3),
        )
        self._rows.append(row)
        self._tell(row)
        if now - self._written >= WRITE_SECONDS:
            self.write()

    def write(self) -> None:
        """Write the file, where there is to be one."""
        self._written = time.perf_counter()
        if self._path is not None:
            self._check()
            write_atomically(self._path, intervals_csv(self._rows).encode())


def intervals_csv(rows: Sequence[Interval]) -> str:
    """Return the text of steps.csv."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue()


def read_intervals(path: Path) -> list[Interval]:
    """Return the rows of steps.csv, none where there is none; a damaged one is left out, with a warning."""
    with storage_errors(path, verb="read"):
        try:
            data = read_regular(path)
        except FileNotFoundError:
            return []
    try:
        rows = csv.DictReader(io.StringIO(data.decode()))
        return _ROWS.validate_python([{name: value or None for name, value in row.items()} for row in rows])
    except (ValueError, csv.Error) as error:
        reason = str(error).splitlines()[0]
        log.warning("%s is damaged (%s): its rows are left out", path, reason)
        return []


_ROWS = TypeAdapter(list[Interval])
