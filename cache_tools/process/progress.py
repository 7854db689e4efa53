"""Progress of long work on stderr: a bar on a terminal, a line a minute in a log.

stdout stays free for the result. The rate counts what this run did, not what a resumed one found done.
"""

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, TextIO

from tqdm import tqdm

from mmkd.data_manifests.counted import plural

LINE_INTERVAL_SECONDS = 60.0


class Progress:
    """Context manager that shows how much of `total` is done, how fast, and how long the rest will take."""

    def __init__(
        self,
        what: str,
        *,
        total: int,
        unit: str = "clip",
        done: int = 0,
        enabled: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Name the work `what`; `done` units of it are there already; `stream` is stderr by default."""
        self.total = total
        self.what = what
        self.units = unit if total == 1 else plural(unit)
        self.done = done
        self._before = done
        self._stream = (sys.stderr if stream is None else stream) if enabled else None
        self._clock = clock
        self._note = ""
        self._bar: Any = None
        self._start_seconds = self._last_line_seconds = 0.0

    def __enter__(self) -> "Progress":
        """Show the first state."""
        self._start_seconds = self._last_line_seconds = self._clock()
        if self._stream is not None and self._stream.isatty():
            self._bar = tqdm(
                total=self.total,
                initial=self.done,
                desc=self.what,
                unit=f" {self.units}",
                file=self._stream,
                dynamic_ncols=True,
            )
        else:
            self._line(f"{self.what}: {self.done}/{self.total} {self.units}")
        return self

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """Count `count` more units as done; `note` stands behind the rate until the next one."""
        self.done += count
        self._note = self._note if note is None else note
        if self._bar is not None:
            if note is not None:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(count)
        elif self._clock() - self._last_line_seconds >= LINE_INTERVAL_SECONDS:
            self._last_line_seconds = self._clock()
            self._line(self._state())

    @property
    def units_per_second(self) -> float:
        """Rate over this run so far; 0 before the first unit."""
        elapsed = self._clock() - self._start_seconds
        return (self.done - self._before) / elapsed if elapsed > 0 else 0.0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the bar or write the last line, also when the work failed."""
        if self._bar is not None:
            self._bar.close()
        else:
            seconds = self._clock() - self._start_seconds
            self._line(f"{self._state(left=False)} after {duration(seconds)}")

    def _state(self, *, left: bool = True) -> str:
        rate = self.units_per_second
        parts = [f"{self.what}: {self.done}/{self.total} {self.units}", f"{rate:.1f}/s"]
        if left and rate > 0:
            parts.append(f"{duration((self.total - self.done) / rate)} left")
        if self._note:
            parts.append(self._note)
        return ", ".join(parts)

    def _line(self, text: str) -> None:
        if self._stream is not None:
            print(text, file=self._stream, flush=True)


def duration(seconds: float) -> str:
    """Return seconds as `42 s`, `3 min 20 s` or `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
