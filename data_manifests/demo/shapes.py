"""Outlines of the demo's twelve kinds of objects, drawn from polygons and ellipses into an alpha mask.

Coordinates are in radii from the middle of the mask, x to the right and y down.
"""

from collections.abc import Callable

import cv2
import numpy as np
import numpy.typing as npt

SPRITE_SIZE = 96
"""Side of an object sprite in its own pixels; the object reaches 0.45 of it from the centre."""
RADIUS = 0.45 * SPRITE_SIZE

UInt8Array = npt.NDArray[np.uint8]
Point = tuple[float, float]


def draw_polygon(mask: UInt8Array, *points: Point) -> None:
    """Fill the polygon of the given corners."""
    pixels = np.array(points) * RADIUS + SPRITE_SIZE / 2
    # In sixteenths of a pixel (4 bits of fraction), since OpenCV takes whole numbers alone.
    cv2.fillPoly(mask, [np.round(pixels * 16).astype(np.int32)], 255, cv2.LINE_AA, 4)


def draw_ellipse(mask: UInt8Array, centre: Point, radii: Point, thickness: float = 0.0) -> None:
    """Fill an ellipse, or draw its rim with a `thickness` in radii."""
    x, y = (round((c * RADIUS + SPRITE_SIZE / 2) * 16) for c in centre)
    a, b = (round(r * RADIUS * 16) for r in radii)
    width = max(1, round(thickness * RADIUS)) if thickness else -1
    cv2.ellipse(mask, (x, y), (a, b), 0, 0, 360, 255, width, cv2.LINE_AA, 4)


def _mug(mask: UInt8Array) -> None:
    draw_ellipse(mask, (0.55, 0.0), (0.38, 0.4), 0.16)
    draw_polygon(mask, (-0.85, -0.8), (0.5, -0.8), (0.4, 0.85), (-0.75, 0.85))


def _book(mask: UInt8Array) -> None:
    draw_polygon(mask, (-0.98, -0.66), (0.98, -0.66), (0.98, 0.66), (-0.98, 0.66))


def _star(mask: UInt8Array) -> None:
    turns = np.arange(10) * np.pi / 5 - np.pi / 2
    radii = np.where(np.arange(10) % 2 == 0, 1.0, 0.48)
    draw_polygon(mask, *zip(radii * np.cos(turns), radii * np.sin(turns), strict=True))


def _banana(mask: UInt8Array) -> None:
    turns = np.linspace(0.1, np.pi - 0.1, 16)
    outer = [(float(np.cos(a)), float(np.sin(a)) * 1.1 - 0.5) for a in turns]
    inner = [(float(np.cos(a)) * 0.8, float(np.sin(a)) * 0.35 - 0.5) for a in turns[::-1]]
    draw_polygon(mask, *outer, *inner)


def _spoon(mask: UInt8Array) -> None:
    draw_ellipse(mask, (0.0, -0.5), (0.45, 0.5))
    draw_polygon(mask, (-0.14, -0.1), (0.14, -0.1), (0.2, 1.0), (-0.2, 1.0))


def _slice(mask: UInt8Array) -> None:
    draw_polygon(mask, (0.0, 0.98), (-0.85, -0.7), (0.0, -0.92), (0.85, -0.7))


def _bottle(mask: UInt8Array) -> None:
    draw_polygon(
        mask, (-0.2, -1.0), (0.2, -1.0), (0.2, -0.45), (0.5, -0.15), (0.5, 1.0), (-0.5, 1.0), (-0.5, -0.15)
    )


def _phone(mask: UInt8Array) -> None:
    draw_polygon(mask, (-0.55, -0.98), (0.55, -0.98), (0.55, 0.98), (-0.55, 0.98))


def _key(mask: UInt8Array) -> None:
    draw_ellipse(mask, (0.0, -0.55), (0.44, 0.44))
    draw_polygon(mask, (-0.15, -0.2), (0.15, -0.2), (0.15, 0.6), (0.5, 0.6), (0.5, 0.95), (-0.15, 0.95))


def _leaf(mask: UInt8Array) -> None:
    turns = np.linspace(-np.pi / 2, np.pi / 2, 12)
    right = [(0.55 * float(np.cos(a)), float(np.sin(a))) for a in turns]
    draw_polygon(mask, *right, *[(-x, y) for x, y in right[::-1]])


def _plate(mask: UInt8Array) -> None:
    draw_ellipse(mask, (0.0, 0.0), (0.95, 0.82))


def _cross(mask: UInt8Array) -> None:
    draw_polygon(mask, (-0.34, -0.98), (0.34, -0.98), (0.34, 0.98), (-0.34, 0.98))
    draw_polygon(mask, (-0.95, -0.5), (0.95, -0.5), (0.95, 0.16), (-0.95, 0.16))


SHAPES: dict[str, Callable[[UInt8Array], None]] = {
    "mug": _mug,
    "book": _book,
    "star": _star,
    "banana": _banana,
    "spoon": _spoon,
    "slice": _slice,
    "bottle": _bottle,
    "phone": _phone,
    "key": _key,
    "leaf": _leaf,
    "plate": _plate,
    "cross": _cross,
}
"""Name of a shape -> draws it."""
