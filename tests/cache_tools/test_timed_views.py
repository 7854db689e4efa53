"""Dense views by the clock: the authors' frames at a constant rate, the nearest in time at any other."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from mmkd.cache_tools.frames.clip_set import ClipVideos
from mmkd.cache_tools.frames.records import ClipFacts, VideoFacts, facts_table
from mmkd.cache_tools.views.coverage import short_views_line
from mmkd.cache_tools.views.drawing import ViewPolicy, evaluation_views, random_views
from mmkd.cache_tools.views.timed import start_count, timed_offsets
from mmkd.data_manifests.errors import VideoError
from mmkd.data_manifests.manifest import Clip

KEY = {"dataset": "epic", "clip_id": "P01_11_0", "seed": 0, "flip_allowed": False}
quick = settings(deadline=None, database=None, derandomize=True, max_examples=100)


def at_rate(count, fps, first=0):
    """Times of a clip's frames, as a container with a time base of 1/90000 s would round them."""
    return np.round((first + np.arange(count)) / fps * 90000) / 90000


def authors_indices(length, frames, stride, clips, index=None, start=None):
    """The authors' strided sampling, written from their code's rule: offsets, and a clip that is too short."""
    ticks = (length - frames * stride + 1) // clips
    if start is None:
        start = max(0, (length - frames * stride + 1) * (2 * index + 1) // (2 * clips)) if ticks > 0 else 0
    sampled = []
    for step in range(frames):
        frame = start + step * stride
        sampled.append(frame if frame < length else sampled[-1])
    return sampled


@quick
@given(
    length=st.integers(1, 400),
    stride=st.integers(1, 12),
    fps=st.sampled_from([29.97, 50, 59.94, 60, 90]),
    clips=st.integers(1, 4),
)
def test_at_a_constant_rate_evaluation_takes_the_authors_frames(length, stride, fps, clips):
    policy = ViewPolicy(sampling="dense", frames=8, seconds_between_frames=stride / fps, evaluation_clips=clips)
    facts, times = ClipFacts(64, 48, 100, length), at_rate(length, fps, 100)
    found = [view.frame_indices - 100 for view in evaluation_views(facts, policy, times)]
    wanted = [authors_indices(length, 8, stride, clips, index) for index in range(clips)]
    assert [own.tolist() for own in found] == wanted


@pytest.mark.parametrize("fps", [29.97, 59.94, 90])
def test_a_view_covers_the_same_time_at_every_rate(fps):
    policy = ViewPolicy(sampling="dense", frames=8, seconds_between_frames=0.25)
    times = at_rate(int(10 * fps), fps)
    for view in random_views(
        ClipFacts(64, 48, 0, len(times)), policy, **KEY, numbers=range(20), times_seconds=times
    ):
        seen = times[view.frame_indices]
        assert np.abs(np.diff(seen) - 0.25).max() <= 1 / fps + 1e-4
        assert seen[-1] - seen[0] == pytest.approx(7 * 0.25, abs=0.5 / fps + 1e-4)


def test_every_start_that_fits_is_drawn_and_no_other():
    policy = ViewPolicy(sampling="dense", frames=4, seconds_between_frames=0.1)
    times = at_rate(20, 30)  # stride 3: 20 - 4 * 3 + 1 starts
    views = random_views(ClipFacts(64, 48, 7, 20), policy, **KEY, numbers=range(300), times_seconds=times)
    assert {int(view.frame_indices[0]) for view in views} == set(range(7, 7 + 9))
    assert all((np.diff(view.frame_indices) == 3).all() for view in views)


def test_a_short_clip_repeats_its_last_sampled_frame():
    policy = ViewPolicy(sampling="dense", frames=8, seconds_between_frames=8 / 60)
    times = at_rate(20, 60)
    (view,) = evaluation_views(ClipFacts(64, 48, 0, 20), policy, times)
    assert view.frame_indices.tolist() == [0, 8, 16, 16, 16, 16, 16, 16]  # not 19, the clip's last


def test_frames_at_irregular_times_are_the_nearest_ones():
    times = np.array([0.0, 0.1, 0.15, 0.5, 0.55, 0.6, 1.2])
    assert timed_offsets(times, np.array([0]), frames=4, seconds_between_frames=0.2).tolist() == [[0, 2, 3, 5]]


def test_of_two_frames_equally_near_the_earlier_is_taken():
    times = np.arange(8) / 10
    assert timed_offsets(times, np.array(0), frames=4, seconds_between_frames=0.15).tolist() == [0, 1, 3, 4]


def test_a_clip_of_one_frame_is_that_frame():
    one = np.array([3.0])
    assert start_count(one, frames=8, seconds_between_frames=0.1) == 1
    assert timed_offsets(one, np.array([0]), frames=3, seconds_between_frames=0.1).tolist() == [[0, 0, 0]]


def test_views_by_seconds_need_times():
    policy = ViewPolicy(sampling="dense", frames=2, seconds_between_frames=0.1)
    with pytest.raises(ValueError, match="need the times"):
        evaluation_views(ClipFacts(64, 48, 0, 5), policy)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sampling": "uniform", "seconds_between_frames": 0.1}, "needs sampling: dense"),
        ({"sampling": "dense", "stride": 8, "seconds_between_frames": 0.1}, "not both"),
    ],
)
def test_a_distance_is_stated_once_and_for_dense_views(values, message):
    with pytest.raises(ValidationError, match=message):
        ViewPolicy(**values)


def test_the_identity_of_views_by_frames_is_what_it_was():
    fields = {"sampling", "frames", "stride", "size_px", "scale", "evaluation_crops", "evaluation_clips"}
    assert set(ViewPolicy(sampling="dense").identity()) == fields
    timed = ViewPolicy(sampling="dense", seconds_between_frames=0.1)
    assert ViewPolicy.model_validate(timed.identity()) == timed
    assert timed.identity()["seconds_between_frames"] == 0.1


def clips_at(fps, seconds):
    times = at_rate(int(seconds * fps), fps)
    video = VideoFacts(64, 48, times, "pyav", f"{fps}")
    facts = facts_table([ClipFacts(64, 48, 0, len(times)), None])
    clips = [Clip("a", "a.mp4", "train", {"action": 0}), Clip("b", "b.mp4", "train", {"action": 0})]
    return ClipVideos(clips, [video, VideoError("video not found")], facts)


@pytest.mark.parametrize(
    ("policy", "fps", "seconds", "line"),
    [
        ({"stride": 8}, 60, 10, None),  # the authors': 1.07 s
        ({"stride": 8}, 90, 10, "a view covers less than 1 s of 1 of 1 clip (the least: 0.71 s)"),
        ({"stride": 8}, 90, 0.5, None),  # the clip is no longer than the view
        ({"seconds_between_frames": 0.1}, 60, 10, "(the least: 0.80 s)"),
        ({"seconds_between_frames": 0.125}, 29.97, 10, None),
    ],
)
def test_a_view_of_less_than_a_second_is_said(policy, fps, seconds, line):
    found = short_views_line(ViewPolicy(sampling="dense", frames=8, **policy), [clips_at(fps, seconds)])
    assert found is None if line is None else line in found
    assert short_views_line(ViewPolicy(), [clips_at(fps, seconds)]) is None
