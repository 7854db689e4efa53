"""Clips joined with the facts of their videos: a table that gives what `clip_facts` gives, one by one."""

import numpy as np
import pytest

from mmkd.cache_tools.frames import clip_set as data
from mmkd.cache_tools.frames.records import ClipFacts, VideoFacts, facts_table
from mmkd.cache_tools.frames.source import clip_facts
from mmkd.data_manifests.errors import VideoError
from mmkd.data_manifests.manifest import Clip

SPANS = [(0, 0.35), (0.2, 1.1), (0, 0.31), (0, 0.35), (0.5, None), (0, None)]


def facts_of(rate: float) -> VideoFacts:
    return VideoFacts(64, 48, np.arange(10) / rate, "pyav", "x")


def clip(number: int, video: str, start: float = 0.0, end: float | None = None) -> Clip:
    return Clip(str(number), video, "train", {}, start_seconds=start, end_seconds=end)


@pytest.fixture
def videos():
    return {
        "v.webm": facts_of(10),
        "w.webm": facts_of(5),
        "x.webm": facts_of(5),
        "bad.webm": VideoError("cut short"),
    }


@pytest.fixture
def clips():
    made = [
        clip(2 * n + (video > "v.webm"), video, *span)
        for n, span in enumerate(SPANS)
        for video in ("v.webm", "w.webm")
    ]
    return [*made, clip(90, "bad.webm", 0.1, 0.2), clip(91, "x.webm", 0.1)]


def test_each_row_is_its_clip_with_its_video_and_facts(clips, videos):
    items = data.clip_videos(clips, videos)
    assert len(items) == len(clips) == 14
    assert items[-2] is videos["bad.webm"]
    for item, own in zip(items, clips, strict=True):
        if own.video != "bad.webm":
            assert (item.clip, item.video) == (own, videos[own.video])
            assert item.facts == clip_facts(own, videos[own.video])
            assert all(type(value) is int for value in (item.facts.width, item.facts.first_frame))
    np.testing.assert_array_equal(
        items.facts, facts_table([None if isinstance(item, VideoError) else item.facts for item in items])
    )
    assert facts_table([None, ClipFacts(64, 48, 2, 7)]).tolist() == [[0, 0, 0, 0], [64, 48, 2, 7]]


def test_the_frame_interval_is_computed_once_a_video_and_not_for_whole_videos(clips, videos, monkeypatch):
    """The median over all frames of an hour's video takes milliseconds, and EPIC has hundreds of clips in one."""
    asked = []
    median = data.frame_interval_seconds
    monkeypatch.setattr(data, "frame_interval_seconds", lambda facts: asked.append(facts) or median(facts))
    data.clip_videos(clips, videos)
    assert asked == [videos["v.webm"], videos["w.webm"]]


@pytest.mark.parametrize(
    ("start", "end", "clipped", "reason"),
    [
        (0.5, 1.6, 5, "segment outside the video: it ends at 1.6 s, the video at 1.000 s; data.clip_segments=true"),
        (0.0, 99, 10, "segment outside the video"),
        (1.5, 1.7, None, "segment outside the video"),
        (0.5, 0.5, None, "segment without a frame: no frame from 0.5 s to 0.5 s"),
        (0.51, 0.52, None, "segment without a frame"),
        (7.0, None, None, "segment without a frame"),
    ],
)
def test_a_segment_outside_its_video_is_that_clips_fault_alone(start, end, clipped, reason):
    videos = {"v.webm": facts_of(10)}
    clips = [clip(0, "v.webm", 0.0, 0.4), clip(1, "v.webm", start, end), clip(2, "v.webm")]
    for clip_segments in (False, True):
        before, item, after = data.clip_videos(clips, videos, clip_segments=clip_segments)
        assert (before.facts.frame_count, after.facts.frame_count) == (4, 10)
        if clip_segments and clipped:
            assert item.facts.first_frame + item.facts.frame_count == 10
            assert item.facts.frame_count == clipped
        else:
            assert isinstance(item, VideoError)
            assert ("no frame" if clip_segments else reason) in str(item)


def test_what_cannot_be_used_is_counted_by_reason_in_one_line():
    found = {
        "a": facts_of(10),
        "b": VideoError("video not found: b"),
        "c": VideoError("video not found: c"),
        "d": VideoError("frames of 9000 x 10 pixels; the limit is 5 pixels"),
        "e": VideoError("frames of 8000 x 10 pixels; the limit is 5 pixels"),
    }
    train = data.clip_videos([clip(n, video) for n, video in enumerate("aabbcd")], found)
    test = data.clip_videos([clip(n, video) for n, video in enumerate("be", 6)], found)
    assert data.unusable_line([train, test]) == (
        "6 of 8 clips, in 4 of 5 videos, cannot be used (video not found: 4 clips of 2 videos; frames of N x N "
        "pixels: 2 clips of 2 videos)"
    )
    assert data.unusable_line([data.clip_videos([clip(0, "a")], found)]) is None
