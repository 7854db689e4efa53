"""Which row of a merged cache each row of the caches becomes: the manifest's order, and every clip exactly once."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmkd.cache_tools.cache.fingerprints import require_same
from mmkd.cache_tools.cache.reader import CacheReader
from mmkd.cache_tools.cache.split_table import SplitTable
from mmkd.cache_tools.frames.records import IntArray
from mmkd.cache_tools.layout import SplitLayout
from mmkd.cache_tools.views.drawing import evaluation_views, random_views
from mmkd.cache_tools.views.view import View
from mmkd.data_manifests.counted import ARE, counted
from mmkd.data_manifests.errors import InputError
from mmkd.data_manifests.manifest import Clip, Manifest

SAMPLED_ROWS = 256
"""Rows of each cache's split whose views are drawn again."""


@dataclass(frozen=True)
class Source:
    """One cache's part of a merged split."""

    reader: CacheReader
    """The cache."""
    rows: IntArray
    """(its rows,) the merged row of each."""


@dataclass(frozen=True)
class SplitRows:
    """One merged split."""

    layout: SplitLayout
    """Rows, views and blocks: as the first cache that has the split."""
    clip_ids: tuple[str, ...]
    """(rows,) ids in the manifest's order."""
    sources: tuple[Source, ...]
    """The caches that have clips of it."""


def match_rows(readers: Sequence[CacheReader], manifest: Manifest) -> tuple[SplitRows, ...]:
    """Return the merged splits in the manifest's order.

    Raises InputError, naming clip and cache, for a clip that is in two caches or in none, that the manifest lacks
    or has in another split, or whose label or views are not the manifest's; FingerprintError for splits whose
    numbers of views differ.
    """
    by_id = {clip.clip_id: clip for clip in manifest.clips}
    owners: dict[str, CacheReader] = {}
    parts: dict[str, list[tuple[CacheReader, SplitTable]]] = {}
    for reader in readers:
        for split in reader.layouts:
            table = reader.split(split)
            check_table(reader, table, by_id, manifest)
            parts.setdefault(split, []).append((reader, table))
            for clip_id in table.clip_ids:
                if clip_id in owners:
                    places = f"{owners[clip_id].store.locate()} and {reader.store.locate()}"
                    raise InputError(f"clip {clip_id!r} is in both {places}; merge caches over disjoint clips")
                owners[clip_id] = reader
    return tuple(match_split(split, parts[split], manifest) for split in manifest.splits if split in parts)


def match_split(split: str, parts: Sequence[tuple[CacheReader, SplitTable]], manifest: Manifest) -> SplitRows:
    """Return one merged split of the caches that have it; every clip that the manifest has in it must be in one."""
    clip_ids = tuple(clip.clip_id for clip in manifest.split(split))
    owned = {clip_id for _, table in parts for clip_id in table.clip_ids}
    missing = [clip_id for clip_id in clip_ids if clip_id not in owned]
    if missing:
        raise InputError(
            f"{counted(len(missing), 'clip')} of the manifest's split {split!r} "
            f"{ARE[len(missing) != 1]} in none of the caches, the first is "
            f"{missing[0]!r}; give the cache that has them, or a manifest without them"
        )
    first = parts[0][0].layout(split)
    for reader, table in parts[1:]:
        require_same(
            {"views": first.views},
            {"views": table.views},
            what=f"{reader.store.locate()}: split {split!r}",
            advice="Build the missing views first",
        )
    place = {clip_id: row for row, clip_id in enumerate(clip_ids)}
    layout = SplitLayout(split, len(clip_ids), first.views, first.shard_rows, first.shard_views)
    sources = (Source(reader, np.array([place[name] for name in table.clip_ids])) for reader, table in parts)
    return SplitRows(layout, clip_ids, tuple(sources))


def check_table(reader: CacheReader, table: SplitTable, by_id: dict[str, Clip], manifest: Manifest) -> None:
    """Raise InputError unless the manifest has a cache's clips in that split, with the same labels and views."""
    where = reader.store.locate()
    for row, clip_id in enumerate(table.clip_ids):
        clip = by_id.get(clip_id)
        if clip is None or clip.split != table.name:
            has = "lacks it" if clip is None else f"has it in {clip.split!r}"
            raise InputError(f"{where}: clip {clip_id!r} is of split {table.name!r}, the manifest {has}")
        for head, labels in table.labels.items():
            label = clip.labels[head]
            if int(labels[row]) != (-1 if label is None else label):
                raise InputError(f"{where}: clip {clip_id!r} has {head} label {labels[row]}, the manifest {label}")
    # A sample is enough: another flip_allowed changes about every second random view.
    readable = np.flatnonzero(table.readable)
    sample = readable[np.unique(np.linspace(0, len(readable) - 1, min(len(readable), SAMPLED_ROWS)).astype(int))]
    for row in sample.tolist():
        drawn = draw(reader, table, row, manifest)
        timed = reader.init.policy.is_timed
        if not all(same_view(view, table.view(row, number), timed=timed) for number, view in enumerate(drawn)):
            raise InputError(
                f"{where}: the views of clip {table.clip_ids[row]!r} are not those that this manifest gives (its "
                "flip_allowed differs?); give the manifest that the caches' own are parts of"
            )


def draw(reader: CacheReader, table: SplitTable, row: int, manifest: Manifest) -> tuple[View, ...]:
    """Return the views that a build over the manifest would give a stored clip."""
    policy, facts = reader.init.policy, table.clip_facts(row)
    # A cache holds no times: of views by seconds only crop and flip are compared, which do not depend on them.
    times = np.arange(facts.frame_count, dtype=np.float64) if policy.is_timed else None
    if table.name != reader.init.train_split:
        return evaluation_views(facts, policy, times)
    return random_views(
        facts,
        policy,
        dataset=manifest.dataset,
        clip_id=table.clip_ids[row],
        seed=reader.init.view_seed,
        flip_allowed=manifest.flip_allowed,
        numbers=range(table.views),
        times_seconds=times,
    )


def same_view(one: View, other: View, *, timed: bool) -> bool:
    """Return whether two views show the same; of views by seconds, whether their windows are the same."""
    same = timed or np.array_equal(one.frame_indices, other.frame_indices)
    return same and (one.crop_xywh, one.flip) == (other.crop_xywh, other.flip)
