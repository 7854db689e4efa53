"""Clips in batches: in which order, under which views, and read ahead by threads.

Order and views are pure functions of the seed, the epoch and the row, made from raw generator words (a
library's `shuffle` may change between versions). Threads only read: which thread is fast changes nothing.
"""

from collections import deque
from collections.abc import Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mmkd.cache_tools.frames.records import IntArray
from mmkd.data_manifests.errors import InputError, VideoError

AnyArray = npt.NDArray[Any]
Item = Mapping[str, AnyArray]


class ViewDataset(Protocol):
    """Labelled clips whose views can be asked for by number; the loop knows no modality beyond this."""

    @property
    def rows(self) -> int:
        """Number of clips."""
        ...

    @property
    def views(self) -> int | None:
        """Number of views of each clip; None when a fresh view can be had for every epoch."""
        ...

    @property
    def clip_ids(self) -> Sequence[str]:
        """(rows,) ids, for error messages and fingerprints."""
        ...

    @property
    def labels(self) -> Mapping[str, IntArray]:
        """Head -> int64 (rows,) label numbers, -1 where absent."""
        ...

    def item(self, row: int, view: int) -> Item:
        """Return one view's input arrays by modality, without a batch axis; called from several threads."""
        ...


@dataclass(frozen=True)
class Batch:
    """Views of clips, stacked."""

    rows: IntArray
    """(B,) rows of the data set."""
    views: IntArray
    """(B,) view numbers."""
    inputs: dict[str, AnyArray]
    """Input arrays (B, ...) by modality."""


@dataclass(frozen=True)
class Schedule:
    """Which clips, under which views, make up each step of a run."""

    rows: int
    """Number of clips, at least 1."""
    views: int | None
    """Number of views of each clip; None: the view number is the epoch."""
    batch_size: int
    """Largest number of clips in a step."""
    seed: int
    """Key of order and views."""

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps in which each clip is seen exactly once."""
        return -(-self.rows // self.batch_size)

    def epoch(self, number: int) -> list[tuple[IntArray, IntArray]]:
        """Return (rows, views) of each step of epoch `number`; batch sizes differ by at most one."""
        order = np.argsort(random_words(self.rows, self.seed, number, 0), kind="stable")
        views = self.views_at(number)
        return [(rows, views[rows]) for rows in np.array_split(order, self.steps_per_epoch)]

    def views_at(self, epoch: int) -> IntArray:
        """Return (rows,) view numbers: each row goes through its views in its own order, again and again.

        So after any multiple of `views` epochs each view was used equally often.
        """
        if self.views is None:
            return np.full(self.rows, epoch, np.int64)
        words = random_words(self.rows * self.views, self.seed, 0, 1).reshape(self.rows, self.views)
        turn = epoch % self.views
        return np.ascontiguousarray(np.argsort(words, axis=1, kind="stable")[:, turn])


def random_words(count: int, seed: int, stream: int, purpose: int) -> npt.NDArray[np.uint64]:
    """Return `count` raw words of the Philox generator keyed by (seed, purpose, stream)."""
    key = np.array([seed, (purpose << 32) | stream], np.uint64)
    words: npt.NDArray[np.uint64] = np.random.Philox(key=key).random_raw(count)
    return words


def read_batches(
    dataset: ViewDataset, steps: Iterable[tuple[IntArray, IntArray]], *, threads: int, ahead: int
) -> Generator[Batch]:
    """Yield the batches of `steps` in order, while `threads` threads read at most `ahead` more."""
    remaining = iter(steps)
    waiting: deque[tuple[IntArray, IntArray, list[Future[Item]]]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="read-clips")

    def submit_next() -> None:
        with suppress(StopIteration):
            rows, views = next(remaining)
            pairs = zip(rows.tolist(), views.tolist(), strict=True)
            waiting.append((rows, views, [pool.submit(read_item, dataset, *pair) for pair in pairs]))

    try:
        for _ in range(ahead + 1):
            submit_next()
        while waiting:
            rows, views, futures = waiting.popleft()
            items = [future.result() for future in futures]
            submit_next()
            yield Batch(rows, views, stack(items))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def read_item(dataset: ViewDataset, row: int, view: int) -> Item:
    """Read one view; an unreadable clip becomes an InputError that names it."""
    try:
        return dataset.item(row, view)
    except VideoError as error:
        raise InputError(f"clip {dataset.clip_ids[row]!r}, view {view}: {error}") from error


def stack(items: Sequence[Item]) -> dict[str, AnyArray]:
    """Stack items to arrays with a batch axis in front."""
    return {name: np.stack([item[name] for item in items]) for name in items[0]}
