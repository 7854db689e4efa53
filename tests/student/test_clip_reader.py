"""Random access to clips: what is kept in memory, what is read again, and what a failure costs."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from mmkd.cache_tools.frames.clip_set import ClipVideo
from mmkd.cache_tools.frames.records import ClipFacts, ClipFrames, VideoFacts
from mmkd.data_manifests.errors import VideoError
from mmkd.data_manifests.manifest import Clip
from mmkd.student.data.clip_reader import ClipReader

FRAME_BYTES = 4 * 2 * 3


class CountingSource:
    """Frames that show their video and number; notes every read; the first `meeting` are made at once."""

    def __init__(self, *, broken: set[int] = frozenset(), meeting: int = 0) -> None:
        self.reads: list[tuple[str, list[int]]] = []
        self._broken, self._meeting = broken, meeting
        self._barrier = threading.Barrier(meeting) if meeting else None

    def probe(self, video: str) -> VideoFacts:
        raise NotImplementedError

    def read(self, video, frame_indices, facts):
        self.reads.append((video, frame_indices.tolist()))
        if len(self.reads) <= self._meeting:
            self._barrier.wait(60)
        if self._broken & set(frame_indices.tolist()):
            raise VideoError("cannot decode")
        frames = np.zeros((len(frame_indices), 2, 4, 3), np.uint8)
        frames[..., 0], frames[..., 1] = int(video), frame_indices[:, None, None]
        return ClipFrames(frames, frame_indices, frame_indices / 10)


def clip_videos(count=3, frames=5, first=2):
    facts = VideoFacts(4, 2, np.arange(20) / 10, "pyav", "x")
    clips = [Clip(f"c{n}", str(n), "train", {"action": 0}) for n in range(count)]
    return [ClipVideo(clip, facts, ClipFacts(4, 2, first, frames)) for clip in clips]


def check(reader, row, indices):
    wanted = np.array(indices)
    selected = reader.read(row, wanted).select(wanted)
    assert (selected[..., 0] == row).all()
    np.testing.assert_array_equal(selected[:, 0, 0, 1], wanted)


def test_without_a_budget_just_the_wanted_frames_are_read_each_time():
    source = CountingSource()
    reader = ClipReader(source, clip_videos(), memory_bytes=0)
    for _ in range(2):
        check(reader, 1, [6, 2, 2, 4])
    assert source.reads == [("1", [2, 4, 6])] * 2


def test_a_clip_is_read_whole_once_while_the_budget_lasts():
    source = CountingSource()
    reader = ClipReader(source, clip_videos(), memory_bytes=2 * 5 * FRAME_BYTES)
    for _ in range(3):
        for row in range(3):
            check(reader, row, [3, 6])
    whole = [2, 3, 4, 5, 6]
    assert source.reads == [("0", whole), ("1", whole), ("2", [3, 6]), ("2", [3, 6]), ("2", [3, 6])]


def test_a_clip_that_does_not_fit_leaves_room_for_smaller_ones():
    items = clip_videos(1, frames=9) + clip_videos(2)[1:]
    source = CountingSource()
    reader = ClipReader(source, items, memory_bytes=5 * FRAME_BYTES)
    for row in (0, 1, 0, 1):
        check(reader, row, [4])
    assert source.reads == [("0", [4]), ("1", [2, 3, 4, 5, 6]), ("0", [4])]


def test_threads_that_want_the_same_clip_pay_for_it_once():
    source = CountingSource(meeting=4)
    reader = ClipReader(source, clip_videos(), memory_bytes=2 * 5 * FRAME_BYTES)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: check(reader, 0, [3]), range(4)))
    assert sorted(len(indices) for _, indices in source.reads) == [1, 1, 1, 5]
    check(reader, 1, [3])
    assert source.reads[-1] == ("1", [2, 3, 4, 5, 6]), "the budget still has room for a second clip"


def test_a_bad_frame_elsewhere_in_the_clip_costs_neither_the_view_nor_the_budget():
    source = CountingSource(broken={5})
    reader = ClipReader(source, clip_videos()[:1] + clip_videos(2, first=6)[1:], memory_bytes=5 * FRAME_BYTES)
    for _ in range(2):
        check(reader, 0, [2, 6])
    assert source.reads == [("0", [2, 3, 4, 5, 6]), ("0", [2, 6]), ("0", [2, 6])]
    check(reader, 1, [7])
    check(reader, 1, [8])
    assert source.reads[3:] == [("1", [6, 7, 8, 9, 10])]


def test_a_wanted_frame_that_cannot_be_read_is_an_error_each_time():
    reader = ClipReader(CountingSource(broken={5}), clip_videos(), memory_bytes=10**6)
    for _ in range(2):
        with pytest.raises(VideoError, match="cannot decode"):
            reader.read(0, np.array([4, 5]))
