"""Caches over disjoint clips of one data set, made into one, as if it had been built over all of them.

Two labs, or two sites, each cache the videos that they have, with the same recipe and experts; the merged manifest
says which clips there are and in which order. Splits of one name become one, rows go to their places in the
manifest, and blocks are encoded again; statuses, reasons, thumbprints and views come along. What cannot come along
is the error bound of a single shard: a merged shard has the largest of those that its rows came from.

One array of one node at a time lies uncompressed in a temporary file (`TMPDIR`), so memory is bounded by a shard.
"""

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mmkd.cache_tools.cache.arrays import ArraySpec, Objects, array_form, array_of, encode_block, encode_group
from mmkd.cache_tools.cache.commits import CommitRecord, Unusable, hash_objects, publish
from mmkd.cache_tools.cache.fingerprints import require_same
from mmkd.cache_tools.cache.reader import CacheReader
from mmkd.cache_tools.layout import INIT, THUMBPRINT, Shard, SplitLayout, Status, group_key, status_array
from mmkd.cache_tools.process.progress import Progress
from mmkd.cache_tools.storage.open import open_store, same_place
from mmkd.cache_tools.storage.store import Store
from mmkd.cache_tools.upkeep.free_place import writing_whole
from mmkd.cache_tools.upkeep.merge_rows import Source, SplitRows, match_rows
from mmkd.data_manifests.counted import counted
from mmkd.data_manifests.errors import InputError, StorageError
from mmkd.data_manifests.manifest import Manifest

ADVICE = "Merge caches that one recipe and the same experts made over disjoint clips of one data set"


@dataclass(frozen=True)
class MergeReport:
    """What a merge did."""

    clips: dict[str, int]
    """Split -> rows."""
    shards: int
    """Shards written."""
    fingerprint: str
    """Fingerprint of the merged cache."""

    def lines(self, cache: Path | str) -> list[str]:
        """Return the report for people."""
        splits = ", ".join(f"{name} {rows}" for name, rows in self.clips.items())
        return [
            f"{cache}: {counted(sum(self.clips.values()), 'clip')} ({splits}) in {counted(self.shards, 'shard')}"
        ]


def merge_caches(
    locations: Sequence[Path | str | Store], out: Path | str | Store, manifest: Manifest
) -> MergeReport:
    """Write the caches at `locations` into one at `out`, whose rows are the clips of `manifest`.

    Raises FingerprintError, field by field, for caches that do not belong together; InputError, by name, for a clip
    that is in two of them, in none, or not as the manifest has it. Stopped half-way it leaves an unfinished cache:
    run it again.
    """
    readers = [CacheReader(location) for location in locations]
    store = open_store(out) if isinstance(out, (Path, str)) else out
    if any(same_place(store, reader.store) for reader in readers):
        raise InputError(f"{store.locate()} is one of the caches to merge; name another place with -o")
    check_alike(readers, manifest)
    splits = match_rows(readers, manifest)
    merger = Merger(readers[0], splits, manifest)
    works = [(rows, node) for rows in splits for node in merger.nodes]
    with (
        writing_whole(store, merger.init, what="this merge gives another one"),
        Progress("merging", total=len(works), unit="node") as progress,
    ):
        for key, data in merger.objects.items():
            store.write(group_key(key), data)
        store.write(INIT, merger.init.to_bytes())
        for rows, node in works:
            merger.write_node(store, rows, node)
            progress.advance()
    layouts = [rows.layout for rows in splits]
    return MergeReport(
        {layout.name: layout.rows for layout in layouts},
        sum(1 for layout in layouts for _ in layout.shards()),
        CacheReader(store).fingerprint,
    )


def check_alike(readers: Sequence[CacheReader], manifest: Manifest) -> None:
    """Raise FingerprintError unless all caches are of one recipe, the same experts and the manifest's data set."""
    first = readers[0]
    classes = {head.name: list(head.classes) for head in manifest.heads}
    for reader in readers[1:]:
        what = f"{reader.store.locate()} cannot be merged with {first.store.locate()}: it"
        require_same(common_fields(first), common_fields(reader), what=what, advice=ADVICE)
    require_same(
        {"dataset": first.dataset, "heads": first.init.base["heads"]},
        {"dataset": manifest.dataset, "heads": classes},
        what=f"the manifest is not of the data set of {first.store.locate()}: it",
        advice="Give the manifest of all clips with --manifest",
    )


def common_fields(reader: CacheReader) -> dict[str, Any]:
    """Return what caches to be merged have in common: all but the manifest, rows and versions of libraries."""
    init = reader.init
    base = {key: value for key, value in init.base.items() if key != "manifest"}
    held_out = {name: asdict(part) for name, part in init.held_out.items()}
    return {"base": base, "experts": init.experts, "held_out": held_out}


class Merger:
    """The merged cache, ready to be written."""

    def __init__(self, first: CacheReader, splits: Sequence[SplitRows], manifest: Manifest) -> None:
        """Encode the static objects; `first` is the cache whose blocks and whose order of fields are kept."""
        self.nodes = (THUMBPRINT, *first.experts)
        static: dict[str, Any] = {}
        specs: list[tuple[ArraySpec, SplitLayout]] = []
        self._arrays: dict[tuple[str, str], list[str]] = {}
        for rows in splits:
            static |= static_values(rows)
            for node in self.nodes:
                found = node_specs(rows, node)
                self._arrays[rows.layout.name, node] = [spec.name for spec in found]
                specs += [(spec, rows.layout) for spec in found]
        view_blocks = {rows.layout.name: rows.layout.shard_views for rows in splits}
        self.objects: Objects = encode_group(static, specs, view_blocks)
        self.init = replace(
            first.init,
            base={**first.init.base, "manifest": manifest.fingerprint()},
            splits=tuple(rows.layout for rows in splits),
            objects=hash_objects(self.objects),
            environment=joined([source.reader.init.environment for rows in splits for source in rows.sources]),
        )
        self._fingerprints = self.init.fingerprints()

    def write_node(self, store: Store, rows: SplitRows, node: str) -> None:
        """Gather one node of one split and publish its shards."""
        split = rows.layout
        reasons, errors = unusable_reasons(rows, node), worst_errors(rows, node)
        with ExitStack() as stack:
            arrays = {
                name: gathered(rows, name, self.objects[f"{name}/zarr.json"], stack)
                for name in self._arrays[split.name, node]
            }
            for shard in split.shards():
                # Shards are encoded whole, and `shard.rows` ends at the last clip.
                padded = slice(shard.rows.start, shard.rows.start + split.shard_rows)
                views = slice(shard.views.start, shard.views.stop)
                blocks = {name: np.asarray(array[padded, views]) for name, array in arrays.items()}
                objects: Objects = {}
                for name, block in blocks.items():
                    metadata = self.objects[f"{name}/zarr.json"]
                    objects |= encode_block(name, metadata, start=(padded.start, views.start), block=block)
                record = CommitRecord(shard.name, node, self._fingerprints[node], hash_objects(objects))
                if node != THUMBPRINT:
                    status = blocks[status_array(split.name, node)]
                    unusable = tuple(unusable_rows(rows, shard, status, reasons))
                    worst = errors.get((shard.row_block, shard.view_block), {})
                    record = replace(record, unusable=unusable, worst_kl=worst)
                publish(store, shard, record, objects)


def static_values(rows: SplitRows) -> dict[str, Any]:
    """Return array name -> contents of one split's static arrays, each clip's values in its new row."""
    split = rows.layout.name
    prefix = f"{split}/"
    first = rows.sources[0].reader
    names = {array_of(key) for key in first.init.objects if "/c/" in key and key.startswith(prefix)}
    found: dict[str, Any] = {}
    for name in sorted(names):
        parts = [(source, source.reader.array(name)) for source in rows.sources]
        example = parts[0][1]
        # Nothing of it stays unset: match_split refuses a clip that is in no cache.
        whole = np.empty((rows.layout.rows, *example.shape[1:]), example.dtype)
        for source, values in parts:
            whole[source.rows] = values
        # O, T or U: what texts come as depends on the version of Zarr.
        found[name] = [str(value) for value in whole] if example.dtype.kind in "OTU" else whole
    return found


def node_specs(rows: SplitRows, node: str) -> list[ArraySpec]:
    """Return the sharded arrays of a node, as the caches have them, for the merged rows."""
    prefix, reader = f"{rows.layout.name}/{node}/", rows.sources[0].reader
    forms = [reader.form(name) for name in reader.arrays if name.startswith(prefix)]
    shape = (rows.layout.padded_rows, rows.layout.views)
    return [ArraySpec(form.name, (*shape, *form.shape[2:]), form.dtype.name, form.fill) for form in forms]


def gathered(rows: SplitRows, name: str, metadata: bytes, stack: ExitStack) -> npt.NDArray[Any]:
    """Return one sharded array of the merged cache, in a temporary file that goes with `stack`."""
    form = array_form(name, metadata)
    size_bytes = int(np.prod(form.shape)) * form.dtype.itemsize
    file = tempfile.TemporaryFile(prefix="mmkd-merge-")  # noqa: SIM115  the stack closes it
    stack.enter_context(file)
    try:
        os.posix_fallocate(file.fileno(), 0, size_bytes)  # a full disk says so now, not by a signal later
    except OSError as error:
        raise StorageError(
            f"cannot keep {size_bytes / 2**20:.0f} MiB in {tempfile.gettempdir()}: {error.strerror}; name another "
            "folder with TMPDIR"
        ) from error
    array: npt.NDArray[Any] = np.memmap(file, form.dtype, "r+", shape=form.shape)
    # A fresh file reads as zeros, which would mean results (Status.OK).
    array[rows.layout.rows :] = form.fill
    for source in rows.sources:
        for old_rows, views, values in source.reader.blocks(rows.layout.name, name):
            array[source.rows[old_rows], views] = values
    return array


def source_records(rows: SplitRows, node: str) -> Iterator[tuple[Source, Shard, CommitRecord]]:
    """Yield the commit records of one node of one split of every cache, with their shards."""
    for source in rows.sources:
        layout = source.reader.layouts[rows.layout.name]
        shards = {shard.name: shard for shard in layout.shards()}
        for record in source.reader.records:
            if record.node == node and record.shard in shards:
                yield source, shards[record.shard], record


def unusable_reasons(rows: SplitRows, node: str) -> dict[int, list[tuple[range, str]]]:
    """Return merged row -> (views, reason) of what the node has no result for."""
    found: dict[int, list[tuple[range, str]]] = {}
    for source, shard, record in source_records(rows, node):
        for item in record.unusable:
            found.setdefault(int(source.rows[item.row]), []).append((shard.views, item.reason))
    return found


def unusable_rows(
    rows: SplitRows, shard: Shard, status: npt.NDArray[np.uint8], reasons: Mapping[int, list[tuple[range, str]]]
) -> Iterator[Unusable]:
    """Yield the unusable clips of a merged shard, whose blocks of views may be other ones than before."""
    for row in shard.rows:
        worst = int(status[row - shard.rows.start].max())
        for views, reason in reasons.get(row, []):
            if worst != Status.OK and set(views) & set(shard.views):
                yield Unusable(row, rows.clip_ids[row], worst, reason)
                break


def worst_errors(rows: SplitRows, node: str) -> dict[tuple[int, int], dict[str, float]]:
    """Return (row block, view block) -> head -> the largest storage error of the shards that it comes from."""
    found: dict[tuple[int, int], dict[str, float]] = {}
    split = rows.layout
    for source, shard, record in source_records(rows, node):
        # The rows of one old shard may go to many new ones, and which of them had the error is not known.
        row_blocks = np.unique(source.rows[shard.rows.start : shard.rows.stop] // split.shard_rows).tolist()
        view_blocks = {view // split.shard_views for view in shard.views}
        for block in ((row_block, view_block) for row_block in row_blocks for view_block in view_blocks):
            errors = found.setdefault(block, {})
            for head, value in record.worst_kl.items():
                errors[head] = max(value, errors.get(head, 0.0))
    return found


def joined(environments: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Return the versions that the caches were made with, several of one package side by side."""
    names = dict.fromkeys(name for environment in environments for name in environment)
    return {
        name: ", ".join(dict.fromkeys(environment.get(name, "absent") for environment in environments))
        for name in names
    }
