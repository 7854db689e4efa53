"""Which rows of a cache are a manifest's clips: found by clip id, and named where they are not the same clips.

A cache keeps of each clip its id, labels, frames and the identity of its video. So a manifest of fewer clips, or of
the same ones in another order, is one for the same cache; evaluation groups are the manifest's own.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mmkd.cache_tools.cache.arrays import array_of, decode_array
from mmkd.cache_tools.cache.commits import read_verified
from mmkd.cache_tools.cache.fingerprints import differences
from mmkd.cache_tools.cache.init_record import CacheInit
from mmkd.cache_tools.frames.records import IntArray
from mmkd.cache_tools.layout import group_key, label_array
from mmkd.cache_tools.storage.store import Store
from mmkd.data_manifests.counted import counted
from mmkd.data_manifests.manifest import Clip, Manifest

NAMED_CLIPS = 3


@dataclass(frozen=True)
class StoredClips:
    """What a cache says of one split's clips, finished or not."""

    split: str
    """Name of the split."""
    clip_ids: tuple[str, ...]
    """(rows,) ids in row order."""
    labels: Mapping[str, IntArray]
    """Head -> int64 (rows,), -1 where absent."""

    def members(self, clips: Sequence[Clip]) -> npt.NDArray[np.bool_]:
        """Return (rows,) which rows are among the clips."""
        wanted = {clip.clip_id for clip in clips}
        return np.fromiter((clip_id in wanted for clip_id in self.clip_ids), np.bool_, len(self.clip_ids))

    def faults(self, clips: Sequence[Clip]) -> Iterator[str]:
        """Yield a line for clips that are not rows of the split, and one for those that have other labels."""
        rows = {clip_id: row for row, clip_id in enumerate(self.clip_ids)}
        if absent := [clip.clip_id for clip in clips if clip.clip_id not in rows]:
            yield f"the cache's split {self.split!r} lacks {named(absent)}"
        other = [
            clip.clip_id
            for clip in clips
            if (row := rows.get(clip.clip_id)) is not None and not self._has_labels(row, clip.labels)
        ]
        if other:
            yield f"the cache has other labels for {named(other)}"

    def _has_labels(self, row: int, labels: Mapping[str, int | None]) -> bool:
        own = {head: None if values[row] < 0 else values[row] for head, values in self.labels.items()}
        return all(own[head] == label for head, label in labels.items() if head in own)


def stored_clips(store: Store, init: CacheInit, split: str) -> StoredClips:
    """Read a split's ids and labels; raise VerificationError when they are damaged or not written yet."""
    ids = tuple(str(clip_id) for clip_id in static_array(store, init, f"{split}/clip_id"))
    labels = {head: static_array(store, init, label_array(split, head)) for head in init.base["heads"]}
    return StoredClips(split, ids, labels)


def static_array(store: Store, init: CacheInit, name: str) -> npt.NDArray[Any]:
    """Read an array that the start wrote; raise VerificationError when it is damaged or not written yet."""
    keys = [key for key in init.objects if array_of(key) == name]
    return decode_array(name, {key: read_verified(store, group_key(key), init.objects[key]) for key in keys})


def subset_faults(store: Store, init: CacheInit, manifest: Manifest) -> list[str]:
    """Return why a manifest is not one of the cache's clips, some or all, in any order; nothing when it is."""
    shared = [split for split in init.layouts() if split in manifest.splits]
    if not shared:
        return [f"it has splits {', '.join(manifest.splits)}, the cache {', '.join(init.layouts())}"]
    return [line for split in shared for line in stored_clips(store, init, split).faults(manifest.split(split))]


def changed_clips(store: Store, init: CacheInit, manifest: Manifest) -> list[str]:
    """Return in words why a manifest is not the one that a cache was built from, naming clips where it can."""
    lines = []
    for split in init.layouts():
        if split not in manifest.splits:
            lines.append(f"the manifest has no split {split!r}")
            continue
        stored, clips = stored_clips(store, init, split), manifest.split(split)
        lines += stored.faults(clips)
        own = {clip.clip_id for clip in clips}
        if gone := [clip_id for clip_id in stored.clip_ids if clip_id not in own]:
            lines.append(f"the manifest's split {split!r} lacks {named(gone)}")
        # Said when nothing else differs: beside missing clips or other labels it would help nobody.
        elif not lines and tuple(clip.clip_id for clip in clips) != stored.clip_ids:
            lines.append(f"the clips of split {split!r} stand in another order")
    # Of everything else in its manifest a cache has nothing but the one hash.
    return lines or ["video paths, times, groups or further splits of the manifest differ"]


def base_differences(store: Store, init: CacheInit, base: Mapping[str, Any], manifest: Manifest) -> Iterator[str]:
    """Yield one line for each field of a cache's base node that differs, with clips for the manifest's hash."""
    rest = [{key: value for key, value in fields.items() if key != "manifest"} for fields in (init.base, base)]
    yield from differences({"base": rest[0]}, {"base": rest[1]})
    if init.manifest != base["manifest"]:
        yield f"the manifest: {'; '.join(changed_clips(store, init, manifest))}"


def named(clip_ids: Sequence[str]) -> str:
    """Return a few ids and how many there are: "clip 'a'", "4 clips ('a', 'b', 'c', ...)"."""
    if len(clip_ids) == 1:
        return f"clip {clip_ids[0]!r}"
    names = ", ".join(map(repr, clip_ids[:NAMED_CLIPS]))
    return f"{counted(len(clip_ids), 'clip')} ({names}{', ...' if len(clip_ids) > NAMED_CLIPS else ''})"
