"""The canonical view: its pixels against torch and exact means, its window, flip, and what its thumbprints tell."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from mmkd.cache_tools.frames.records import ClipFrames
from mmkd.cache_tools.views.canonical import THUMBNAIL_SIZE, canonical_view, pixel_hash, thumbnail
from mmkd.cache_tools.views.view import View

quick = settings(deadline=None, database=None, derandomize=True, max_examples=60)


def clip_of(frames, first=0):
    count = len(frames)
    return ClipFrames(frames, first + np.arange(count), np.arange(count) / 12)


def noise(count=3, height=40, width=60, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), np.uint8)


def view_of(indices, crop, *, flip=False):
    return View(np.array(indices, np.int64), crop, flip)


def test_at_the_crops_own_size_pixels_are_copied():
    frames = noise()
    view = view_of([10, 10, 12], (7, 3, 32, 32))
    pixels = canonical_view(clip_of(frames, first=10), view, 32)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, frames[[0, 0, 2], 3:35, 7:39])


def test_a_flip_mirrors_the_window_from_left_to_right():
    clip = clip_of(noise())
    crop = (11, 2, 30, 30)
    straight = canonical_view(clip, view_of([0, 2], crop), 24)
    flipped = canonical_view(clip, view_of([0, 2], crop, flip=True), 24)
    np.testing.assert_array_equal(flipped, straight[:, :, ::-1])
    assert flipped.flags.c_contiguous


@quick
@given(
    side=st.integers(1, 30),
    size_px=st.integers(8, 64),
    left=st.integers(0, 30),
    top=st.integers(0, 10),
    seed=st.integers(0, 99),
)
def test_growing_is_bilinear_as_in_torch(side, size_px, left, top, seed):
    if size_px < side:
        return
    frames = noise(1, seed=seed)
    pixels = canonical_view(clip_of(frames), view_of([0], (left, top, side, side)), size_px)
    window = torch.from_numpy(frames[:, top : top + side, left : left + side]).permute(0, 3, 1, 2).double()
    expected = functional.interpolate(window, size=(size_px, size_px), mode="bilinear", align_corners=False)
    # OpenCV interpolates 8-bit images in fixed point: at most one grey level from rounding the exact value.
    np.testing.assert_allclose(pixels, expected.permute(0, 2, 3, 1), atol=1.0)


@pytest.mark.parametrize("factor", [2, 3, 4, 5])
def test_shrinking_by_a_whole_factor_is_the_mean_of_each_block(factor):
    side = 8 * factor
    frames = noise(2, side + 5, side + 9, seed=factor)
    pixels = canonical_view(clip_of(frames), view_of([0, 1], (6, 4, side, side)), 8)
    blocks = frames[:, 4 : 4 + side, 6 : 6 + side].reshape(2, 8, factor, 8, factor, 3).astype(np.float64)
    np.testing.assert_allclose(pixels, blocks.mean((2, 4)), atol=0.5 + 1e-4)


def test_shrinking_by_a_broken_factor_weighs_pixels_by_their_area():
    row = np.random.default_rng(5).integers(0, 256, 12).astype(np.uint8)
    frames = np.broadcast_to(row[None, None, :, None], (1, 12, 12, 3)).copy()
    pixels = canonical_view(clip_of(frames), view_of([0], (0, 0, 12, 12)), 8)
    # Each of 8 pixels covers 1.5: a whole one and half of one that it shares with its neighbour.
    pairs = row.astype(np.float64).reshape(4, 3)
    left, right = (pairs[:, 0] + pairs[:, 1] / 2) / 1.5, (pairs[:, 1] / 2 + pairs[:, 2]) / 1.5
    expected = np.stack([left, right], axis=1).reshape(-1)
    np.testing.assert_allclose(pixels[0, 0, :, 0], expected, atol=0.5 + 1e-3)


@pytest.mark.parametrize(
    "crop", [(29, 0, 32, 32), (0, 9, 32, 32), (-40, 0, 16, 16), (0, -20, 10, 10), (-1, 0, 8, 8)]
)
def test_a_crop_that_leaves_the_frame_is_refused(crop):
    with pytest.raises(ValueError, match="leaves the frame of 60 x 40"):
        canonical_view(clip_of(noise()), view_of([0], crop), 16)


def test_a_frame_that_was_not_decoded_is_refused():
    with pytest.raises(KeyError, match="not all among"):
        canonical_view(clip_of(noise()), view_of([0, 3], (0, 0, 8, 8)), 8)


def test_the_input_is_not_changed():
    frames = noise()
    before = frames.copy()
    canonical_view(clip_of(frames), view_of([0, 1], (0, 0, 40, 40), flip=True), 16)
    np.testing.assert_array_equal(frames, before)


def test_the_hash_depends_on_every_pixel_and_on_no_memory_layout():
    pixels = noise(2, 8, 8)
    hashes = {pixel_hash(pixels)}
    for index in np.ndindex(pixels.shape):
        changed = pixels.copy()
        changed[index] ^= 1
        hashes.add(pixel_hash(changed))
    assert len(hashes) == 1 + pixels.size
    assert all(0 <= value < 2**64 for value in hashes)
    assert pixel_hash(np.asfortranarray(pixels)) == pixel_hash(pixels)


def test_the_thumbnail_is_the_block_mean_of_four_frames():
    grey = np.random.default_rng(1).integers(0, 256, (7, 12, 12), np.uint8)
    small = thumbnail(np.repeat(grey[..., None], 3, axis=-1)).reshape(4, 6, 6)
    # Of 7 frames: 0, 2, 4, 6.
    expected = grey[::2].reshape(4, 6, 2, 6, 2).mean((2, 4))
    np.testing.assert_allclose(small, expected, atol=1.0)
    assert small.size == THUMBNAIL_SIZE


def test_thumbnails_tell_another_view_from_other_rounding():
    y, x = np.mgrid[:96, :128]
    frames = np.stack(
        [
            np.stack([127 + 100 * np.sin((x + 3 * t) / 9 + c) * np.cos(y / 11) for c in range(3)], -1)
            for t in range(12)
        ]
    ).astype(np.uint8)
    clip = clip_of(frames)
    indices = [0, 3, 6, 9]
    pixels = canonical_view(clip, view_of(indices, (10, 10, 64, 64)), 32)
    rounded = np.clip(pixels.astype(np.int16) + np.random.default_rng(0).integers(-1, 2, pixels.shape), 0, 255)

    def difference(other):
        return np.abs(thumbnail(pixels).astype(int) - thumbnail(other.astype(np.uint8))).mean()

    assert difference(rounded) < 1
    assert difference(canonical_view(clip, view_of(indices, (14, 10, 64, 64)), 32)) > 3
    assert difference(canonical_view(clip, view_of([1, 4, 7, 10], (10, 10, 64, 64)), 32)) > 3
    assert difference(canonical_view(clip, view_of(indices, (10, 10, 64, 64), flip=True), 32)) > 3
