"""Flow as colours: the Middlebury code, and strips of frames over their flow with the wheel as legend.

Baker, Scharstein, Lewis, Roth, Black, Szeliski, "A Database and Evaluation Methodology for Optical Flow" (IJCV
2011), after their `colorcode.cpp`: hue is the direction, saturation the length; no motion is white, what is
longer than the scale is darkened.
"""

from collections.abc import Sequence

import cv2
import numpy as np

from mmkd.cache_tools.frames.records import Float32Array, Float64Array, UInt8Array
from mmkd.pipeline.flow_command.blocks import ShownPair

WHEEL = (("RY", 15), ("YG", 6), ("GC", 4), ("CB", 11), ("BM", 13), ("MR", 6))
"""Number of hues between red, yellow, green, cyan, blue, magenta and red again: as perceived, not equal."""
TILE_HEIGHT, CAPTION, GAP = 160, 18, 4
"""Sizes of a strip, in pixels."""
LEAST_SCALE_PX = 1.0
"""A strip's scale is at least this, so that a still video does not show its noise in full colour."""


def colour_wheel() -> Float64Array:
    """Return the wheel (55, 3) RGB in 0..1 (`makecolorwheel` of colorcode.cpp)."""
    corners = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 1, 1], [0, 0, 1], [1, 0, 1], [1, 0, 0]], np.float64)
    parts = []
    for i, (_, count) in enumerate(WHEEL):
        share = np.floor(255 * np.arange(count)[:, None] / count) / 255
        parts.append(corners[i] + share * (corners[i + 1] - corners[i]))
    return np.concatenate(parts)


def colours_of_flow(flow: Float32Array, *, scale_px: float) -> UInt8Array:
    """Return RGB (h, w, 3) of flow (2, h, w) in pixels; a vector of `scale_px` has a full colour.

    `computeColor` of colorcode.cpp, and as there what is not known, here not finite, is black.
    """
    wheel = colour_wheel()
    known = np.isfinite(flow[0]) & np.isfinite(flow[1])
    u, v = np.where(known, flow, 0).astype(np.float64) / scale_px
    length = np.hypot(u, v)
    place = (np.arctan2(-v, -u) / np.pi + 1) / 2 * (len(wheel) - 1)
    low = np.floor(place).astype(int)
    share = (place - low)[..., None]
    colour = (1 - share) * wheel[low] + share * wheel[(low + 1) % len(wheel)]
    inside = (length <= 1)[..., None]
    colour = np.where(inside, 1 - length[..., None] * (1 - colour), 0.75 * colour)
    levels: UInt8Array = np.floor(255 * colour * known[..., None]).astype(np.uint8)
    return levels


def flow_scale(flows: Sequence[Float32Array]) -> float:
    """Return the length that has a full colour over several fields: their 99th percentile, at least 1 px.

    A percentile that is one of the lengths, not a mean of two: of a small field, too, the one wild vector among
    a hundred sets nothing. Lengths that are not finite are left out.
    """
    lengths = np.concatenate([np.hypot(*flow.astype(np.float64)).ravel() for flow in flows])
    lengths = lengths[np.isfinite(lengths)]
    return max(LEAST_SCALE_PX, float(np.percentile(lengths, 99, method="lower")) if len(lengths) else 0.0)


def legend(side: int, *, scale_px: float) -> UInt8Array:
    """Return the wheel (side, side, 3) on white: the colour at a place is that of flow from the centre to it."""
    axis = (np.arange(side) + 0.5) / side * 2.2 - 1.1
    flow = np.stack(np.meshgrid(axis, axis)).astype(np.float32)
    image = colours_of_flow(flow, scale_px=1.0)
    image[np.hypot(*flow) > 1] = 255
    middle = side // 2
    cv2.line(image, (middle, int(side * 0.045)), (middle, int(side * 0.955)), (0, 0, 0), 1, cv2.LINE_AA)
    cv2.line(image, (int(side * 0.045), middle), (int(side * 0.955), middle), (0, 0, 0), 1, cv2.LINE_AA)
    return np.vstack([image, _caption(side, f"radius {scale_px:.1f} px")])


def strip(shown: Sequence[ShownPair], *, title: str) -> UInt8Array:
    """Return one RGB image: frames above, their flow below, the legend at the right, frame numbers between."""
    scale_px = flow_scale([pair.flow for pair in shown])
    columns = [_column(pair, scale_px) for pair in shown]
    height = columns[0].shape[0]
    wheel = legend(TILE_HEIGHT, scale_px=scale_px)
    side = np.full((height, TILE_HEIGHT, 3), 255, np.uint8)
    side[-wheel.shape[0] :] = wheel
    between = np.full((height, GAP, 3), 255, np.uint8)
    parts = [part for column in (*columns, side) for part in (column, between)][:-1]
    row = np.hstack(parts)
    return np.vstack([_caption(row.shape[1], title), row])


def _column(pair: ShownPair, scale_px: float) -> UInt8Array:
    height, width = pair.flow.shape[1:]
    size = (max(48, round(width * TILE_HEIGHT / height)), TILE_HEIGHT)
    image = pair.image if pair.image.ndim == 3 else np.repeat(pair.image[..., None], 3, axis=2)
    tiles = [cv2.resize(tile, size, interpolation=cv2.INTER_AREA) for tile in (image, _colours(pair, scale_px))]
    stack = [
        tiles[0],
        np.full((GAP, size[0], 3), 255, np.uint8),
        tiles[1],
        _caption(size[0], str(pair.frame_index)),
    ]
    return np.vstack(stack).astype(np.uint8, copy=False)


def _colours(pair: ShownPair, scale_px: float) -> UInt8Array:
    return colours_of_flow(pair.flow, scale_px=scale_px)


def _caption(width: int, text: str) -> UInt8Array:
    image = np.full((CAPTION, width, 3), 255, np.uint8)
    # OpenCV's fonts hold ASCII alone, and a name that is not valid UTF-8 ends the process within OpenCV.
    text = text.encode("ascii", "replace").decode()
    cv2.putText(image, text, (2, CAPTION - 5), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (0, 0, 0), 1, cv2.LINE_AA)
    return image


def png_of(image: UInt8Array) -> bytes:
    """Return an RGB image as PNG."""
    ok, data = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    if not ok:
        raise ValueError(f"OpenCV cannot encode an image of shape {image.shape}")
    return data.tobytes()
