"""Random access to clips while training: exact frames, kept decoded while a memory budget lasts."""

import threading
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from mmkd.cache_tools.frames.clip_set import ClipVideo
from mmkd.cache_tools.frames.records import ClipFrames, IntArray
from mmkd.cache_tools.frames.source import FrameSource
from mmkd.data_manifests.errors import VideoError


class ClipReader:
    """Reads the frames of clips by row; small data sets are decoded once and then served from memory.

    A clip is kept whole (all its frames, at the video's own size) as long as the budget lasts; nothing is
    evicted, since random access would evict just what comes next. Safe to call from several threads.
    """

    def __init__(self, source: FrameSource, clips: Sequence[ClipVideo], *, memory_bytes: int) -> None:
        """Serve `clips` by position from `source`, keeping at most `memory_bytes` of decoded frames."""
        self._source = source
        self._clips = clips
        self._memory_bytes = self._free_bytes = memory_bytes
        self._kept: dict[int, ClipFrames] = {}
        self._tried: set[int] = set()
        """Rows that are kept, being read to be kept, or could not be."""
        self._lock = threading.Lock()

    def of(self, clips: Sequence[ClipVideo]) -> "ClipReader":
        """Return a reader of the same clips in another form, which keeps nothing decoded."""
        return ClipReader(self._source, clips, memory_bytes=0)

    def __reduce__(self) -> tuple[Any, ...]:
        """Send what is read, and nothing that is kept."""
        return partial(ClipReader, memory_bytes=0), (self._source, self._clips)

    @property
    def keeps_all(self) -> bool:
        """Whether the budget holds every clip."""
        return sum(map(self._size_bytes, range(len(self._clips)))) <= self._memory_bytes

    def read(self, row: int, frame_indices: IntArray) -> ClipFrames:
        """Return frames that contain `frame_indices` (which may repeat); raise VideoError when unreadable."""
        kept = self._kept.get(row)
        if kept is not None:
            return kept
        item = self._clips[row]
        if self._claim(row):
            whole = np.arange(item.facts.first_frame, item.facts.first_frame + item.facts.frame_count)
            try:
                frames = self._source.read(item.clip.video, whole, item.video)
            except VideoError:
                # The frames that were asked for may be readable all the same, as they were for the teacher.
                with self._lock:
                    self._free_bytes += self._size_bytes(row)
            else:
                self._kept[row] = frames
                return frames
        return self._source.read(item.clip.video, np.unique(frame_indices), item.video)

    def _claim(self, row: int) -> bool:
        """Return whether the caller shall read the whole clip and keep it; its bytes are then taken."""
        size = self._size_bytes(row)
        with self._lock:
            if row in self._tried or size > self._free_bytes:
                return False
            self._tried.add(row)
            self._free_bytes -= size
            return True

    def _size_bytes(self, row: int) -> int:
        facts = self._clips[row].facts
        return facts.width * facts.height * 3 * facts.frame_count
