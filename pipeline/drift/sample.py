"""The views of a cache that are computed again to look for drift: drawn with a seed, and what is stored of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mmkd.cache_tools.cache.reader import CacheReader
from mmkd.cache_tools.cache.split_table import SplitTable
from mmkd.cache_tools.frames.records import Float32Array
from mmkd.cache_tools.views.keyed_words import KeyedWords
from mmkd.cache_tools.views.view import View
from mmkd.data_manifests.errors import InputError


@dataclass(frozen=True)
class Sampled:
    """One drawn view, with what the cache holds of it."""

    split: str
    """Its split."""
    row: int
    """Its row in the split."""
    number: int
    """Number of the view."""
    clip_id: str
    """The clip's id."""
    view: View
    """The stored view."""
    pixel_hash: int
    """Stored hash of the canonical view."""
    thumbnail: npt.NDArray[np.uint8]
    """(144,) stored thumbnail."""

    @property
    def name(self) -> str:
        """E.g. `train/clip-7, view 2`."""
        return f"{self.split}/{self.clip_id}, view {self.number}"


def draw_sample(reader: CacheReader, experts: Sequence[str], *, sample: int, seed: int) -> list[Sampled]:
    """Draw distinct views for which some of the experts has logits, all equally likely; in the cache's order.

    The draw is a function of the seed and of which views there are. Raises InputError when there is none.
    """
    usable = {
        split: np.logical_or.reduce([reader.usable(split, expert) for expert in experts])
        for split in reader.layouts
    }
    candidates = np.concatenate([np.flatnonzero(mask.ravel()) for mask in usable.values()])
    splits = np.repeat(np.arange(len(usable)), [int(mask.sum()) for mask in usable.values()])
    if not len(candidates):
        raise InputError(f"{reader.store.locate()} holds no logits of {', '.join(experts)}: nothing to compare")
    words, chosen = KeyedWords("drift", seed), set[int]()
    while len(chosen) < min(sample, len(candidates)):
        chosen.add(words.below(len(candidates)))
    found = []
    for position, split in enumerate(usable):
        own = [number for number in sorted(chosen) if splits[number] == position]
        if own:
            found += _sampled(reader, reader.split(split), candidates[own])
    return found


def _sampled(reader: CacheReader, table: SplitTable, cells: npt.NDArray[np.int64]) -> list[Sampled]:
    hashes, thumbnails = reader.thumbprints(table.name)
    found = []
    for row, number in zip(*(axis.tolist() for axis in np.divmod(cells, table.views)), strict=True):
        view, clip_id = table.view(row, number), table.clip_ids[row]
        stored = int(hashes[row, number]), thumbnails[row, number]
        found.append(Sampled(table.name, row, number, clip_id, view, *stored))
    return found


def stored_logits(reader: CacheReader, expert: str, head: str, drawn: Sequence[Sampled]) -> Float32Array:
    """Return the stored logits (sample, classes) of the drawn views, holding one shard in memory."""
    classes = next(len(known.classes) for known in reader.heads if known.name == head)
    stored = np.full((len(drawn), classes), np.nan, np.float32)
    for split in dict.fromkeys(item.split for item in drawn):
        own = [(position, item.row, item.number) for position, item in enumerate(drawn) if item.split == split]
        for rows, views, values in reader.logit_blocks(split, expert, head):
            for position, row, number in own:
                if rows.start <= row < rows.stop and views.start <= number < views.stop:
                    stored[position] = values[row - rows.start, number - views.start]
    return stored
