"""Random access to clips while training: exact frames, kept decoded while a memory budget lasts."""

import threading
from collections.abc import Sequence

import numpy as np

from mmkd.cache_tools.data import ClipVideo
from mmkd.cache_tools.frames import FrameSource
from mmkd.cache_tools.records import ClipFrames, IntArray


class ClipReader:
    """Reads the frames of clips by row; small data sets are decoded once and then served from memory.

    A clip is kept whole (all its frames, at the video's own size) as long as the budget lasts; nothing is
    evicted, since random access would evict just what comes next. Safe to call from several threads.
    """

    def __init__(self, source: FrameSource, clips: Sequence[ClipVideo], *, memory_bytes: int) -> None:
        """Serve `clips` by position from `source`, keeping at most `memory_bytes` of decoded frames."""
        self._source = source
        self._clips = clips
        self._free_bytes = memory_bytes
        self._kept: dict[int, ClipFrames] = {}
        self._lock = threading.Lock()

    def read(self, row: int, frame_indices: IntArray) -> ClipFrames:
        """Return frames that contain `frame_indices` (which may repeat); raise VideoError when unreadable."""
        kept = self._kept.get(row)
        if kept is not None:
            return kept
        item = self._clips[row]
        size = item.facts.width * item.facts.height * 3 * item.facts.frame_count
        with self._lock:
            keep = size <= self._free_bytes and row not in self._kept
            self._free_bytes -= size if keep else 0
        if not keep:
            return self._source.read(item.clip.video, np.unique(frame_indices), item.video)
        whole = np.arange(item.facts.first_frame, item.facts.first_frame + item.facts.frame_count)
        frames = self._source.read(item.clip.video, whole, item.video)
        self._kept[row] = frames
        return frames
