"""Clips joined with the facts of their videos: a table that gives what `clip_facts` gives, one by one."""

import numpy as np
import pytest

from mmkd.cache_tools import data
from mmkd.cache_tools.frames import clip_facts
from mmkd.cache_tools.records import ClipFacts, VideoFacts, facts_table
from mmkd.data_manifests.errors import VideoError
from mmkd.data_manifests.records import Clip

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
