"""Codes, names, sizes and pairs of published flow, each against its rule written down another way."""

from collections import deque
from fractions import Fraction

import cv2
import numpy as np
import pytest
import torch
from av.error import BlockingIOError as NothingYetError
from av.error import EOFError as NothingMoreError
from av.filter import Graph
from av.video.frame import VideoFrame
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from mmkd.pipeline.flow import file_names
from mmkd.pipeline.flow.conventions import (
    Pairs,
    codes_of_flow,
    codes_of_jpeg,
    denseflow_size,
    epic_size,
    flow_of_codes,
    flow_of_i3d,
    frames_at_rate,
    grey_then_resize,
    i3d_of_flow,
    jpeg_of_codes,
    resize_then_grey,
    short_side_size,
)
from mmkd.pipeline.flow.file_names import NAMES, FlowName, pair_number, pair_of_number

quick = settings(deadline=None, database=None, derandomize=True, max_examples=200)
bounds = st.integers(1, 200)


# ---- values


def code(value, bound):
    return int(codes_of_flow(torch.tensor([value]), bound_px=bound)[0])


@quick
@given(st.floats(-300, 300, width=32), bounds)
@example(-16.0, 20)
@example(8.0, 20)
@example(-10.0, 25)
@example(1e30, 20)
def test_codes_follow_the_rule_in_exact_arithmetic(value, bound):
    exact = 255 * (Fraction(value) + bound) / (2 * bound)
    distance = abs(exact % 1 - Fraction(1, 2))
    assume(distance == 0 or distance > Fraction(1, 10**9))  # doubles cannot tell these from a half
    assert code(value, bound) == min(255, max(0, round(exact)))  # Python rounds a Fraction's half to even
    assert code(value, bound) == min(255, max(0, int(np.rint(255 * (value + bound) / (2.0 * bound)))))  # CAST


@quick
@given(st.floats(0.01, 1000))
def test_no_motion_is_128_and_the_bound_255_whatever_the_bound(bound):
    assert code(0.0, bound) == code(-0.0, bound) == 128
    assert code(np.float32(2 * bound), bound) == 255
    assert code(np.float32(-2 * bound), bound) == 0


@given(bounds)
@settings(quick, max_examples=50)
def test_every_code_survives_its_decoding_and_values_move_at_most_half_a_level(bound):
    codes = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(codes_of_flow(flow_of_codes(codes, bound_px=bound), bound_px=bound), codes)
    values = torch.linspace(-bound, bound, 1001)
    decoded = flow_of_codes(codes_of_flow(values, bound_px=bound), bound_px=bound)
    assert (decoded - values).abs().max() <= bound / 255 * (1 + 1e-5)


def test_inputs_are_not_changed():
    flow = torch.tensor([[-30.0, 3.0, 30.0]])
    codes_of_flow(flow, bound_px=20)
    i3d_of_flow(flow)
    assert flow.tolist() == [[-30.0, 3.0, 30.0]]


def test_i3d_clips_at_20_pixels_and_divides_by_20():
    flow = torch.tensor([-35.0, -20.0, -5.0, 0.0, 0.5, 20.0, 21.0])
    values = i3d_of_flow(flow)
    assert values.dtype == torch.float32
    assert values.tolist() == [-1, -1, -0.25, 0, pytest.approx(0.025), 1, 1]
    torch.testing.assert_close(flow_of_i3d(values), flow.clamp(-20, 20))


def test_jpegs_are_opencv_s_own_and_come_back_nearly():
    y, x = np.mgrid[:40, :60]
    codes = (128 + 60 * np.sin(x / 9) + 40 * np.cos(y / 7)).astype(np.uint8)
    data = jpeg_of_codes(codes)
    assert data == cv2.imencode(".jpg", codes)[1].tobytes(), "denseflow states no quality"
    assert np.abs(codes_of_jpeg(data).astype(int) - codes).max() <= 3
    with pytest.raises(ValueError, match="not a whole JPEG"):
        codes_of_jpeg(b"\xff\xd8\xff")


# ---- names


def test_the_published_names():
    x, y = FlowName("x", 0), FlowName("y", 12)
    assert [file_names.denseflow_name(n) for n in (x, y)] == ["flow_x_00000.jpg", "flow_y_00012.jpg"]
    assert file_names.denseflow_name(FlowName("x", 0, 2)) == "flow_x_p2_00000.jpg"
    assert file_names.denseflow_name(FlowName("y", 1, -1)) == "flow_y_m1_00001.jpg"
    assert file_names.epic_name(FlowName("x", 1)) == "u/frame_0000000001.jpg"
    assert file_names.epic_name(FlowName("y", 123)) == "v/frame_0000000123.jpg"
    assert [file_names.mmaction_name(n) for n in (x, y)] == ["x_00000.jpg", "y_00012.jpg"]


@quick
@given(
    st.sampled_from(sorted(NAMES)),
    st.sampled_from("xy"),
    st.integers(0, 10**11),
    st.integers(-40, 40).filter(bool),
)
def test_names_are_read_back(layout, axis, number, step):
    make, parse = NAMES[layout]
    name = FlowName(axis, number, step if layout == "denseflow" else 1)
    assert parse(make(name)) == name


@pytest.mark.parametrize("layout", sorted(NAMES))
def test_other_names_are_not_taken_for_flow(layout):
    _, parse = NAMES[layout]
    strange = [
        "img_00001.jpg",
        "flow_x_0001.jpg",
        "flow_x_p1_00001.jpg",
        "flow_x_p02_00001.jpg",
        "flow_x_m0_00001.jpg",
    ]
    strange += [
        "flow_x_000001.jpg",
        "flow_z_00001.jpg",
        "flow_x_00001.png",
        "u/frame_1.jpg",
        "u/frame_00000000001.jpg",
    ]
    strange += [
        "x_1.jpg",
        "x_000001.jpg",
        "w_00001.jpg",
        "x_00001.jpg~",
        "flow_x_\u0660\u0660\u0660\u0660\u0661.jpg",
        "flow_x_00001.jpg\n",
    ]
    assert [text for text in strange if parse(text) is not None] == []


def test_denseflow_counts_first_frames_the_others_pairs_from_one():
    assert [pair_number("denseflow", p, 1) for p in (0, 5)] == [0, 5]
    assert [pair_number("denseflow", p, -2) for p in (0, 5)] == [2, 7]
    assert [pair_number(layout, 0, 1) for layout in ("epic", "mmaction")] == [1, 1]
    for layout in NAMES:
        for step in (1, 3):
            assert [pair_of_number(layout, pair_number(layout, p, step), step) for p in range(4)] == [0, 1, 2, 3]
    assert pair_of_number("denseflow", pair_number("denseflow", 3, -2), -2) == 3


# ---- geometry


@pytest.mark.parametrize(
    ("size", "asked", "expected"),
    [
        ((340, 256), {}, (340, 256)),
        ((1920, 1080), {"new_short": 256}, (455, 256)),
        ((1080, 1920), {"new_short": 256}, (256, 455)),
        ((320, 240), {"new_short": 256}, (320, 240)),  # never enlarged
        ((256, 256), {"new_short": 256}, (256, 256)),
        ((320, 240), {"new_width": 340, "new_height": 256}, (340, 256)),
        ((320, 240), {"new_width": 640}, (640, 480)),
        ((320, 240), {"new_height": 60}, (80, 60)),
        ((257, 256), {"new_short": 128}, (129, 128)),  # 128.5: C rounds it up, Python down
        ((510, 400), {"new_short": 100}, (127, 100)),  # 510 / 400 · 100 falls short of 127.5, there as here
    ],
)
def test_denseflow_s_sizes(size, asked, expected):
    assert denseflow_size(*size, **asked) == expected


def test_i3d_s_short_side_also_grows():
    assert short_side_size(320, 240, 256) == (341, 256)
    assert short_side_size(240, 320, 256) == (256, 341)


def test_epic_s_sides_are_floored_to_even_in_single_precision():
    assert epic_size(456, 256) == (456, 256)
    assert epic_size(1920, 1080) == (454, 256)
    assert epic_size(320, 240) == (340, 256)  # enlarged; 341.3 floored to even
    short = [epic_size(2 * side, side)[1] for side in range(100, 2000)]
    # Where 256 / side · side is 255.99998 in single precision the tool loses two rows; so do we.
    assert set(short) == {254, 256}
    assert all(width % 2 == height % 2 == 0 for width, height in (epic_size(w, 333) for w in range(100, 900, 7)))


def test_grey_and_resizing_in_the_order_of_each_tool():
    rng = np.random.default_rng(0)
    frame = rng.integers(0, 256, (50, 70, 3)).astype(np.uint8)
    bgr = np.ascontiguousarray(frame[..., ::-1])
    grey = cv2.cvtColor(bgr, cv2.COLOR_BGR2GRAY)
    np.testing.assert_array_equal(grey_then_resize(frame, (31, 23)), cv2.resize(grey, (31, 23)))
    np.testing.assert_array_equal(grey_then_resize(frame, (70, 50)), grey)
    small = cv2.resize(bgr, (30, 22), interpolation=cv2.INTER_CUBIC)
    np.testing.assert_array_equal(resize_then_grey(frame, (30, 22)), cv2.cvtColor(small, cv2.COLOR_BGR2GRAY))


# ---- pairs


def furnari_pairs(count, stride, dilation):
    """The queue of compute_flow.cpp, frames replaced by their numbers."""
    frames = iter(range(count))
    queue, pairs = deque(), []
    for _ in range(dilation):
        frame = next(frames, None)
        if frame is None:
            return []
        queue.append(frame)
    for flow_index, frame in enumerate(frames):
        queue.append(frame)
        first = queue.popleft()
        if flow_index % stride == 0:
            pairs.append((first, frame))
    return pairs


@quick
@given(st.integers(0, 40), st.integers(1, 6), st.integers(1, 7))
def test_epic_s_pairs_are_those_of_the_tool_s_queue(count, stride, step):
    pairs = Pairs(count, step=step, stride=stride)
    assert [pairs.frames(pair) for pair in range(len(pairs))] == furnari_pairs(count, stride, step)


@quick
@given(st.integers(0, 40), st.integers(-7, 7).filter(bool))
def test_denseflow_s_pairs_are_those_of_its_loop(count, step):
    expected = []
    for i in range(max(count - abs(step), 0)):  # calc_optflows_imp
        expected.append((i if step > 0 else i - step, i + step if step > 0 else i))
    pairs = Pairs(count, step=step)
    assert [pairs.frames(pair) for pair in range(len(pairs))] == expected


@pytest.mark.parametrize(("step", "stride"), [(0, 1), (1, 0)])
def test_impossible_pairs_are_refused(step, stride):
    with pytest.raises(ValueError, match="must not be 0"):
        Pairs(5, step=step, stride=stride)


# ---- frame rates


def ffmpeg_fps(stamps, time_base, fps, *, end):
    """Which frame FFmpeg's own filter shows at each tick, told as by its program where the last frame ends."""
    graph = Graph()
    source = graph.add_buffer(width=16, height=16, format="gray", time_base=time_base)
    rate, sink = graph.add("fps", f"fps={fps}"), graph.add("buffersink")
    source.link_to(rate)
    rate.link_to(sink)
    graph.configure()
    # A frame that begins where the last one ends: the filter, which drops what lies at its end, then stops there.
    for number, stamp in enumerate([*stamps, end]):
        frame = VideoFrame.from_ndarray(np.full((16, 16), number, np.uint8), format="gray")
        frame.pts, frame.time_base = stamp, time_base
        source.push(frame)
    source.push(None)
    shown = []
    while True:
        try:
            shown.append(int(sink.pull().to_ndarray()[0, 0]))
        except (NothingYetError, NothingMoreError):
            return [number for number in shown if number < len(stamps)]


@settings(quick, max_examples=40)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=30), st.sampled_from([5, 10, 12, 15, 24, 25, 30, 50, 60]))
def test_25_frames_a_second_are_chosen_as_ffmpeg_does(gaps, rate):
    stamps = np.cumsum([0, *gaps])
    end = int(stamps[-1]) + 1
    ours = frames_at_rate(stamps / rate, 25.0, end_seconds=end / rate).tolist()
    assert ours == (ffmpeg_fps(stamps.tolist(), Fraction(1, rate), 25, end=end) or [0])


def test_a_video_at_that_rate_stays_as_it_is():
    assert frames_at_rate(np.arange(100) / 25, 25.0, end_seconds=4).tolist() == list(range(100))


def test_before_a_late_first_frame_it_is_repeated_from_0():
    """As `ffmpeg -i LATE -r 25` does where the sound begins before the picture."""
    times = np.array([0.12, 0.16, 0.20])
    assert frames_at_rate(times, 25, end_seconds=0.24).tolist() == [0, 0, 0, 0, 1, 2]


@pytest.mark.parametrize(
    ("rate", "count"), [(5, 120), (10, 60), (12, 50), (15, 40), (24, 25), (25, 24), (30, 20), (50, 12), (59.94, 10)]
)
def test_24_frames_fill_their_whole_time(rate, count):
    """`ffmpeg -vf fps=25` of 24 frames at these rates."""
    assert len(frames_at_rate(np.arange(24) / rate, 25.0, end_seconds=24 / rate)) == count
