"""The student's data: canonical RGB views of clips, with labels, for training and for prediction."""

from collections.abc import Mapping, Sequence
from copy import copy

import numpy as np

from mmkd.cache_tools.frames.clip_set import ClipVideo
from mmkd.cache_tools.frames.records import IntArray, UInt8Array
from mmkd.cache_tools.frames.source import FrameSource
from mmkd.cache_tools.views.canonical import canonical_view
from mmkd.data_manifests.manifest import Clip, Head
from mmkd.student.data.clip_reader import ClipReader
from mmkd.student.data.packed_clips import PackedClips
from mmkd.student.data.view_streams import ViewStream


class RGBViews:
    """A view data set of modality rgb (see mmkd.student.data.batches.ViewDataset)."""

    def __init__(
        self,
        source: FrameSource,
        clips: Sequence[ClipVideo],
        stream: ViewStream,
        *,
        heads: Sequence[Head],
        size_px: int,
        memory_bytes: int,
    ) -> None:
        """Serve views of `clips` from `stream`, keeping at most `memory_bytes` of decoded frames."""
        self._clips = clips
        self._reader = ClipReader(source, clips, memory_bytes=memory_bytes)
        self._stream = stream
        self._size_px = size_px
        self.rows = len(clips)
        self.views = stream.views
        self.clip_ids: Sequence[str] = [item.clip.clip_id for item in clips]
        self.labels: Mapping[str, IntArray] = label_arrays(clips, heads)

    def item(self, row: int, view: int) -> dict[str, UInt8Array]:
        """Return {"rgb": uint8 (T, S, S, 3)} of one view; raise VideoError when the clip cannot be read."""
        return self.items(row, [view])[0]

    def items(self, row: int, views: Sequence[int]) -> list[dict[str, UInt8Array]]:
        """Return several views of a clip, as `item`; it is decoded once."""
        wanted = [self._stream.view(row, view) for view in views]
        frames = self._reader.read(row, np.concatenate([view.frame_indices for view in wanted]))
        return [{"rgb": canonical_view(frames, view, self._size_px)} for view in wanted]

    @property
    def worth_processes(self) -> bool:
        """Whether reading takes long: clips are decoded again for each of their views."""
        return not self._reader.keeps_all

    def for_processes(self) -> "RGBViews":
        """Return the same views, without labels, in a form that other processes share and do not copy."""
        packed, clips = copy(self), PackedClips(self._clips)
        packed._clips, packed.clip_ids, packed.labels = clips, clips.clip_ids, {}
        packed._reader, packed._stream = self._reader.of(clips), self._stream.packed(clips)
        return packed


def label_arrays(clips: Sequence[ClipVideo], heads: Sequence[Head]) -> dict[str, IntArray]:
    """Return head -> int64 (rows,) labels, -1 where absent."""
    return label_numbers([item.clip for item in clips], heads)


def label_numbers(clips: Sequence[Clip], heads: Sequence[Head]) -> dict[str, IntArray]:
    """Return head -> int64 (rows,) labels of a manifest's clips, -1 where absent."""
    return {head.name: np.array([_number(clip.labels[head.name]) for clip in clips], np.int64) for head in heads}


def _number(label: int | None) -> int:
    return -1 if label is None else label
