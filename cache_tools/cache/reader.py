"""Reading a cache: from the root record down, every byte checked against its recorded hash before it is used.

Arrays are read whole, once, in order; random access is the caller's, in memory. A cache whose build has not
finished has no root record and is refused.
"""

import itertools
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mmkd.cache_tools.cache.array_forms import require_form
from mmkd.cache_tools.cache.arrays import ArrayForm, array_form, decode_array, decode_block
from mmkd.cache_tools.cache.commits import REPAIR, CommitRecord, Unusable, read_verified
from mmkd.cache_tools.cache.init_record import CacheInit, read_init
from mmkd.cache_tools.cache.logit_formats import StorageFormat, format_of
from mmkd.cache_tools.cache.root_record import RootRecord
from mmkd.cache_tools.cache.sealed import damaged
from mmkd.cache_tools.cache.split_table import SplitTable
from mmkd.cache_tools.frames.records import Float32Array, IntArray, UInt8Array
from mmkd.cache_tools.layout import (
    INDEX,
    INIT,
    ROOT,
    THUMBPRINT,
    SplitLayout,
    Status,
    block_key,
    group_key,
    label_array,
    part_array,
    status_array,
    thumbprint_arrays,
)
from mmkd.cache_tools.storage.open import open_store
from mmkd.cache_tools.storage.store import MissingObjectError, Store
from mmkd.cache_tools.views.held_out import HeldOut, common_held_out
from mmkd.cache_tools.views.view import ViewTable
from mmkd.data_manifests.errors import InputError, VerificationError
from mmkd.data_manifests.manifest import Head


class CacheReader:
    """A finished cache, opened for reading."""

    def __init__(self, location: Path | str | Store) -> None:
        """Open the cache; raise InputError when it is none or unfinished, VerificationError when damaged."""
        self.store = open_store(location) if isinstance(location, (Path, str)) else location
        root = self._root()
        self.fingerprint = root.fingerprint
        """Over everything that the cache holds."""
        init = read_verified(self.store, INIT, root.objects[INIT])
        self.init = CacheInit.from_bytes(init, self.store.locate(INIT))
        self.records: list[CommitRecord] = []
        """Those of all shards and nodes, in the order of `CacheInit.wanted`."""
        self.objects: dict[str, str] = dict(self.init.objects)
        """Object key within the group -> SHA-256, over init and all commit records."""
        index = read_verified(self.store, INDEX, root.objects[INDEX])
        for line in index.splitlines():
            record = CommitRecord.from_bytes(line, self.store.locate(INDEX))
            self.records.append(record)
            self.objects.update(record.objects)
        found = ((record.shard, record.node, record.fingerprint) for record in self.records)
        wanted = ((shard.name, node, own) for shard, node, own in self.init.wanted())
        # zip_longest: an index that ends early or runs on is as wrong as one with another record.
        if any(one != other for one, other in itertools.zip_longest(found, wanted)):
            raise damaged(self.store.locate(INDEX), "its records are not those that init.json asks for")

    def _root(self) -> RootRecord:
        try:
            data = self.store.read(ROOT)
        except MissingObjectError:
            read_init(self.store)  # tells a folder that is not a cache from an unfinished one
            raise InputError(
                f"the cache {self.store.locate()} is not finished; run the same `mmkd-cache build` again"
            ) from None
        return RootRecord.from_bytes(data, self.store.locate(ROOT))

    @property
    def dataset(self) -> str:
        """Name of the data set."""
        return self.init.dataset

    @property
    def heads(self) -> tuple[Head, ...]:
        """Heads with their ordered class lists."""
        return self.init.heads

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts."""
        return tuple(self.init.experts)

    @property
    def held_out(self) -> HeldOut | None:
        """The part of train on which no expert trained, or None where there is none."""
        return common_held_out(self.init.held_out.values())

    @cached_property
    def layouts(self) -> dict[str, SplitLayout]:
        """Split name -> its rows, views and blocks."""
        return self.init.layouts()

    def layout(self, split: str) -> SplitLayout:
        """Return the layout of a split; raise InputError naming the splits there are for another."""
        if split not in self.layouts:
            raise InputError(f"the cache has no split {split!r}; it has: {', '.join(self.layouts)}")
        return self.layouts[split]

    def split(self, name: str) -> SplitTable:
        """Read ids, labels and views of one split."""
        self.layout(name)
        table = SplitTable(
            name=name,
            clip_ids=tuple(str(clip_id) for clip_id in self.array(f"{name}/clip_id")),
            labels={head.name: self.array(label_array(name, head.name)) for head in self.heads},
            facts=self.array(f"{name}/facts"),
            drawn=ViewTable(*(self.array(f"{name}/{part}") for part in ("frame_index", "crop_xywh", "flip"))),
        )
        self._check(table)
        return table

    def _check(self, table: SplitTable) -> None:
        """Raise VerificationError for labels and numbers that no build writes, whoever sealed them."""
        for head in self.heads:
            labels = table.labels[head.name]
            if labels.min() < -1 or labels.max() >= len(head.classes):
                raise self._damaged(label_array(table.name, head.name), "it has labels of no class")
        for part, values in (("facts", table.facts), ("frame_index", table.drawn.frame_index)):
            if values.min() < 0:
                raise self._damaged(f"{table.name}/{part}", "it has negative numbers")

    def _damaged(self, array: str, what: object) -> VerificationError:
        return damaged(self.store.locate(group_key(array)), what, advice=REPAIR)

    def logits(self, split: str, expert: str, chosen: IntArray | None = None) -> dict[str, Float32Array]:
        """Return head -> `head_logits`."""
        return {head.name: self.head_logits(split, expert, head.name, chosen) for head in self.heads}

    def head_logits(self, split: str, expert: str, head: str, chosen: IntArray | None = None) -> Float32Array:
        """Return float32 (rows, views, classes) of all rows, or of those `chosen`; NaN where there are none.

        Besides what is returned, one shard lies in memory at a time.
        """
        layout = self.layout(split)
        wanted = np.arange(layout.rows) if chosen is None else chosen
        classes = next(len(known.classes) for known in self.heads if known.name == head)
        found = np.empty((len(wanted), layout.views, classes), np.float32)
        for rows, views, values in self.logit_blocks(split, expert, head):
            inside = (wanted >= rows.start) & (wanted < rows.stop)
            found[inside, views] = values[wanted[inside] - rows.start]
        return found

    def logit_blocks(self, split: str, expert: str, head: str) -> Iterator[tuple[slice, slice, Float32Array]]:
        """Yield (rows, views, float32 logits) of one head, one verified shard at a time."""
        storage = self.storage(expert)
        classes = next(len(known.classes) for known in self.heads if known.name == head)
        names = [part.name for part in storage.parts(classes)]
        blocks = [self.blocks(split, part_array(split, expert, name, head=head)) for name in names]
        for parts in zip(*blocks, strict=True):
            rows, views, _ = parts[0]
            values = {name: part[2] for name, part in zip(names, parts, strict=True)}
            yield rows, views, storage.decode(values, classes=classes)

    def storage(self, expert: str) -> StorageFormat:
        """Return how an expert's logits are stored."""
        if expert not in self.init.experts:
            raise InputError(f"the cache has no expert {expert!r}; it has: {', '.join(self.experts)}")
        return format_of(self.init.experts[expert]["precision"])

    def status(self, split: str, expert: str) -> UInt8Array:
        """Return (rows, views): the `Status` of each view; raise InputError for an expert that is not there."""
        self.storage(expert)
        status: UInt8Array = self.array(status_array(split, expert))[: self.layout(split).rows]  # shards are padded
        return status

    def usable(self, split: str, expert: str) -> npt.NDArray[np.bool_]:
        """Return (rows, views): whether the expert has logits for the view."""
        mask: npt.NDArray[np.bool_] = self.status(split, expert) == Status.OK
        return mask

    def thumbprints(self, split: str) -> tuple[npt.NDArray[np.uint64], UInt8Array]:
        """Return the views' pixel hashes (rows, views) and thumbnails (rows, views, 144)."""
        rows = self.layout(split).rows
        hashes, thumbnails = (self.array(name)[:rows] for name in thumbprint_arrays(split))
        return hashes, thumbnails

    def unusable(self, split: str) -> dict[str, list[Unusable]]:
        """Return expert -> the clips for which it has no logits, with their reasons."""
        found: dict[str, dict[int, Unusable]] = {expert: {} for expert in self.experts}
        for record in self.records:
            if record.node != THUMBPRINT and record.shard.startswith(f"{split}/"):
                # By row: a clip may be in the records of several blocks of views, and is listed once.
                found[record.node].update({item.row: item for item in record.unusable})
        return {expert: [rows[row] for row in sorted(rows)] for expert, rows in found.items()}

    def array(self, name: str) -> npt.NDArray[Any]:
        """Read one array whole, each object checked against its hash."""
        keys = [f"{name}/zarr.json", *self.form(name).keys()]
        objects = {key: self.object(key) for key in keys}
        try:
            return decode_array(name, objects)
        except ValueError as error:
            raise self._damaged(name, error) from error

    def blocks(self, split: str, name: str) -> Iterator[tuple[slice, slice, npt.NDArray[Any]]]:
        """Yield (rows, views, values) of a sharded array, one verified shard at a time, without the padding."""
        form, metadata = self.form(name), self.metadata(name)
        for shard in self.layout(split).shards():
            key = block_key(name, shard, len(form.shape))
            rows = slice(shard.rows.start, shard.rows.stop)
            views = slice(shard.views.start, shard.views.stop)
            yield rows, views, self._decoded(name, metadata, key, (rows, views))

    def objects_of(self, name: str) -> Iterator[tuple[str, tuple[slice, ...], npt.NDArray[Any]]]:
        """Yield (key, region, values) of each object of any array, verified, padding included."""
        form, metadata = self.form(name), self.metadata(name)
        for key in sorted(form.keys()):
            region = form.region(key)
            yield key, region, self._decoded(name, metadata, key, region)

    def _decoded(self, name: str, metadata: bytes, key: str, region: tuple[slice, ...]) -> npt.NDArray[Any]:
        try:
            return decode_block(name, metadata, key, data=self.object(key), region=region)
        except ValueError as error:
            raise self._damaged(key, error) from error

    def form(self, name: str) -> ArrayForm:
        """Return shape, blocks and type of an array; raise VerificationError unless init.json gives it the same."""
        expected = self._forms.get(name)
        if expected is None:
            raise VerificationError(f"{self.store.locate()} holds no array {name!r}")
        try:
            found = array_form(name, self.metadata(name))
            require_form(found, expected)
        except ValueError as error:
            raise self._damaged(name, error) from error
        return found

    def metadata(self, name: str) -> bytes:
        """Return the metadata object of an array, verified."""
        return self.object(f"{name}/zarr.json")

    def object(self, key: str) -> bytes:
        """Return an object of the group, verified."""
        if key not in self.objects:
            raise VerificationError(f"{self.store.locate(group_key(key))} has no commit record; {REPAIR}")
        return read_verified(self.store, group_key(key), self.objects[key])

    @property
    def arrays(self) -> tuple[str, ...]:
        """Names of all arrays."""
        return tuple(sorted(self._forms))

    @cached_property
    def _forms(self) -> dict[str, ArrayForm]:
        return self.init.forms()
