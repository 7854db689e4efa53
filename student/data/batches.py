"""Clips in batches: which clips in which order under which views, and how a batch is read and stacked.

Order and views are pure functions of the seed, the epoch and the row, made from raw generator words (a
library's `shuffle` may change between versions).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mmkd.cache_tools.frames.records import IntArray
from mmkd.data_manifests.counted import counted
from mmkd.data_manifests.errors import InputError, VideoError

AnyArray = npt.NDArray[Any]
Item = Mapping[str, AnyArray]
Step = tuple[IntArray, IntArray]
"""Rows and views (B,) of one step."""


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
        """Return one view's input arrays by modality, without a batch axis; called from several threads.

        A data set that reads several views of a clip at less cost has `items(row, views)`, too, which gives a list.
        """
        ...


@dataclass(frozen=True)
class Batch:
    """Views of clips, stacked."""

    rows: IntArray
    """(B,) rows of the data set."""
    views: IntArray
    """(B,) view numbers."""
    inputs: dict[str, Tensor]
    """Inputs (B, ...) by modality, on the CPU."""


@dataclass(frozen=True)
class Schedule:
    """Which clips, under which views, make up each step of a run.

    An epoch is a pass in which each clip comes once, and is then seen under `repeats` views in the same step. So it
    has `repeats` times the steps of one without, and a clip's turn t is its view of epoch t // repeats.
    """

    rows: int
    """Number of clips, at least 1."""
    views: int | None
    """Number of views of each clip; None: the view number is the turn."""
    batch_size: int
    """Largest number of views in a step, a multiple of `repeats`."""
    seed: int
    """Key of order and views."""
    repeats: int = 1
    """Views of each clip in a step."""

    def __post_init__(self) -> None:
        """Raise InputError for more repeats than there are views."""
        if self.views is not None and self.repeats > self.views:
            raise InputError(
                f"train.repeats={self.repeats}, and each clip has {counted(self.views, 'view')}: a step would "
                "see the same view twice; set fewer repeats, or add views to the cache"
            )
        if self.batch_size % self.repeats:
            raise ValueError(f"batch_size {self.batch_size} is no multiple of repeats {self.repeats}")

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps in which each clip comes exactly once."""
        return -(-self.rows // (self.batch_size // self.repeats))

    @property
    def views_per_epoch(self) -> int:
        """Number of views that an epoch sees."""
        return self.rows * self.repeats

    def clips_of(self, step: int) -> int:
        """Return how many views a step has."""
        size, more = divmod(self.rows, self.steps_per_epoch)
        return (size + (step % self.steps_per_epoch < more)) * self.repeats

    def steps(self, first: int, end: int) -> Iterator[Step]:
        """Yield (rows, views) of the run's steps `first` to `end` (exclusive), one epoch at a time."""
        while first < end:
            number, skipped = divmod(first, self.steps_per_epoch)
            of_epoch = self.epoch(number)[skipped:][: end - first]
            yield from of_epoch
            first += len(of_epoch)

    def epoch(self, number: int) -> list[Step]:
        """Return (rows, views) of each step of epoch `number`; numbers of clips differ by at most one.

        The views of one clip follow each other, so that whoever reads a step decodes it once.
        """
        order = np.argsort(random_words(self.rows, self.seed, number, 0), kind="stable")
        turns = range(number * self.repeats, (number + 1) * self.repeats)
        views = np.stack([self.views_at(turn) for turn in turns], axis=1)
        steps = np.array_split(order, self.steps_per_epoch)
        return [(np.repeat(rows, self.repeats), views[rows].reshape(-1)) for rows in steps]

    def views_at(self, turn: int) -> IntArray:
        """Return (rows,) view numbers: each row goes through its views in its own order, again and again.

        So after any multiple of `views` turns each view was used equally often.
        """
        if self.views is None:
            return np.full(self.rows, turn, np.int64)
        words, found = _word_stream(self.seed, 0, 1), np.empty(self.rows, np.int64)
        for start in range(0, self.rows, VIEW_ROWS):  # in blocks: a million clips of 32 views are 256 MB of words
            part = found[start : start + VIEW_ROWS]
            drawn = words.random_raw(len(part) * self.views).reshape(len(part), self.views)
            part[:] = np.argsort(drawn, axis=1, kind="stable")[:, turn % self.views]
        return found


VIEW_ROWS = 2**16
"""Rows whose views are put in order together."""


def random_words(count: int, seed: int, stream: int, purpose: int) -> npt.NDArray[np.uint64]:
    """Return `count` raw words of the Philox generator keyed by (seed, purpose, stream)."""
    words: npt.NDArray[np.uint64] = _word_stream(seed, stream, purpose).random_raw(count)
    return words


def _word_stream(seed: int, stream: int, purpose: int) -> np.random.Philox:
    return np.random.Philox(key=np.array([seed, (purpose << 32) | stream], np.uint64))


def clips_of(step: Step) -> Iterator[tuple[int, list[int]]]:
    """Yield each clip of a step, a row that may follow itself, with the views under which it is seen."""
    rows, views = step
    starts = np.flatnonzero(np.diff(rows, prepend=-1))
    for row, own in zip(rows[starts].tolist(), np.split(views, starts[1:]), strict=True):
        yield row, own.tolist()


def read_items(dataset: ViewDataset, row: int, views: Sequence[int]) -> list[Item]:
    """Read views of one clip, which is decoded once; an unreadable one becomes an InputError that names it."""
    read = getattr(dataset, "items", None)
    number = views[0]
    try:
        if read is not None:
            return cast(list[Item], read(row, views))
        found = []
        for number in views:
            found.append(dataset.item(row, number))
        return found
    except VideoError as error:
        named = f"view {number}" if read is None or len(views) == 1 else f"views {', '.join(map(str, views))}"
        clip = f"clip {dataset.clip_ids[row]!r}, {named}"
        raise InputError(f"{clip}: {error}; leave it out, or replace its video") from error


def read_item(dataset: ViewDataset, row: int, view: int) -> Item:
    """Read one view; raises as `read_items`."""
    return read_items(dataset, row, [view])[0]


def stack(items: Sequence[Item], *, pin: bool = False) -> dict[str, Tensor]:
    """Stack items to tensors with a batch axis in front, if wished in page-locked memory."""
    stacked = {}
    for name, first in items[0].items():
        kind = torch.from_numpy(first).dtype
        stacked[name] = torch.empty((len(items), *first.shape), dtype=kind, pin_memory=pin)
        np.stack([item[name] for item in items], out=stacked[name].numpy())
    return stacked
