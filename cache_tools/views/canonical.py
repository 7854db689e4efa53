"""The canonical view: the pixels that teacher and student both see, and the thumbprint that proves it.

One function makes them, on the CPU, in both stages. Only colour jitter and normalisation happen later, on the
device.
"""

import hashlib

import cv2
import numpy as np

from mmkd.cache_tools.frames.records import ClipFrames, UInt8Array
from mmkd.cache_tools.views.view import View

CANONICAL_RULES = "crop, then cv2.resize: area when shrinking, bilinear when growing; RGB uint8"
"""What `canonical_view` does, in words; part of every fingerprint."""

THUMBNAIL_FRAMES = 4
THUMBNAIL_SIDE_PX = 6
THUMBNAIL_SIZE = THUMBNAIL_FRAMES * THUMBNAIL_SIDE_PX**2


def canonical_view(clip: ClipFrames, view: View, size_px: int) -> UInt8Array:
    """Return the view's pixels: uint8 (T, S, S, 3) RGB with S = `size_px`."""
    left, top, width, height = view.crop_xywh
    window = clip.select(view.frame_indices)[:, top : top + height, left : left + width]
    if min(left, top) < 0 or window.shape[1:3] != (height, width):
        raise ValueError(
            f"crop {view.crop_xywh} leaves the frame of {clip.frames.shape[2]} x {clip.frames.shape[1]}"
        )
    method = cv2.INTER_AREA if size_px < width else cv2.INTER_LINEAR
    pixels = np.stack([cv2.resize(frame, (size_px, size_px), interpolation=method) for frame in window])
    return np.ascontiguousarray(pixels[:, :, ::-1]) if view.flip else pixels


def pixel_hash(pixels: UInt8Array) -> int:
    """Return a 64-bit hash of a canonical view: equal only when every pixel is."""
    digest = hashlib.blake2b(np.ascontiguousarray(pixels).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def thumbnail(pixels: UInt8Array) -> UInt8Array:
    """Return uint8 (THUMBNAIL_SIZE,): a few tiny grey frames that tell another view from other rounding."""
    times = np.linspace(0, len(pixels) - 1, THUMBNAIL_FRAMES).round().astype(int)
    size = (THUMBNAIL_SIDE_PX, THUMBNAIL_SIDE_PX)
    frames = [
        cv2.resize(cv2.cvtColor(pixels[t], cv2.COLOR_RGB2GRAY), size, interpolation=cv2.INTER_AREA) for t in times
    ]
    return np.stack(frames).reshape(-1)
