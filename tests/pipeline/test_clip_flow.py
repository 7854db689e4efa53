"""Flow of a clip: which pairs, what is rounded, what a view's window shows, what the scratch store gives back."""

import contextlib
from dataclasses import dataclass

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from mmkd.cache_tools.frames.clip_set import ClipVideo
from mmkd.cache_tools.frames.records import ClipFacts, ClipFrames, VideoFacts
from mmkd.cache_tools.views.canonical import canonical_view
from mmkd.cache_tools.views.look import CANONICAL_LOOK
from mmkd.cache_tools.views.view import View
from mmkd.data_manifests.manifest import Clip
from mmkd.pipeline.flow import methods as flow_methods
from mmkd.pipeline.flow import scratch as flow_store
from mmkd.pipeline.flow.clip_flow import (
    FlowFields,
    all_pairs,
    clip_flow,
    crop_flow,
    decode_flow,
    encode_flow,
    flow_identity,
    flow_size,
    grey_frames,
    pair_ends,
    pair_starts,
    round_flow,
    stated_flow,
    tvl1_params,
)
from mmkd.pipeline.flow.scratch import DamagedFlowError, FlowStore
from mmkd.pipeline.inputs.prepare import ClipJob, FlowJob, prepare_clip
from mmkd.pipeline.recipe import FlowRecipe
from mmkd.pipeline.tvl1 import TVL1Params, tvl1_flow

quick = settings(deadline=None, database=None, derandomize=True, max_examples=100)
EIGHT_BITS = FlowRecipe(precision="uint8", bound_px=20)
FAST = FlowRecipe(preset="fast", short_side_px=24)


# ---- pairs


def facts_of(count, first=0, width=40, height=30):
    return ClipFacts(width=width, height=height, first_frame=first, frame_count=count)


def test_each_sampled_frame_pairs_with_its_native_successor_and_the_last_uses_the_last_pair():
    facts, sampled = facts_of(6, first=100), np.array([100, 103, 104, 105, 105])
    starts = pair_starts(sampled, facts, 1)
    assert starts.tolist() == [100, 103, 104, 104, 104]
    assert pair_ends(starts, facts, 1).tolist() == [101, 104, 105, 105, 105]
    starts = pair_starts(sampled, facts, 3)
    assert starts.tolist() == [100, 102, 102, 102, 102]
    assert pair_ends(starts, facts, 3).tolist() == [103, 105, 105, 105, 105]


@pytest.mark.parametrize(("count", "step", "expected"), [(1, 1, [(7, 7)]), (2, 5, [(7, 8)]), (3, 3, [(7, 9)])])
def test_a_clip_shorter_than_a_step_pairs_its_first_frame_with_its_last(count, step, expected):
    facts = facts_of(count, first=7)
    starts = all_pairs(facts, step)
    assert list(zip(starts.tolist(), pair_ends(starts, facts, step).tolist(), strict=True)) == expected


@quick
@given(st.integers(1, 60), st.integers(0, 500), st.integers(1, 64))
def test_pairs_stay_inside_the_clip_and_every_one_is_listed(count, first, step):
    facts = facts_of(count, first)
    sampled = first + np.arange(count)
    starts = pair_starts(sampled, facts, step)
    ends = pair_ends(starts, facts, step)
    last = first + count - 1
    assert ((first <= starts) & (starts <= ends) & (ends <= last)).all()
    assert (starts <= sampled).all()
    whole = sampled + step <= last
    np.testing.assert_array_equal(starts[whole], sampled[whole])
    assert set(ends - starts) == {min(step, count - 1)}
    assert all_pairs(facts, step).tolist() == sorted(set(starts.tolist()))
    assert len(all_pairs(facts, step)) == max(1, count - step)


def test_fields_are_found_by_their_start_and_an_absent_one_is_refused():
    fields = np.arange(3 * 2 * 4, dtype=np.float32).reshape(3, 2, 2, 2)
    flow = FlowFields(np.array([4, 6, 9]), fields)
    np.testing.assert_array_equal(flow.select(np.array([6, 6, 9, 4])), fields[[1, 1, 2, 0]])
    for absent in ([5], [3], [10], [4, 7]):
        with pytest.raises(KeyError, match="not all among"):
            flow.select(np.array(absent))


# ---- rounding


def test_the_8_bit_code_by_hand():
    values = np.array([-25, -20, -19.95, -0.0785, -0.078, 0, 0.0784, 0.0785, 10, 19.9, 20, 1e9], np.float32)
    # 255 (v + 20) / 40: 0 is coded 127.5, which rounds to the even 128.
    expected = [0, 0, 0, 127, 127, 128, 128, 128, 191, 254, 255, 255]
    assert encode_flow(values, EIGHT_BITS).tolist() == expected
    assert encode_flow(values, EIGHT_BITS).dtype == np.uint8
    np.testing.assert_allclose(
        decode_flow(np.array([0, 128, 255], np.uint8), EIGHT_BITS), [-20, 20 / 255, 20], rtol=1e-6
    )


def test_halves_round_to_even():
    # At b = 127.5 the code is v + 127.5, a half for every whole v.
    recipe = FlowRecipe(precision="uint8", bound_px=127.5)
    values = np.array([-127, -126, -125, -1, 0, 1, 2, 125, 126, 127], np.float32)
    assert encode_flow(values, recipe).tolist() == [0, 2, 2, 126, 128, 128, 130, 252, 254, 254]


@quick
@given(st.floats(0.01, 1000))
def test_zero_is_coded_128_for_every_bound(bound):
    recipe = FlowRecipe(precision="uint8", bound_px=bound)
    assert encode_flow(np.zeros(1, np.float32), recipe).tolist() == [128]


def test_every_8_bit_code_survives_a_round_trip():
    codes = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(encode_flow(decode_flow(codes, EIGHT_BITS), EIGHT_BITS), codes)


@quick
@given(st.floats(-20, 20, width=32))
def test_rounding_is_off_by_half_a_step_at_most(value):
    fields = np.array([value], np.float32)
    assert abs(round_flow(fields, EIGHT_BITS)[0] - value) <= 20 / 255 + 1e-5
    half = round_flow(fields, FlowRecipe())
    assert half.dtype == np.float32
    assert half[0] == np.float32(np.float16(value))
    np.testing.assert_array_equal(round_flow(half, FlowRecipe()), half)


# ---- fields


def test_the_flow_grid_keeps_the_shape_of_the_frame():
    default, enlarging = FlowRecipe(), FlowRecipe(enlarge=True)
    assert flow_size(ClipFacts(427, 240, 0, 1), enlarging) == (256, 455)
    assert flow_size(ClipFacts(240, 427, 0, 1), enlarging) == (455, 256)
    for recipe in (default, enlarging):
        assert flow_size(ClipFacts(1920, 1080, 0, 1), recipe) == (256, 455)
        assert flow_size(ClipFacts(97, 31, 0, 1), recipe.model_copy(update={"short_side_px": 31})) == (31, 97)


def test_small_frames_are_not_enlarged_unless_asked_for():
    assert flow_size(ClipFacts(427, 240, 0, 1), FlowRecipe()) == (240, 427)
    assert flow_size(ClipFacts(100, 255, 0, 1), FlowRecipe()) == (255, 100)


def test_enlarging_has_the_identity_that_all_flow_had_before_it_was_a_choice():
    """So an expert and a cache that were made then go on with `enlarge: true`, and are refused without."""
    before = {"preset": "default", "short_side_px": 256, "step": 1, "precision": "float16", "bound_px": 20.0}
    assert flow_identity(FlowRecipe(enlarge=True))["recipe"] == before
    assert flow_identity(FlowRecipe())["recipe"] == {**before, "enlarge": False}
    assert stated_flow(flow_identity(FlowRecipe(enlarge=True)))["recipe"] == {**before, "enlarge": True}


def test_grey_is_converted_first_then_resized_as_in_denseflow():
    frames = np.random.default_rng(0).integers(0, 256, (2, 30, 40, 3), np.uint8)
    grey = grey_frames(frames, (15, 20))
    assert (grey.shape, grey.dtype) == ((2, 15, 20), np.uint8)
    luma = (frames * np.array([0.299, 0.587, 0.114])).sum(-1)
    np.testing.assert_allclose(grey_frames(frames, (30, 40)), luma, atol=0.51)
    expected = functional.interpolate(torch.from_numpy(luma.round())[None], (15, 20), mode="bilinear")[0]
    np.testing.assert_allclose(grey, expected, atol=1.01)


def moving_clip(count=5, width=40, height=30, first=10):
    """A smooth pattern that moves 1 px to the right and 0.5 px down a frame."""
    y, x = np.mgrid[:height, :width].astype(np.float64)
    grey = [127 + 60 * np.sin((x - t) / 3.1) + 60 * np.cos((y - t / 2) / 2.7) for t in range(count)]
    frames = np.repeat(np.stack(grey)[..., None], 3, axis=-1).round().astype(np.uint8)
    return ClipFrames(frames, first + np.arange(count), np.arange(count) / 12)


def test_a_field_joins_frames_i_and_i_plus_step_whatever_else_was_decoded():
    clip = moving_clip()
    facts = facts_of(5, first=10)
    for step in (1, 2):
        recipe = FAST.model_copy(update={"step": step, "short_side_px": 30})
        starts = np.array([10, 12])
        flow = clip_flow(clip, facts, starts, recipe=recipe, device="cpu")
        grey = torch.from_numpy(cv2.cvtColor(clip.frames.reshape(-1, 40, 3), cv2.COLOR_RGB2GRAY).reshape(5, 30, 40))
        expected = tvl1_flow(grey[[0, 2]], grey[[0 + step, 2 + step]], params=TVL1Params.fast()).numpy()
        np.testing.assert_array_equal(flow.fields, expected.astype(np.float16).astype(np.float32))
        np.testing.assert_array_equal(flow.starts, starts)
        # The pattern moves right and down: channel 0 is horizontal, positive to the right.
        middle = np.median(flow.fields[:, :, 8:-8, 8:-8], axis=(0, 2, 3))
        np.testing.assert_allclose(middle, [step, step / 2], rtol=0.35)


def test_consecutive_pairs_make_each_frames_pyramid_once_and_have_the_same_bits(monkeypatch):
    clip, facts, starts = moving_clip(), facts_of(5, first=10), np.array([10, 11, 12, 13])
    apart = np.concatenate(
        [clip_flow(clip, facts, starts[[i]], recipe=FAST, device="cpu").fields for i in range(4)]
    )
    streamed = []
    original = flow_methods.tvl1_clip_flow
    monkeypatch.setattr(
        flow_methods, "tvl1_clip_flow", lambda *a, **k: (streamed.append(len(a[0])), original(*a, **k))[1]
    )
    np.testing.assert_array_equal(clip_flow(clip, facts, starts, recipe=FAST, device="cpu").fields, apart)
    assert streamed == [5]


def test_a_one_frame_clip_has_one_field_of_zeros():
    flow = clip_flow(moving_clip(1), facts_of(1, first=10), np.array([10]), recipe=FAST, device="cpu")
    assert flow.fields.shape == (1, 2, 24, 32)
    assert not flow.fields.any()


def test_the_identity_covers_rules_recipe_and_parameters():
    identity = flow_identity(FAST)
    assert identity["params"]["iterations"] == TVL1Params.fast().iterations
    recipes = [FAST, FlowRecipe(), FlowRecipe(step=2), FlowRecipe(precision="uint8")]
    recipes += [FlowRecipe(short_side_px=64), FlowRecipe(enlarge=True)]
    assert len({str(flow_identity(recipe)) for recipe in recipes}) == len(recipes)
    assert tvl1_params(FlowRecipe(preset="accurate")) == TVL1Params.accurate()


# ---- a view's window


def linear_fields(height, width, facts, count=1):
    """u = x, v = 3 - 2 y, in full-frame pixel coordinates of the centres of a coarser (or finer) grid."""
    x = (np.arange(width) + 0.5) * facts.width / width
    y = (np.arange(height) + 0.5) * facts.height / height
    fields = np.stack(np.broadcast_arrays(x[None, :], 3 - 2 * y[:, None]))
    return np.repeat(fields[None].astype(np.float32), count, axis=0)


@pytest.mark.parametrize("grid", [(60, 80), (30, 40), (47, 63), (120, 160)])
@pytest.mark.parametrize("size_px", [8, 20, 45])
def test_the_window_of_a_linear_field_by_closed_form(grid, size_px):
    facts = facts_of(9, width=80, height=60)
    view = View(np.array([0, 4]), (13, 9, 40, 40), False)
    window = crop_flow(linear_fields(*grid, facts, count=2), view, facts, size_px=size_px)
    assert (window.shape, window.dtype) == ((2, 2, size_px, size_px), np.float32)
    steps = (np.arange(size_px) + 0.5) * 40 / size_px
    for field in window:
        np.testing.assert_allclose(field[0], np.broadcast_to(13 + steps, (size_px, size_px)), atol=1e-3)
        np.testing.assert_allclose(
            field[1], np.broadcast_to(3 - 2 * (9 + steps[:, None]), (size_px, size_px)), atol=1e-3
        )


@pytest.mark.parametrize("crop", [(0, 0, 60, 60), (20, 0, 60, 60), (17, 5, 31, 31), (79, 59, 1, 1)])
def test_the_window_is_cv2_remap_at_half_pixel_centres(crop):
    facts = facts_of(9, width=80, height=60)
    fields = np.random.default_rng(0).standard_normal((3, 2, 45, 60)).astype(np.float32)
    window = crop_flow(fields, View(np.arange(3), crop, False), facts, size_px=24)
    left, top, side, _ = crop
    steps = (np.arange(24) + 0.5) / 24 * side
    map_x = np.tile((left + steps) * 60 / 80 - 0.5, (24, 1)).astype(np.float32)
    map_y = np.tile(((top + steps) * 45 / 60 - 0.5)[:, None], (1, 24)).astype(np.float32)
    for t in range(3):
        for channel in range(2):
            expected = cv2.remap(
                fields[t, channel], map_x, map_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
            )
            # OpenCV's remap may round positions to 1/32 pixel.
            np.testing.assert_allclose(window[t, channel], expected, atol=0.15)
    assert window.std() > 0.2


def test_at_the_grids_own_size_the_window_is_a_copy():
    facts = facts_of(9, width=80, height=60)
    fields = np.random.default_rng(0).standard_normal((1, 2, 60, 80)).astype(np.float32)
    window = crop_flow(fields, View(np.array([0]), (11, 7, 32, 32), False), facts, size_px=32)
    np.testing.assert_allclose(window, fields[:, :, 7:39, 11:43], atol=1e-4)


def test_values_stay_in_pixels_of_the_flow_grid():
    facts = facts_of(9, width=800, height=600)
    fields = np.full((1, 2, 30, 40), 3.5, np.float32)
    window = crop_flow(fields, View(np.array([0]), (100, 100, 500, 500), False), facts, size_px=224)
    np.testing.assert_allclose(window, 3.5, rtol=1e-6)


def test_a_flip_mirrors_the_window_and_negates_u():
    facts = facts_of(9, width=80, height=60)
    fields = np.random.default_rng(0).standard_normal((2, 2, 30, 40)).astype(np.float32)
    before = fields.copy()
    straight, flipped = (
        crop_flow(fields, View(np.arange(2), (13, 9, 40, 40), flip), facts, size_px=20) for flip in (False, True)
    )
    np.testing.assert_array_equal(flipped[:, 0], -straight[:, 0, :, ::-1])
    np.testing.assert_array_equal(flipped[:, 1], straight[:, 1, :, ::-1])
    assert flipped.flags.c_contiguous
    np.testing.assert_array_equal(fields, before)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(
    ("crop", "size_px"), [((24, 10, 100, 100), 32), ((60, 0, 120, 120), 40), ((5, 17, 24, 24), 48)]
)
def test_flow_and_pixels_look_at_the_same_window(crop, size_px, flip):
    """The same gradients as an image and as a field, through both paths; a shift by half a pixel would show."""
    facts = facts_of(1, width=200, height=120)
    frame = np.zeros((1, 120, 200, 3), np.uint8)
    frame[..., 0] = np.arange(200)
    frame[..., 1] = 2 * np.arange(120)[:, None]
    view = View(np.array([0]), crop, flip)
    pixels = canonical_view(ClipFrames(frame, np.array([0]), np.zeros(1)), view, size_px).astype(np.float32)
    fields = frame[..., :2].astype(np.float32).transpose(0, 3, 1, 2)
    window = crop_flow(np.ascontiguousarray(fields), view, facts, size_px=size_px)
    if flip:
        window[:, 0] *= -1
    # Only inside: growing, a crop's border pixels repeat, while the field goes on beyond the crop.
    inside = (slice(2, -2), slice(2, -2))
    expected = pixels[0].transpose(2, 0, 1)[:2]
    np.testing.assert_allclose(window[0][:, *inside], expected[:, *inside], atol=0.5 + 0.01)


# ---- the scratch store


def item_of(count=5, first=10, identity="a" * 64, width=40, height=30):
    video = VideoFacts(width, height, np.arange(first + count) / 12, "pyav", identity)
    clip = Clip("clip", "clip.webm", "train", {"action": 0})
    return ClipVideo(clip, video, facts_of(count, first, width, height))


def stored(directory, recipe=FAST, item=None, clip=None):
    item = item or item_of()
    clip = clip or moving_clip()
    store = FlowStore(directory, recipe)
    starts = all_pairs(item.facts, recipe.step)
    flow = clip_flow(clip, item.facts, starts, recipe=recipe, device="cpu")
    store.write(item, flow)
    return store, flow


@pytest.mark.parametrize("precision", ["float16", "uint8"])
def test_what_is_stored_comes_back_to_the_bit(tmp_path, precision):
    recipe = FAST.model_copy(update={"precision": precision})
    store, flow = stored(tmp_path, recipe)
    assert store.has(item_of())
    starts = np.array([13, 10, 13, 11])
    again = store.read(item_of(), starts)
    assert again.dtype == np.float32
    np.testing.assert_array_equal(again, flow.select(starts))
    fresh = clip_flow(moving_clip(), item_of().facts, np.array([11]), recipe=recipe, device="cpu")
    np.testing.assert_array_equal(store.read(item_of(), np.array([11])), fresh.fields)
    assert np.ptp(again) > 0.5


def test_a_pair_that_is_not_stored_is_refused(tmp_path):
    store, _ = stored(tmp_path)
    for start in (9, 14):
        with pytest.raises(KeyError, match="not all among"):
            store.read(item_of(), np.array([start]))


@pytest.mark.parametrize(
    "recipe",
    [
        FlowRecipe(preset="fast", short_side_px=25),
        FlowRecipe(preset="opencv", short_side_px=24),
        FlowRecipe(preset="fast", short_side_px=24, step=2),
        FlowRecipe(preset="fast", short_side_px=24, precision="uint8"),
    ],
)
def test_the_fields_of_another_recipe_are_never_read(tmp_path, recipe, monkeypatch):
    stored(tmp_path)
    assert FlowStore(tmp_path, FAST).has(item_of())
    assert not FlowStore(tmp_path, recipe).has(item_of())
    for other in ("cpu-torch", "cuda-triton-fused", "cuda-triton-blocked"):
        monkeypatch.setattr(flow_store, "arithmetic", lambda device, other=other: other)
        assert not FlowStore(tmp_path, FAST).has(item_of()), "devices, paths and kernels round differently"


@pytest.mark.parametrize("other", [{"identity": "b" * 64}, {"first": 11}, {"count": 4}])
def test_the_fields_of_another_video_or_segment_are_never_read(tmp_path, other):
    store, _ = stored(tmp_path)
    assert not store.has(item_of(**other))


def test_the_fields_of_other_decoding_rules_are_never_read(tmp_path, monkeypatch):
    stored(tmp_path)
    monkeypatch.setattr(flow_store, "DECODER_RULES", "2: other frames")
    assert not FlowStore(tmp_path, FAST).has(item_of())


def test_the_same_content_under_another_name_is_found(tmp_path):
    store, _ = stored(tmp_path)
    item = item_of()
    moved = ClipVideo(Clip("other", "moved/b.webm", "train", {"action": 1}), item.video, item.facts)
    assert store.has(moved)


def test_a_torn_file_is_not_there(tmp_path):
    store, _ = stored(tmp_path)
    path = store.path(item_of())
    data = path.read_bytes()
    for torn in (b"", data[:5], data[:100], data[:-1], b"\x80\x04K\x01."):
        path.write_bytes(torn)
        assert not store.has(item_of())
    path.write_bytes(data)
    assert store.has(item_of())


def test_arrays_of_another_shape_type_or_of_objects_are_not_there(tmp_path):
    store, flow = stored(tmp_path)
    path = store.path(item_of())
    for array in (flow.fields, flow.fields[1:].astype(np.float16), flow.fields.astype(np.float16)[..., 1:]):
        np.save(path, array)
        assert not store.has(item_of())
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    assert not store.has(item_of())


def damage(path, offset):
    """Lose the page that holds a byte, as a disk does."""
    data = bytearray(path.read_bytes())
    page = offset // 4096 * 4096
    data[page : page + 4096] = bytes(len(data[page : page + 4096]))
    path.write_bytes(data)


def test_a_lost_page_is_never_served_and_its_clip_computed_again(tmp_path):
    item, clip = item_of(width=80, height=60), moving_clip(width=80, height=60)
    recipe = FlowRecipe(preset="fast", short_side_px=60)
    store, flow = stored(tmp_path, recipe, item, clip)
    path = store.path(item)
    damage(path, path.stat().st_size // 2)
    assert store.has(item), "only reading fields can tell"
    np.testing.assert_array_equal(store.read(item, np.array([10])), flow.fields[:1])
    with pytest.raises(DamagedFlowError, match=r"\.npy was damaged and is deleted; run again"):
        store.read(item, flow.starts)
    assert not store.has(item)


@dataclass(frozen=True)
class InMemory:
    """A source of one clip's frames."""

    clip: ClipFrames

    def read(self, video, frame_indices, facts):
        times = facts.times_seconds[frame_indices]
        return ClipFrames(self.clip.select(frame_indices), frame_indices, times)


def test_a_lost_page_is_not_built_into_a_cache(tmp_path):
    item, clip = item_of(width=80, height=60), moving_clip(width=80, height=60)
    recipe = FlowRecipe(preset="fast", short_side_px=60)
    store, _ = stored(tmp_path, recipe, item, clip)
    views = (View(np.array([10, 12, 13]), (10, 0, 60, 60), False),)
    job = ClipJob(InMemory(clip), item, views, 24, FlowJob(recipe, store, "cpu"))
    read = prepare_clip(job).flow[CANONICAL_LOOK]
    damage(store.path(item), store.path(item).stat().st_size // 2)
    np.testing.assert_array_equal(prepare_clip(job).flow[CANONICAL_LOOK], read)
    assert not store.path(item).exists()
    np.testing.assert_array_equal(prepare_clip(job).flow[CANONICAL_LOOK], read)


def test_a_file_without_a_seal_or_of_another_clip_is_not_there(tmp_path):
    store, flow = stored(tmp_path)
    path = store.path(item_of())
    other = item_of(identity="b" * 64)
    store.path(other).parent.mkdir(parents=True, exist_ok=True)
    store.path(other).write_bytes(path.read_bytes())
    assert not store.has(other), "the fields of another clip, under this one's name"
    np.save(path, flow.fields.astype(np.float16))
    assert not store.has(item_of()), "as written before there were seals"
    store.write(item_of(), flow)
    assert store.has(item_of())
    np.testing.assert_array_equal(np.load(path), flow.fields.astype(np.float16))


def test_every_flipped_byte_is_noticed(tmp_path):
    store, flow = stored(tmp_path, FlowRecipe(preset="fast", short_side_px=16), item_of(3), moving_clip(3))
    path = store.path(item_of(3))
    data = path.read_bytes()
    for place in range(0, len(data), 61):
        path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        with contextlib.suppress(DamagedFlowError):
            assert not store.has(item_of(3)) or store.read(item_of(3), flow.starts) is None, place


def test_some_of_the_pairs_are_not_taken(tmp_path):
    flow = FlowFields(np.array([10, 11]), np.zeros((2, 2, 24, 32), np.float32))
    with pytest.raises(ValueError, match="every native pair, or none"):
        FlowStore(tmp_path, FAST).write(item_of(), flow)
    assert not list(tmp_path.rglob("*.npy"))
