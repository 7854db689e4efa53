"""The colour code of the Middlebury benchmark, and the strips that a preview shows."""

import subprocess
import sys

import cv2
import numpy as np
import pytest

from mmkd.pipeline.flow_command.blocks import ShownPair
from mmkd.pipeline.flow_command.colours import colour_wheel, colours_of_flow, flow_scale, legend, png_of, strip


def colour(u, v, scale_px=1.0):
    return colours_of_flow(np.array([u, v], np.float32).reshape(2, 1, 1), scale_px=scale_px)[0, 0].tolist()


def reference_wheel():
    """makecolorwheel of colorcode.cpp, line by line."""
    columns = []
    ry, yg, gc, cb, bm, mr = 15, 6, 4, 11, 13, 6
    columns += [(255, 255 * i // ry, 0) for i in range(ry)]
    columns += [(255 - 255 * i // yg, 255, 0) for i in range(yg)]
    columns += [(0, 255, 255 * i // gc) for i in range(gc)]
    columns += [(0, 255 - 255 * i // cb, 255) for i in range(cb)]
    columns += [(255 * i // bm, 0, 255) for i in range(bm)]
    columns += [(255, 0, 255 - 255 * i // mr) for i in range(mr)]
    return np.array(columns)


def test_the_wheel_is_the_published_one():
    np.testing.assert_array_equal(np.round(255 * colour_wheel()), reference_wheel())


def test_directions_have_the_published_colours():
    assert colour(0, 0) == [255, 255, 255]
    for flow, expected in {
        (1, 0): (255, 0, 0),
        (0, 1): (255, 229, 0),
        (-1, 0): (0, 208, 255),
        (0, -1): (88, 0, 255),
    }.items():
        assert np.abs(np.subtract(colour(*flow), expected)).max() <= 26, flow
    reds = [colour(length, 0)[1] for length in (0.1, 0.5, 0.9)]
    assert reds == sorted(reds, reverse=True), "longer is fuller"


def test_what_is_beyond_the_scale_is_darker_and_the_scale_is_a_length():
    assert max(colour(3, 1)) <= 191
    assert colour(3, 1, scale_px=10) == colour(0.3, 0.1)


@pytest.mark.parametrize(("length", "expected"), [(0.2, 1.0), (5.0, 5.0)])
def test_a_still_video_is_not_shown_as_noise(length, expected):
    flow = np.zeros((2, 10, 10), np.float32)
    flow[0] = length
    assert flow_scale([flow, flow]) == pytest.approx(expected)


@pytest.mark.parametrize("wild", [1e3, np.inf, np.nan])
@pytest.mark.parametrize("side", [3, 16, 100])
def test_one_wild_vector_does_not_set_the_colours(wild, side):
    flow = np.full((2, side, side), 3.0, np.float32)
    calm = flow_scale([flow])
    flow[0, 1, 1] = wild
    assert flow_scale([flow]) == pytest.approx(calm)
    colours = colours_of_flow(flow, scale_px=calm)
    assert (colours[0] == colours[0, 0]).all()


def test_what_is_not_known_is_black():
    assert colour(np.nan, 0) == colour(0, np.inf) == [0, 0, 0]
    assert flow_scale([np.full((2, 4, 4), np.nan, np.float32)]) == 1


def test_a_name_that_is_not_utf8_or_not_ascii_is_written_all_the_same():
    """In a process of its own: OpenCV may end it."""
    program = (
        "import numpy as np; from mmkd.pipeline.flow_command.blocks import ShownPair; "
        "from mmkd.pipeline.flow_command.colours import strip; "
        "pair = ShownPair(0, np.zeros((48, 64), np.uint8), np.zeros((2, 48, 64), np.float32)); "
        "print(len({strip([pair], title=title).tobytes() for title in ('caf\\udce9', 'caf?', 'caf\\u00e9')}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "1"), done.stderr


def test_the_legend_shows_each_direction_where_it_points():
    image = legend(101, scale_px=7.25)
    assert image.shape == (119, 101, 3)
    assert image[2, 2].tolist() == [255, 255, 255]
    assert (
        image[53, 90].tolist()
        == colours_of_flow(
            np.array([(90.5 / 101) * 2.2 - 1.1, (53.5 / 101) * 2.2 - 1.1], np.float32).reshape(2, 1, 1),
            scale_px=1.0,
        )[0, 0].tolist()
    )
    assert image[101:].min() < 128, "the radius is written below it"


@pytest.mark.parametrize("channels", [(), (3,)])
def test_a_strip_has_frames_above_their_flow(channels):
    image = np.full((120, 160, *channels), 77, np.uint8)
    flow = np.zeros((2, 120, 160), np.float32)
    flow[0] = 4
    shown = [ShownPair(index, image, flow) for index in (0, 5, 12)]
    made = strip(shown, title="clip: tvl1, step 1")
    decoded = cv2.imdecode(np.frombuffer(png_of(made), np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    np.testing.assert_array_equal(decoded, made)
    assert made[90, 100].tolist() == [77, 77, 77]
    red, green, _ = made[18 + 160 + 4 + 80, 100].tolist()
    assert red > 180 > 60 > green
    assert made.shape[1] == 3 * 213 + 160 + 3 * 4
