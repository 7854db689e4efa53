"""Where a build's time goes: seconds per stage, and each stage's share of the wall clock."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")


class Stages:
    """Accumulates seconds per stage into a dict that outlives it."""

    def __init__(self, seconds: dict[str, float]) -> None:
        """Add to `seconds`, stage -> seconds."""
        self._seconds = seconds
        self._began = time.perf_counter()

    def add(self, name: str, seconds: float) -> None:
        """Add seconds that were measured elsewhere, e.g. in a worker."""
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time the body as stage `name`."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - began)

    def waits(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield `items`, timing how long each takes to come: as `start` the first, as `wait` the others."""
        source = iter(items)
        name = "start"
        while True:
            with self(name):
                try:
                    item = next(source)
                except StopIteration:
                    return
            name = "wait"
            yield item

    def shares(self) -> str:
        """Return e.g. `decode 41% flow 120% experts 38% write 1%` of the time since the start (workers add up)."""
        wall = max(time.perf_counter() - self._began, 1e-9)
        running = {name: seconds for name, seconds in self._seconds.items() if name != "start"}
        return " ".join(f"{name} {100 * seconds / wall:.0f}%" for name, seconds in running.items())
