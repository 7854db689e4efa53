"""What the demo's things look like: objects of twelve kinds, hands, covers and the backgrounds under them.

A sprite is a small picture with an alpha channel, drawn from simple shapes and textures. Each object kind has
a shape, two colours and a texture of its own; each instance varies them a little, as two real mugs differ.
"""

from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from mmkd.data_manifests.demo.draw import Draw
from mmkd.data_manifests.demo.shapes import RADIUS, SHAPES, SPRITE_SIZE, Point, UInt8Array, draw_polygon

TYPICAL = 0.8
"""Share of objects in the colours typical of their kind; the others have any colour, as mugs do."""

Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Sprite:
    """A picture that is moved, turned and scaled as a whole."""

    rgba: UInt8Array
    """(H, W, 4) colour premultiplied by alpha, 0..255."""
    outline: Float32Array
    """(N, 2) every point on the edge of what is opaque, x and y in sprite pixels."""
    origin: Point
    """The sprite pixel that a track's position refers to."""
    radius_px: float
    """How many sprite pixels a track's size of 1 radius stands for."""


@dataclass(frozen=True)
class Kind:
    """One kind of object, e.g. all mugs."""

    name: str
    """Its name in labels and placeholders."""
    shape: str
    """Key of SHAPES."""
    texture: str
    """Which pattern `_pattern` draws: stripes, dots, frame, grain or shade."""
    hue: int
    """Main hue, 0..179 as OpenCV counts."""
    accent_hue: int
    """Hue of the texture."""


KINDS_A = (
    Kind("mug", "mug", "stripes", 8, 22),
    Kind("book", "book", "frame", 172, 26),
    Kind("starfish", "star", "dots", 14, 4),
    Kind("banana", "banana", "shade", 27, 18),
    Kind("wooden spoon", "spoon", "grain", 16, 10),
    Kind("slice of pizza", "slice", "dots", 22, 176),
)
KINDS_B = (
    Kind("bottle", "bottle", "stripes", 96, 70),
    Kind("phone", "phone", "frame", 118, 100),
    Kind("key", "key", "shade", 104, 90),
    Kind("leaf", "leaf", "grain", 60, 45),
    Kind("plate", "plate", "frame", 84, 112),
    Kind("toy cross", "cross", "dots", 138, 90),
)


def _grid(size: int) -> tuple[Float32Array, Float32Array]:
    axis = (np.arange(size, dtype=np.float32) - size / 2) / RADIUS
    return np.meshgrid(axis, axis)[0], np.meshgrid(axis, axis)[1]


def _pattern(texture: str, draw: Draw, size: int) -> Float32Array:
    """Return the texture (size, size) as the share of the accent colour, 0..1."""
    x, y = _grid(size)
    frequency, phase = draw.uniform(4.0, 5.5), draw.uniform(0.0, 6.28)
    if texture == "stripes":
        share = np.sin(frequency * 1.6 * y + phase) > 0.1
    elif texture == "dots":
        share = np.sin(frequency * 1.4 * x + phase) * np.sin(frequency * 1.4 * y + 1.3 * phase) > 0.25
    elif texture == "frame":
        share = (np.abs(x) < draw.uniform(0.34, 0.42)) & (np.abs(y + 0.15) < draw.uniform(0.34, 0.46))
    elif texture == "grain":
        share = 0.5 + 0.5 * np.sin(frequency * 3.0 * x + 2.0 * np.sin(2.0 * y + phase))
    else:
        share = np.clip(0.5 + 0.6 * x + 0.3 * y, 0.0, 1.0)
    return np.asarray(share, np.float32)


def rgb_of(hue: float, saturation: float, value: float) -> Float32Array:
    """Return an RGB colour (3,) in 0..255 from OpenCV hue (0..179), saturation and value (0..255)."""
    hsv = np.array([[[hue % 180.0, min(saturation, 255.0), min(value, 255.0)]]], dtype=np.uint8)
    return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0, 0], np.float32)


def make_sprite(colour: Float32Array, mask: UInt8Array, origin: Point, radius_px: float) -> Sprite:
    """Join colour (H, W, 3) in 0..255 and alpha mask (H, W) into a sprite."""
    alpha = mask.astype(np.float32)[..., None] / 255.0
    rgba = np.concatenate([np.clip(colour, 0, 255) * alpha, alpha * 255.0], axis=2)
    # Every point of the edge: a box is made of those inside the frame, where no corner need be.
    contours, _ = cv2.findContours((mask > 127).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    outline = np.concatenate(contours).reshape(-1, 2).astype(np.float32)
    return Sprite(np.round(rgba).astype(np.uint8), outline, origin, radius_px)


def object_sprite(kind: Kind, draw: Draw) -> Sprite:
    """Draw one instance of an object kind."""
    mask = np.zeros((SPRITE_SIZE, SPRITE_SIZE), np.uint8)
    SHAPES[kind.shape](mask)
    shift = 0.0 if draw.chance(TYPICAL) else draw.uniform(0.0, 180.0)
    main = rgb_of(kind.hue + shift + draw.uniform(-5, 5), draw.uniform(140, 220), draw.uniform(130, 235))
    accent = rgb_of(kind.accent_hue + shift + draw.uniform(-5, 5), draw.uniform(60, 200), draw.uniform(60, 250))
    share = _pattern(kind.texture, draw, SPRITE_SIZE)[..., None]
    x, y = _grid(SPRITE_SIZE)
    light = 1.0 - 0.18 * (x + y)[..., None] + 0.05 * draw.noise(SPRITE_SIZE, SPRITE_SIZE, 1)
    return make_sprite((main * (1 - share) + accent * share) * light, mask, (48.0, 48.0), RADIUS)


def cover_sprite(draw: Draw) -> Sprite:
    """Draw a cloth or a box lid, of a colour that belongs to neither group of objects."""
    mask = np.zeros((SPRITE_SIZE, SPRITE_SIZE), np.uint8)
    corner = draw.uniform(0.75, 0.98)
    draw_polygon(mask, (-1, -corner), (-corner, -1), (corner, -1), (1, -corner), (1, corner), (corner, 1))
    draw_polygon(mask, (1, corner), (corner, 1), (-corner, 1), (-1, corner), (-1, -corner), (1, -corner))
    base = rgb_of(draw.uniform(0, 180), draw.uniform(0, 90), draw.uniform(90, 240))
    share = 0.35 * _pattern(draw.pick(("stripes", "grain", "dots")), draw, SPRITE_SIZE)[..., None]
    colour = base * (1 - share) + 0.07 * base * draw.noise(SPRITE_SIZE, SPRITE_SIZE, 1)
    return make_sprite(colour, mask, (48.0, 48.0), RADIUS)


def hand_sprite(draw: Draw) -> Sprite:
    """Draw a hand with its forearm; the origin lies between the finger tips, the arm points down."""
    height, width, mirror = 300, 110, draw.chance(0.5)
    mask = np.zeros((height, width), np.uint8)
    cv2.ellipse(mask, (55, 66), (27, 30), 0, 0, 360, 255, -1, cv2.LINE_AA)
    for x, top, lean in ((34, 14, -3), (48, 6, -1), (62, 7, 1), (75, 16, 3)):
        cv2.line(mask, (x + lean, top), (x - lean // 2, 60), 255, 11, cv2.LINE_AA)
    cv2.line(mask, (91, 44), (70, 76), 255, 13, cv2.LINE_AA)
    arm = np.array([[36, 80], [74, 80], [86, height], [26, height]])
    cv2.fillPoly(mask, [arm], 255, cv2.LINE_AA)
    if mirror:
        mask = np.ascontiguousarray(mask[:, ::-1])
    tone = rgb_of(draw.uniform(5, 14), draw.uniform(70, 150), draw.uniform(80, 235))
    depth = np.minimum(cv2.distanceTransform(mask, cv2.DIST_L2, 3) / 14.0, 1.0)[..., None]
    colour = tone * (0.62 + 0.38 * depth) * (1 + 0.05 * draw.noise(height, width, 1))
    if draw.chance(0.6):  # a sleeve
        edge = draw.whole(110, 150)
        sleeve = rgb_of(draw.uniform(0, 180), draw.uniform(20, 160), draw.uniform(40, 220))
        rows = np.arange(edge, height, dtype=np.float32)[:, None, None]
        colour[edge:] = sleeve * (0.85 + 0.15 * np.sin(rows * draw.uniform(0.2, 0.6)))
    return make_sprite(colour, mask, (55.0, 22.0), 42.0)


def background(draw: Draw, width: int, height: int) -> UInt8Array:
    """Draw a table top or floor (height, width, 3): a colour, slow shading, a pattern and fine grain."""
    colour = rgb_of(draw.uniform(0, 180), draw.uniform(10, 110), draw.uniform(70, 220))
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    turn, period = draw.uniform(0.0, 3.14), draw.uniform(9.0, 26.0)
    along, across = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    kind = draw.pick(("planks", "tiles", "cloth", "plain"))
    pattern = np.zeros((height, width), np.float32)
    if kind == "planks":
        pattern = np.where(along % period < 1.5, -1.0, 0.35 * np.sin(along * 2.1 + 0.4 * np.sin(across * 0.1)))
    elif kind == "tiles":
        pattern = np.where((along // period + across // period) % 2 == 0, 0.6, -0.6)
    elif kind == "cloth":
        pattern = 0.6 * np.sin(along * 40.0 / period) * np.sin(across * 40.0 / period)
    coarse = cv2.resize(draw.noise(height // 12, width // 12), (width, height), interpolation=cv2.INTER_CUBIC)
    middle = cv2.resize(draw.noise(height // 4, width // 4), (width, height), interpolation=cv2.INTER_LINEAR)
    grain = draw.noise(height, width)
    shade = 1.0 + draw.uniform(0.05, 0.22) * pattern + 0.10 * coarse + 0.07 * middle + 0.04 * grain
    return np.asarray(np.clip(colour * shade[..., None], 0, 255), np.uint8)
