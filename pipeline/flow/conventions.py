"""How published flow is coded, sized and paired: one small function for each rule, with its inverse.

Followed to the letter: denseflow (open-mmlab/denseflow, `src/common.cpp` and `src/denseflow_gpu.cpp`), EPIC's
furnari-flow (dl-container-registry/furnari-flow, `src/compute_flow.cpp`) and the float form of I3D
(kinetics-i3d's README); the files' names are in `file_names`. No flow is computed here and nothing is written;
`mmkd.pipeline.flow_command` does that. x is horizontal, positive to the right; y vertical, positive downwards.
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor

from mmkd.cache_tools.frames.records import Float64Array, IntArray, UInt8Array

JPEG_QUALITY = 95
"""What OpenCV's imencode takes when nobody says otherwise, as none of these tools does."""
I3D_BOUND_PX, I3D_FPS = 20, 25.0


# ---- values


def codes_of_flow(flow: Tensor, *, bound_px: float) -> Tensor:
    """Return the 8-bit codes round-half-even(255 (v + b) / 2b) of flow in pixels, clipped to 0..255; 0 -> 128.

    As `CAST` of denseflow's common.cpp. The sum is taken as 255 v / 2b + 127.5 in double precision, which meets
    every exact half exactly, for any bound.
    """
    codes = flow.to(torch.float64).mul_(255).div_(2 * bound_px).add_(127.5)
    return codes.round_().clamp_(0, 255).to(torch.uint8)


def flow_of_codes(codes: Tensor, *, bound_px: float) -> Tensor:
    """Invert `codes_of_flow`: float32 pixels, x / 255 · 2b - b. Code 128 is b / 255, not 0."""
    return codes.to(torch.float64).mul_(2 * bound_px / 255).sub_(bound_px).to(torch.float32)


def i3d_of_flow(flow: Tensor) -> Tensor:
    """Return flow in pixels as I3D takes it: clipped to ±20 px, divided by 20, so float32 in -1..1."""
    return flow.clamp(-I3D_BOUND_PX, I3D_BOUND_PX).div_(I3D_BOUND_PX)


def flow_of_i3d(values: Tensor) -> Tensor:
    """Invert `i3d_of_flow`: pixels; what was beyond ±20 px is ±20."""
    return values * I3D_BOUND_PX


def jpeg_of_codes(codes: UInt8Array) -> bytes:
    """Return a plane of codes (H, W) as a grey JPEG of quality 95."""
    ok, data = cv2.imencode(".jpg", codes, (cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY))
    if not ok:
        raise ValueError(f"OpenCV cannot encode an image of shape {codes.shape}")
    return data.tobytes()


def codes_of_jpeg(data: bytes) -> UInt8Array:
    """Return the codes (H, W) of a grey JPEG, which differ a little from those encoded; ValueError if damaged."""
    codes = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE)
    if codes is None:
        raise ValueError("not a whole JPEG")
    return codes.astype(np.uint8, copy=False)


# ---- geometry: sizes are (width, height), as in OpenCV


def denseflow_size(
    width: int, height: int, *, new_short: int = 0, new_width: int = 0, new_height: int = 0
) -> tuple[int, int]:
    """Return denseflow's size: `get_new_size` of denseflow_gpu.cpp; 0 means not asked for.

    A short side only ever shrinks a frame; a width or height is taken as it is, the other in proportion.
    """
    if new_width and new_height:
        return new_width, new_height
    if new_width:
        return new_width, _round(height / width * new_width)
    if new_height:
        return _round(width / height * new_height), new_height
    if not new_short or min(width, height) <= new_short:
        return width, height
    return short_side_size(width, height, new_short)


def short_side_size(width: int, height: int, short_side: int) -> tuple[int, int]:
    """Return the size whose short side is as stated, larger or smaller (I3D: 256)."""
    if width < height:
        return short_side, _round(height / width * short_side)
    return _round(width / height * short_side), short_side


def epic_size(width: int, height: int, *, short_side: int = 256) -> tuple[int, int]:
    """Return furnari-flow's size: the short side scaled to `short_side`, up or down, both floored to even.

    In single precision, as there: 256 / height · height may fall short of 256, and the floor then takes 254.
    """
    factor = max(np.float32(short_side) / np.float32(width), np.float32(short_side) / np.float32(height))
    sides = (math.floor(np.float32(side) * factor) for side in (width, height))
    even_width, even_height = (side - side % 2 for side in sides)
    return even_width, even_height


def grey_then_resize(frame: UInt8Array, size: tuple[int, int]) -> UInt8Array:
    """Turn RGB (H, W, 3) into grey (h, w) as denseflow does: grey at full size, then bilinear."""
    return resize_bilinear(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY).astype(np.uint8, copy=False), size)


def resize_then_grey(frame: UInt8Array, size: tuple[int, int]) -> UInt8Array:
    """Turn RGB (H, W, 3) into grey (h, w) as furnari-flow does: bicubic in colour, then grey."""
    return cv2.cvtColor(resize_bicubic(frame, size), cv2.COLOR_RGB2GRAY).astype(np.uint8, copy=False)


def resize_bilinear(image: UInt8Array, size: tuple[int, int]) -> UInt8Array:
    """Resize (H, W) or (H, W, 3), bilinearly; the same image if it has that size."""
    if (image.shape[1], image.shape[0]) == size:
        return image
    return cv2.resize(image, size, interpolation=cv2.INTER_LINEAR).astype(np.uint8, copy=False)


def resize_bicubic(image: UInt8Array, size: tuple[int, int]) -> UInt8Array:
    """Resize (H, W) or (H, W, 3), bicubically."""
    return cv2.resize(image, size, interpolation=cv2.INTER_CUBIC).astype(np.uint8, copy=False)


def _round(value: float) -> int:
    """Round a positive half up, as C's round does and Python's does not; at least 1."""
    return max(1, math.floor(value + 0.5))


# ---- pairs


@dataclass(frozen=True)
class Pairs:
    """Which frames of a sequence of `count` frames make pairs."""

    count: int
    """Number of frames."""
    step: int = 1
    """d, frames from a pair's first frame to its second; negative: backwards, as denseflow's -s."""
    stride: int = 1
    """s, frames from a pair to the next: pair t joins s·t and s·t + d (furnari-flow's stride and dilation)."""

    def __post_init__(self) -> None:
        """Raise ValueError for a step of 0 or a stride below 1."""
        if self.step == 0 or self.stride < 1:
            raise ValueError(f"a step must not be 0 and a stride at least 1: {self}")

    def __len__(self) -> int:
        """Return the number of pairs: with stride 1, count - |step|."""
        return max(0, (self.count - 1 - abs(self.step)) // self.stride + 1)

    def frames(self, pair: int) -> tuple[int, int]:
        """Return (first, second) frame of a pair."""
        first = self.stride * pair + max(0, -self.step)
        return first, first + self.step


def frames_at_rate(times_seconds: Float64Array, fps: float, *, end_seconds: float) -> IntArray:
    """Return the index of the frame shown at each tick of a constant rate, as `ffmpeg -vf fps=...` chooses.

    Each frame goes to its nearest tick (a half away from zero); the last one at a tick wins, and a tick without
    one repeats the frame before it. The sequence begins at 0, where ffmpeg's program repeats a first frame that
    comes later, and ends before the tick of `end_seconds`, the end of the last frame, which the program tells the
    filter; a filter graph that is not told ends one frame earlier.
    """
    ticks = _ticks(times_seconds, fps)
    count = max(1, int(_ticks(np.array([end_seconds]), fps)[0]))
    return np.maximum(np.searchsorted(ticks, np.arange(count), side="right").astype(np.int64) - 1, 0)


def _ticks(times_seconds: Float64Array, fps: float) -> IntArray:
    # Times are multiples of a time base, seldom exact in binary: 0.58 s · 25 is 14.499999999999998.
    return np.floor(np.round(times_seconds * fps, 6) + 0.5).astype(np.int64)
