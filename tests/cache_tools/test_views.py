"""Views: what each may look at, that a view is a function of its key alone, and that the draws are uniform."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from mmkd.cache_tools.cache.split_table import SplitTable
from mmkd.cache_tools.frames.clip_set import ClipVideo
from mmkd.cache_tools.frames.records import ClipFacts, VideoFacts, facts_table
from mmkd.cache_tools.views.drawing import (
    ViewPolicy,
    evaluation_view_table,
    evaluation_views,
    random_view_table,
    random_views,
)
from mmkd.cache_tools.views.keyed_words import KeyedWords, below, unit
from mmkd.cache_tools.views.view import ViewTable
from mmkd.data_manifests.manifest import Clip
from mmkd.student.data.view_streams import DrawnViews, StoredViews

FACTS = ClipFacts(width=427, height=240, first_frame=100, frame_count=45)
KEY = {"dataset": "demo", "clip_id": "74225", "seed": 0, "flip_allowed": True}
quick = settings(deadline=None, database=None, derandomize=True, max_examples=100)

all_facts = st.builds(
    ClipFacts,
    width=st.integers(1, 2000),
    height=st.integers(1, 2000),
    first_frame=st.integers(0, 10**6),
    frame_count=st.integers(1, 2000),
)


@st.composite
def policies(draw):
    low = draw(st.floats(1, 8))
    return ViewPolicy(
        sampling=draw(st.sampled_from(["uniform", "dense"])),
        frames=draw(st.integers(1, 64)),
        stride=draw(st.integers(1, 8)),
        size_px=draw(st.integers(8, 256)),
        scale=(low, draw(st.floats(low, 8))),
        evaluation_crops=draw(st.sampled_from([1, 3])),
        evaluation_clips=draw(st.integers(1, 4)),
    )


def draw_one(facts=FACTS, policy=None, number=0, **key):
    (view,) = random_views(facts, policy or ViewPolicy(), **(KEY | key), numbers=[number])
    return view


def as_tuple(view):
    return tuple(view.frame_indices.tolist()), view.crop_xywh, view.flip


def assert_inside(view, facts, policy):
    left, top, width, height = view.crop_xywh
    assert all(type(value) is int for value in view.crop_xywh)
    assert 1 <= width == height
    assert 0 <= left <= left + width <= facts.width
    assert 0 <= top <= top + height <= facts.height
    assert view.frame_indices.shape == (policy.frames,)
    assert view.frame_indices.dtype == np.int64
    assert (np.diff(view.frame_indices) >= 0).all()
    assert facts.first_frame <= view.frame_indices[0]
    assert view.frame_indices[-1] < facts.first_frame + facts.frame_count


def assert_frames_follow_the_rule(view, facts, policy):
    """uniform: the i-th of T frames in the i-th of T equal parts; dense: the stride, then the last frame again."""
    offsets = view.frame_indices - facts.first_frame
    if policy.sampling == "dense":
        expected = np.minimum(offsets[0] + policy.stride * np.arange(policy.frames), facts.frame_count - 1)
        np.testing.assert_array_equal(offsets, expected)
        return
    for i, offset in enumerate(offsets.tolist()):
        low, high = i * facts.frame_count // policy.frames, (i + 1) * facts.frame_count // policy.frames
        assert low <= offset < max(high, low + 1)


@quick
@given(facts=all_facts, policy=policies(), number=st.integers(0, 10**6))
def test_random_views_stay_inside_the_clip_and_the_frame(facts, policy, number):
    view = draw_one(facts, policy, number)
    assert_inside(view, facts, policy)
    assert_frames_follow_the_rule(view, facts, policy)
    short, side = min(facts.width, facts.height), view.crop_xywh[2]
    assert short / policy.scale[1] - 0.5 - 1e-9 <= side <= max(1, short / policy.scale[0] + 0.5 + 1e-9)


@quick
@given(facts=all_facts, policy=policies())
def test_evaluation_views_stay_inside_the_clip_and_the_frame(facts, policy):
    views = evaluation_views(facts, policy)
    assert len(views) == policy.evaluation_views == policy.evaluation_clips * policy.evaluation_crops
    for view in views:
        assert_inside(view, facts, policy)
        assert_frames_follow_the_rule(view, facts, policy)
        assert view.crop_xywh[2] == min(facts.width, facts.height)
        assert not view.flip


@quick
@given(policy=policies(), numbers=st.lists(st.integers(0, 10**6), min_size=1, max_size=5))
def test_a_view_does_not_depend_on_which_others_are_drawn(policy, numbers):
    together = random_views(FACTS, policy, **KEY, numbers=numbers)
    assert [as_tuple(view) for view in together] == [as_tuple(draw_one(FACTS, policy, n)) for n in numbers]


@pytest.mark.parametrize(
    "change",
    [
        {"number": 1},
        {"seed": 1},
        {"clip_id": "74226"},
        {"dataset": "other"},
        {"policy": ViewPolicy(size_px=112)},
        {"policy": ViewPolicy(scale=(1.15, 1.44))},
    ],
)
def test_every_part_of_the_key_gives_another_view(change):
    assert as_tuple(draw_one(**change)) != as_tuple(draw_one())


def test_how_evaluation_looks_does_not_change_the_random_views():
    policy = ViewPolicy(evaluation_crops=3, evaluation_clips=4)
    assert as_tuple(draw_one(policy=policy)) == as_tuple(draw_one())


def test_a_clip_that_starts_later_in_its_video_gives_the_same_view_shifted():
    later = draw_one(replace(FACTS, first_frame=1100))
    np.testing.assert_array_equal(later.frame_indices, draw_one().frame_indices + 1000)
    assert later.crop_xywh == draw_one().crop_xywh


def test_a_flip_happens_only_where_it_is_allowed_and_moves_nothing_else():
    allowed = [draw_one(number=n) for n in range(40)]
    forbidden = [draw_one(number=n, flip_allowed=False) for n in range(40)]
    assert {view.flip for view in allowed} == {True, False}
    assert {view.flip for view in forbidden} == {False}
    assert [as_tuple(view)[:2] for view in allowed] == [as_tuple(view)[:2] for view in forbidden]


def test_evaluation_views_by_closed_form():
    policy = ViewPolicy(frames=4, evaluation_crops=3)
    start, centre, end = evaluation_views(FACTS, policy)
    # Bounds of the four segments: 0, 11, 22, 33, 45; their middles: 5, 16, 27, 39.
    for view in (start, centre, end):
        assert view.frame_indices.tolist() == [105, 116, 127, 139]
    assert (start.crop_xywh, centre.crop_xywh, end.crop_xywh) == (
        (0, 0, 240, 240),
        (93, 0, 240, 240),
        (187, 0, 240, 240),
    )
    (upright,) = evaluation_views(ClipFacts(100, 181, 0, 4), ViewPolicy(frames=4))
    assert upright.crop_xywh == (0, 40, 100, 100)
    assert upright.frame_indices.tolist() == [0, 1, 2, 3]


def test_dense_evaluation_views_by_closed_form():
    policy = ViewPolicy(sampling="dense", frames=3, stride=2)
    # Three frames at stride 2 span 5 of 45 frames: starts 0..40, of which the middle one is 20.
    assert [view.frame_indices.tolist() for view in evaluation_views(FACTS, policy)] == [[120, 122, 124]]
    clips = evaluation_views(FACTS, policy.model_copy(update={"evaluation_clips": 2}))
    assert [view.frame_indices[0] for view in clips] == [100 + 41 // 4, 100 + 3 * 41 // 4]


@pytest.mark.parametrize(
    ("sampling", "expected"), [("uniform", [0, 0, 0, 1, 1, 1, 2, 2]), ("dense", [0, 2, 2, 2, 2, 2, 2, 2])]
)
def test_a_clip_shorter_than_a_view_repeats_frames(sampling, expected):
    policy = ViewPolicy(sampling=sampling, frames=8)
    facts = ClipFacts(64, 48, first_frame=7, frame_count=3)
    for view in (draw_one(facts, policy), *evaluation_views(facts, policy)):
        assert (view.frame_indices - 7).tolist() == expected


def chi_square(counts):
    expected = sum(counts) / len(counts)
    return sum((count - expected) ** 2 / expected for count in counts)


@pytest.mark.parametrize("n", [2, 7, 64])
def test_below_is_uniform(n):
    words = KeyedWords("test", n)
    counts = np.bincount([words.below(n) for _ in range(6400)], minlength=n)
    assert len(counts) == n
    # Mean n - 1, variance 2 (n - 1): five standard deviations either way; too even is as wrong as uneven.
    assert abs(chi_square(counts) - (n - 1)) < 5 * np.sqrt(2 * (n - 1))


def test_unit_is_uniform():
    words = KeyedWords("unit")
    draws = np.array([words.unit() for _ in range(6400)])
    assert 0 <= draws.min() < 0.01 < 0.99 < draws.max() < 1
    assert abs(draws.mean() - 0.5) < 5 / np.sqrt(12 * 6400)
    assert chi_square(np.histogram(draws, bins=16, range=(0, 1))[0]) < 15 + 5 * np.sqrt(30)


def test_frames_scale_place_and_flip_are_uniform_over_views():
    """2,000 views of one clip: every mean within five standard errors of that of its uniform distribution."""
    policy = ViewPolicy(frames=4)
    views = random_views(FACTS, policy, **KEY, numbers=range(2000))
    offsets = np.stack([view.frame_indices for view in views]) - FACTS.first_frame
    for i, (low, high) in enumerate([(0, 11), (11, 22), (22, 33), (33, 45)]):
        assert set(offsets[:, i]) == set(range(low, high))
        assert abs(offsets[:, i].mean() - (low + high - 1) / 2) < 5 * (high - low) / np.sqrt(12 * 2000)
    # The short side is scaled to S·u with u from U(a, b), so the window's side is 240 / u.
    factors = np.array([240 / view.crop_xywh[2] for view in views])
    assert abs(factors.mean() - (1.15 + 1.43) / 2) < 5 * 0.28 / np.sqrt(12 * 2000) + 1e-3
    assert factors.min() < 1.153 < 1.427 < factors.max()
    for axis, length in ((0, 427), (1, 240)):
        places = np.array([view.crop_xywh[axis] / (length - view.crop_xywh[2]) for view in views])
        assert places.min() == 0
        assert places.max() == 1
        assert abs(places.mean() - 0.5) < 5 / np.sqrt(12 * 2000)
    assert abs(np.mean([view.flip for view in views]) - 0.5) < 5 * 0.5 / np.sqrt(2000)


def test_dense_views_start_anywhere_from_which_they_fit():
    policy = ViewPolicy(sampling="dense", frames=16, stride=2)
    views = random_views(FACTS, policy, **KEY, numbers=range(600))
    # 16 frames at stride 2 span 31 of 45: starts 0..14, so that the last frame is used and none is repeated.
    starts = np.array([view.frame_indices[0] - FACTS.first_frame for view in views])
    assert set(starts) == set(range(15))
    assert chi_square(np.bincount(starts)) < 14 + 5 * np.sqrt(28)


def test_the_hash_stream_is_blake2b_in_counter_mode():
    """The stream written out again by its definition, over the border of its first block of eight words."""
    key = hashlib.blake2b(b'["a", 1]', digest_size=64).digest()
    blocks = [
        hashlib.blake2b(counter.to_bytes(8, "little"), key=key, digest_size=64).digest() for counter in range(2)
    ]
    expected = [int(word) for block in blocks for word in np.frombuffer(block, "<u8")]
    words = KeyedWords("a", 1)
    assert [words.below(2**64) for _ in range(16)] == expected
    again = KeyedWords("a", 1)
    assert [again.unit() for _ in range(16)] == [(word >> 11) / 2**53 for word in expected]


@pytest.mark.parametrize("n", [1, 2, 3, 427, 2**31 - 1, 2**32 - 1])
def test_arrays_of_words_become_the_numbers_of_single_words(n):
    """The product of 64 and 32 bits in halves, carries included; whole numbers of Python are the oracle."""
    edges = [0, 1, 2**32 - 1, 2**32, 2**63, 2**64 - 2**32, 2**64 - 1]
    drawn = np.random.default_rng(n).integers(0, 2**64, 2000, np.uint64).tolist()
    carried = [(k << 64) // n + extra for k in range(1, min(n, 50)) for extra in (0, 1)]
    values = edges + drawn + carried
    words = np.array(values, np.uint64)
    assert below(words, np.array(n)).tolist() == [(value * n) >> 64 for value in values]
    assert unit(words).tolist() == [(value >> 11) / 2**53 for value in values]


def test_keys_that_differ_only_in_their_grouping_give_other_streams():
    firsts = {KeyedWords(*key).below(2**64) for key in (("ab", "c"), ("a", "bc"), ("a", "b", "c"), ("ab", ["c"]))}
    assert len(firsts) == 4


# These values hold every cache ever built together with its student. If this test fails, what users have cached
# is no longer what a build would draw: change the values only together with VIEW_RULES.
GOLDEN = {
    "uniform": (
        [101, 102, 107, 108, 111, 115, 116, 121, 122, 126, 129, 132, 135, 137, 141, 142],
        (67, 40, 175, 175),
        True,
    ),
    "dense": (list(range(109, 141, 2)), (184, 43, 194, 194), True),
}


@pytest.mark.parametrize("sampling", GOLDEN)
def test_golden_views(sampling):
    assert as_tuple(draw_one(policy=ViewPolicy(sampling=sampling), number=3)) == (
        tuple(GOLDEN[sampling][0]),
        *GOLDEN[sampling][1:],
    )


@pytest.mark.parametrize(
    "values",
    [
        {"scale": (0.9, 1.2)},
        {"scale": (1.4, 1.2)},
        {"scale": (1.0, 8.1)},
        {"scale": (1.0, float("nan"))},
        {"frames": 0},
        {"stride": 0},
        {"size_px": 7},
        {"evaluation_crops": 2},
        {"evaluation_clips": 0},
        {"sampling": "random"},
        {"crops": 1},
    ],
)
def test_an_impossible_policy_is_refused(values):
    with pytest.raises(ValidationError):
        ViewPolicy(**values)


def table_of(views):
    rows, numbers = len(views), len(views[0])
    return SplitTable(
        name="train",
        clip_ids=tuple(f"clip-{row}" for row in range(rows)),
        labels={"action": np.zeros(rows, np.int64)},
        facts=np.array([(427, 240, 100, 45), (0, 0, 0, 0)][:rows], np.int32),
        drawn=ViewTable(
            np.array([[view.frame_indices for view in row] for row in views], np.int32),
            np.array([[view.crop_xywh for view in row] for row in views], np.int32).reshape(rows, numbers, 4),
            np.array([[view.flip for view in row] for row in views]),
        ),
    )


def test_stored_views_are_the_drawn_ones_again():
    ids = ["a", "b"]
    drawn = [random_views(FACTS, ViewPolicy(), **(KEY | {"clip_id": name}), numbers=range(3)) for name in ids]
    table = table_of(drawn)
    stored = StoredViews(table, rows=[1, 0])
    video = VideoFacts(427, 240, np.arange(200) / 25, "pyav", "x")
    clips = [ClipVideo(Clip(name, "v", "train", {}), video, FACTS) for name in ids]
    stream = DrawnViews(clips, ViewPolicy(), dataset="demo", seed=0, flip_allowed=True, views=None)
    assert (stored.views, stream.views) == (3, None)
    for row in (0, 1):
        for number in range(3):
            assert as_tuple(stored.view(1 - row, number)) == as_tuple(drawn[row][number])
            assert as_tuple(stream.view(row, number)) == as_tuple(drawn[row][number])
            assert stored.view(row, number).frame_indices.dtype == np.int64
    assert table.clip_facts(0) == FACTS
    assert table.readable.tolist() == [True, False]


@quick
@given(facts=st.lists(st.none() | all_facts, min_size=1, max_size=4), policy=policies(), views=st.integers(1, 3))
def test_tables_hold_what_is_drawn_one_by_one(facts, policy, views):
    ids = [f"clip {row}" for row in range(len(facts))]
    common = {"dataset": "demo", "seed": 3, "flip_allowed": True}
    table_of_facts = facts_table(facts)
    random = random_view_table(table_of_facts, policy, clip_ids=ids, numbers=range(views), **common)
    fixed = evaluation_view_table(table_of_facts, policy)
    for row, clip in enumerate(facts):
        if clip is None:
            drawn, tested = (), ()
            assert not random.frame_index[row].any()
            assert not random.crop_xywh[row].any()
            assert not fixed.crop_xywh[row].any()
        else:
            drawn = random_views(clip, policy, clip_id=ids[row], numbers=range(views), **common)
            tested = evaluation_views(clip, policy)
            assert (len(drawn), len(tested)) == (views, fixed.flip.shape[1])
        for table, expected in ((random, drawn), (fixed, tested)):
            for number, view in enumerate(expected):
                assert as_tuple(table.view(row, number)) == as_tuple(view)
