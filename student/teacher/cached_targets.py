"""The teacher of the training split, mixed shard by shard into one memory map for all processes of a node.

Opening it reads the cache once per node, every byte verified; looking targets up reads the map alone, at memory
speed, and never Zarr. Other weights, another cache or another rule for missing experts are another copy, made in
seconds. Memory is bounded by a shard of each expert, whatever the split's size; on disk a copy needs 4 bytes per
row, view and class (0.95 GB for Something-Something V2 at 8 views).
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mmkd.cache_tools.cache.reader import CacheReader
from mmkd.cache_tools.frames.records import Float32Array, IntArray
from mmkd.cache_tools.layout import SplitLayout
from mmkd.data_manifests.errors import InputError
from mmkd.student.recipes.student import Missing
from mmkd.student.teacher.cached_teacher import Block, mixed_blocks, valid_views
from mmkd.student.teacher.copy_file import ArrayPlan
from mmkd.student.teacher.mixing import HeadMixtures
from mmkd.student.teacher.node_copy import default_copies_folder, open_or_make

CONTENTS = "mixed-teacher-1"
"""Rises when mixing the same experts would give other numbers, or the arrays lie otherwise."""


@dataclass(frozen=True)
class CachedTargets:
    """Targets of a data set's rows, looked up in arrays in memory or in a memory map."""

    logits: Mapping[str, Float32Array]
    """Head -> float32 (view blocks, split's rows, views of a block, classes); NaN where there is none."""
    mask: npt.NDArray[np.bool_]
    """(split's rows, views) whether the teacher has logits."""
    rows: IntArray
    """(n,) the split's row of each row of the data set."""

    def targets(self, rows: IntArray, views: IntArray) -> dict[str, Float32Array]:
        """Return the logits of data-set rows (B,) under views (B,)."""
        own = self.rows[rows]
        found = {}
        for head, array in self.logits.items():
            block, view = np.divmod(views, array.shape[2])
            found[head] = array[block, own, view]
        return found

    def valid(self, rows: IntArray, views: IntArray) -> npt.NDArray[np.bool_]:
        """Return (B,) whether there is a target."""
        return self.mask[self.rows[rows], views]


def shared_targets(
    reader: CacheReader, split: str, mixtures: HeadMixtures, *, missing: Missing, rows: IntArray, directory: Path
) -> CachedTargets:
    """Return the targets of a split's `rows` from the node's copy in `directory`, made if it is not there.

    Raises InputError when the split has no usable teacher at all, VerificationError for a damaged cache,
    StorageError when the copy cannot be kept.
    """
    key = {
        "contents": CONTENTS,
        "numpy": np.__version__,
        "cache": reader.fingerprint,
        "split": split,
        "weights": {head: mixture.to_json() for head, mixture in mixtures.items()},
        "missing": missing,
    }
    maps = open_or_make(directory, key, plan_arrays(reader, split, mixtures, missing))
    mask = np.asarray(maps.pop("valid"))
    logits = {
        name.removeprefix("logits/"): np.asarray(value).reshape(-1, len(mask), *value.shape[1:])
        for name, value in maps.items()
    }  # np.asarray: a memmap's own indexing takes longer
    return CachedTargets(logits, mask, rows)


def plan_arrays(reader: CacheReader, split: str, mixtures: HeadMixtures, missing: Missing) -> Iterator[ArrayPlan]:
    """Yield the arrays of a copy, made as they are asked for: the mask, then each head's logits by shards."""
    layout, valid = reader.layout(split), valid_views(reader, split, mixtures, missing)
    yield ArrayPlan("valid", valid.shape, "bool", [valid])
    for head in reader.heads:
        if head.name in mixtures:
            mixture = mixtures[head.name]
            blocks = mixed_blocks(reader, split, head.name, mixture=mixture, missing=missing, valid=valid)
            rows = layout.rows * (layout.views // layout.shard_views)
            shape = (rows, layout.shard_views, len(head.classes))
            yield ArrayPlan(f"logits/{head.name}", shape, "float32", in_order(layout, blocks))


def in_order(layout: SplitLayout, blocks: Iterable[Block]) -> Iterator[Float32Array]:
    """Yield the blocks' values; raise ValueError unless they come as the layout's shards do."""
    for shard, (rows, views, values) in zip(layout.shards(), blocks, strict=True):
        if (rows.start, rows.stop, views.start) != (shard.rows.start, shard.rows.stop, shard.views.start):
            raise ValueError(f"the block of rows {rows} and views {views} came in the place of {shard.name}")
        yield values


def copies_folder(directory: Path | None, cache: Path | str) -> Path:
    """Return the folder for the node's copies; raise InputError for one within the cache, which is only read."""
    folder = default_copies_folder() if directory is None else directory
    if isinstance(cache, Path) and folder.resolve().is_relative_to(cache.resolve()):
        raise InputError(f"--node-copies {folder} lies in the cache, which is only read; name another folder")
    return folder
