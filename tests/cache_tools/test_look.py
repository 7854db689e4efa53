"""The frames of an expert's own look, against closed forms and exact fractions."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmkd.cache_tools.views.look import look_frames, look_view
from mmkd.cache_tools.views.view import View

quick = settings(deadline=None, database=None, derandomize=True, max_examples=200)
indices = st.lists(st.integers(0, 400_000), min_size=1, max_size=40).map(sorted)


def in_fractions(view_frames, frames):
    """The rule in exact fractions; Python's round of a Fraction is half to even."""
    count, found = len(view_frames), []
    for j in range(frames):
        position = min(max((j + Fraction(1, 2)) * count / frames - Fraction(1, 2), 0), count - 1)
        left = int(position)
        right = min(left + 1, count - 1)
        found.append(round(view_frames[left] + (view_frames[right] - view_frames[left]) * (position - left)))
    return found


@quick
@given(view_frames=indices, frames=st.integers(1, 70))
def test_a_look_is_the_rule_in_exact_fractions_ascending_and_inside(view_frames, frames):
    found = look_frames(np.array(view_frames), frames).tolist()
    assert found == in_fractions(view_frames, frames)
    assert found == sorted(found)
    assert view_frames[0] <= found[0]
    assert found[-1] <= view_frames[-1]


@quick
@given(view_frames=indices)
def test_as_many_frames_are_the_views_own(view_frames):
    assert look_frames(np.array(view_frames), len(view_frames)).tolist() == view_frames


def test_twice_and_half_as_many_frames_of_a_regular_view():
    # positions -1/4 (clamped), 1/4, 3/4, 5/4 ... of frames 8 apart; 1/2, 5/2 ... of frames 8 apart
    assert look_frames(np.arange(4) * 8, 8).tolist() == [0, 2, 6, 10, 14, 18, 22, 24]
    assert look_frames(np.arange(8) * 8, 4).tolist() == [4, 20, 36, 52]


def test_halves_are_rounded_to_the_even_frame():
    assert look_frames(np.arange(8), 4).tolist() == [0, 2, 4, 6]
    assert look_frames(np.arange(1, 9), 4).tolist() == [2, 4, 6, 8]


def test_a_look_keeps_crop_and_flip():
    view = View(np.array([3, 9]), (1, 2, 30, 30), flip=True)
    look = look_view(view, 4)
    assert look_view(view, None) is view
    assert look.frame_indices.tolist() == [3, 4, 8, 9]
    assert (look.crop_xywh, look.flip) == (view.crop_xywh, True)


def test_no_frames_are_no_look():
    with pytest.raises(ValueError, match="needs frames"):
        look_frames(np.array([1, 2]), 0)
