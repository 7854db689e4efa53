"""Joining a cache, a manifest and RGB videos, by clip id, for training and for evaluation."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mmkd.cache_tools.cache.clip_rows import named, subset_faults
from mmkd.cache_tools.cache.reader import CacheReader
from mmkd.cache_tools.cache.split_table import SplitTable
from mmkd.cache_tools.frames.clip_set import ClipSet, ClipVideo
from mmkd.cache_tools.frames.records import IntArray
from mmkd.cache_tools.layout import Status
from mmkd.cache_tools.views.drawing import ViewPolicy
from mmkd.data_manifests.errors import InputError, VerificationError, VideoError
from mmkd.data_manifests.manifest import Manifest
from mmkd.student.data.rgb_views import RGBViews
from mmkd.student.data.view_streams import DrawnViews, StoredViews, ViewStream


@dataclass(frozen=True)
class SplitData:
    """The usable clips of one split, ready to be read."""

    table: SplitTable
    """What the cache says of the split."""
    rows: IntArray
    """(n,) rows of the table, one for each row of `data`."""
    clips: tuple[ClipVideo, ...]
    """(n,) their clips."""
    data: RGBViews
    """Their views."""
    left_out: int
    """Clips of the split that cannot be read, now or when the cache was built."""


def check_manifest(reader: CacheReader, manifest: Manifest) -> None:
    """Raise InputError, naming what differs, unless the manifest is of the cache's clips and classes.

    It may have some of the clips alone, in any order, and groups of its own; videos and times are compared when a
    split is opened.
    """
    heads = {head.name: list(head.classes) for head in manifest.heads}
    if reader.dataset != manifest.dataset:
        raise InputError(f"the cache is of data set {reader.dataset!r}, the manifest of {manifest.dataset!r}")
    if reader.init.base["heads"] != heads:
        raise InputError("the cache was made for other classes than the manifest's (names or order differ)")
    if not is_whole(reader, manifest):
        faults = subset_faults(reader.store, reader.init, manifest)
        if faults:
            raise InputError(
                f"the manifest is not of the cache's clips: {'; '.join(faults)}. Give the manifest that the cache "
                "was built from, or a part of it, or build a cache for this one"
            )


def is_whole(reader: CacheReader, manifest: Manifest) -> bool:
    """Return whether the manifest is the very one that the cache was built from."""
    return reader.init.manifest == manifest.fingerprint()


def open_split(
    reader: CacheReader,
    clip_set: ClipSet,
    split: str,
    *,
    memory_bytes: int,
    fresh_views: bool = False,
    only: Collection[str] | None = None,
) -> SplitData:
    """Open the manifest's clips of a split that the teacher's build could read, under their stored views.

    They come in the order of the cache, whatever the manifest's. `fresh_views` draws a new view every epoch by the
    cache's policy instead. With `only` (ids) the other clips are passed over. Raises VerificationError when a
    video is not the one that the cache was built from, or cannot be read any more, InputError when a clip's times
    are not the cache's.
    """
    table = reader.split(split)
    by_id = {clip.clip_id: clip for clip in clip_set.manifest.split(split) if only is None or clip.clip_id in only}
    wanted = np.fromiter((clip_id in by_id for clip_id in table.clip_ids), np.bool_, table.rows)
    rows = np.flatnonzero(wanted & usable_rows(reader, table))
    if not len(rows):
        raise InputError(f"no clip of split {split!r} is usable; see `mmkd-cache inspect`")
    found = clip_set.probe([by_id[table.clip_ids[row]] for row in rows])
    identities = reader.array(f"{split}/video_identity")
    clips = tuple(
        same_video(item, table.clip_ids[row], str(identities[row])) for row, item in zip(rows, found, strict=True)
    )
    if not is_whole(reader, clip_set.manifest):
        refuse_other_times(reader, table, rows, clips, clip_set.manifest)
    policy = reader.init.policy
    stream: ViewStream = StoredViews(table, rows.tolist())
    if fresh_views:
        stream = fresh_stream(reader, clip_set.manifest, clips, policy)
    data = RGBViews(
        clip_set.source,
        clips,
        stream,
        heads=reader.heads,
        size_px=policy.size_px,
        memory_bytes=memory_bytes,
    )
    return SplitData(table, rows, clips, data, int(wanted.sum()) - len(rows))


def refuse_other_times(
    reader: CacheReader, table: SplitTable, rows: IntArray, clips: Sequence[ClipVideo], manifest: Manifest
) -> None:
    """Raise InputError for clips of another manifest that are other frames of their videos, or other flips."""
    other = [
        item.clip.clip_id for row, item in zip(rows, clips, strict=True) if item.facts != table.clip_facts(row)
    ]
    if other:
        raise InputError(
            f"the manifest has other times than the cache for {named(other)}; take start_seconds and end_seconds "
            "from the manifest that the cache was built from"
        )
    if table.drawn.flip.any() and not manifest.flip_allowed:
        raise InputError("the cache holds flipped views, and the manifest says flip_allowed: false")


def usable_rows(reader: CacheReader, table: SplitTable) -> npt.NDArray[np.bool_]:
    """Return (rows,) whether a clip could be decoded when the cache was built, whatever the experts made of it."""
    status = reader.status(table.name, reader.experts[0])
    mask: npt.NDArray[np.bool_] = table.readable & (status != Status.DECODE_FAILED).all(axis=1)
    return mask


def same_video(item: ClipVideo | VideoError, clip_id: str, identity: str) -> ClipVideo:
    """Return the clip when its video is still the one that the teacher saw; else raise VerificationError."""
    if isinstance(item, VideoError):
        raise VerificationError(f"clip {clip_id!r} could be read when the cache was built, and now: {item}")
    if item.video.identity != identity:
        raise VerificationError(
            f"clip {clip_id!r}: the video {item.clip.video} is not the file that the cache was built from; "
            "restore it, or build the cache again"
        )
    return item


def fresh_stream(
    reader: CacheReader, manifest: Manifest, clips: Sequence[ClipVideo], policy: ViewPolicy
) -> DrawnViews:
    """Return views that are new in every epoch, drawn as the cache's were."""
    return DrawnViews(
        clips,
        policy,
        dataset=reader.dataset,
        seed=reader.init.view_seed,
        flip_allowed=manifest.flip_allowed,
        views=None,
    )
