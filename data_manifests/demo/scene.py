"""From a planned clip to pixels and boxes: camera, layers, motion blur, noise.

The scene is flat layers over a background, each a sprite that is moved, turned and scaled; a camera that
drifts, shakes and turns a little looks at it. Boxes come from the sprites' outlines, not from pixels, so they
can be had without rendering.
"""

from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from mmkd.data_manifests.demo.actions import FloatArray, Setting, Track, draw_setting
from mmkd.data_manifests.demo.draw import Draw
from mmkd.data_manifests.demo.plan import ClipPlan, DemoOptions
from mmkd.data_manifests.demo.shapes import UInt8Array
from mmkd.data_manifests.demo.sprites import (
    KINDS_A,
    KINDS_B,
    Float32Array,
    Sprite,
    background,
    cover_sprite,
    hand_sprite,
    object_sprite,
)

MOMENTS = 3
"""Renderings that are averaged into a frame: motion blur."""
SHUTTER = 0.6
"""Share of the time between two frames during which the shutter is open."""


@dataclass(frozen=True)
class Camera:
    """Where the camera looks at each of N moments."""

    x: FloatArray
    """(N,) what is in the middle of the frame, in frame heights."""
    y: FloatArray
    """(N,) likewise, positive down."""
    zoom: FloatArray
    """(N,) magnification, about 1."""
    roll: FloatArray
    """(N,) turn of the picture in radians, clockwise."""


@dataclass(frozen=True)
class Layer:
    """One thing in the scene."""

    name: str
    """Its track id in the annotations (`hand`, `0000`, `0001`), or empty for what no one annotates."""
    category: str
    """What it is called in the annotations."""
    sprite: Sprite
    """How it looks."""
    track: Track
    """(N,) where it is at each moment."""


@dataclass(frozen=True)
class Scene:
    """One clip, ready to be rendered: N = frames * MOMENTS moments."""

    width: int
    """Frame width in pixels."""
    height: int
    """Frame height in pixels."""
    frames: int
    """Number of frames."""
    table: UInt8Array
    """(H', W', 3) the background picture, twice as wide and high as a frame."""
    layers: tuple[Layer, ...]
    """From the lowest to the one in front."""
    camera: Camera
    """Where the camera is at each moment."""
    gain: FloatArray
    """(frames,) brightness."""
    noise: float
    """Standard deviation of the sensor noise, in 8-bit steps."""
    key: tuple[int, ...]
    """Random key of the noise."""


def _times(frames: int) -> FloatArray:
    # Around the frame's own time, for boxes are those of the middle moment (outline_at).
    offsets = SHUTTER * (np.arange(MOMENTS) / (MOMENTS - 1) - 0.5)
    moments = np.arange(frames, dtype=np.float64)[:, None] + offsets[None, :]
    return moments.reshape(-1) / (frames - 1)


def _camera(draw: Draw, time: FloatArray, target: Track) -> Camera:
    """Draw a drift, two shaking sines per axis and a head that follows the target a little."""
    along, drift, follow = draw.uniform(0, 6.2832), draw.uniform(0.0, 0.18), draw.uniform(0.0, 0.4)
    x = drift * np.cos(along) * (time - 0.5) + follow * (target.x - target.x.mean())
    y = drift * np.sin(along) * (time - 0.5) + follow * (target.y - target.y.mean())
    for rate in (draw.uniform(0.5, 1.5), draw.uniform(2.0, 5.0)):
        x = x + draw.uniform(0.0, 0.03) / rate**0.5 * np.sin(6.2832 * rate * time + draw.uniform(0, 6.2832))
        y = y + draw.uniform(0.0, 0.03) / rate**0.5 * np.sin(6.2832 * rate * time + draw.uniform(0, 6.2832))
    zoom = np.exp(draw.uniform(-0.1, 0.1) * (time - 0.5))
    roll = draw.uniform(0.0, 0.06) * np.sin(6.2832 * draw.uniform(0.3, 1.2) * time + draw.uniform(0, 6.2832))
    return Camera(x, y, zoom, roll)


def _distractor(draw: Draw, setting: Setting) -> Layer:
    """Draw an object of either group that lies about, or rolls and turns on its own."""
    time = setting.time
    side, away = draw.uniform(0, 6.2832), draw.uniform(0.34, 0.6)
    x = setting.x + away * np.cos(side) + 0.0 * time
    y = setting.y + 0.75 * away * np.sin(side) + 0.0 * time
    angle = draw.uniform(-3.0, 3.0) + 0.0 * time
    if draw.chance(0.45):
        course, speed = draw.uniform(0, 6.2832), draw.uniform(0.05, 0.3)
        x, y = x + speed * np.cos(course) * (time - 0.5), y + speed * np.sin(course) * (time - 0.5)
        angle = angle + draw.uniform(-1.5, 1.5) * time
    size = np.full_like(time, draw.uniform(0.1, 0.16))
    kind = draw.pick(KINDS_A + KINDS_B)
    return Layer("", kind.name, object_sprite(kind, draw), Track(x, y, size, angle))


def _idle_hand(draw: Draw, time: FloatArray) -> Layer:
    """Draw the other hand, resting at the lower edge."""
    x = draw.sign() * draw.uniform(0.42, 0.62) + 0.02 * np.sin(6.2832 * time + draw.uniform(0, 6.2832))
    y = draw.uniform(0.22, 0.36) + 0.02 * np.sin(9.0 * time + draw.uniform(0, 6.2832))
    track = Track(x, y, np.full_like(time, draw.uniform(0.14, 0.18)), np.full_like(time, draw.uniform(-0.3, 0.3)))
    return Layer("hand", "hand", hand_sprite(draw), track)


def make_scene(plan: ClipPlan, options: DemoOptions) -> Scene:
    """Draw everything about one clip."""
    key = (options.seed, plan.number)
    draw = Draw(*key, 1)
    frames = draw.whole(options.min_frames, options.max_frames)
    setting = draw_setting(draw, _times(frames))
    motion = plan.action.move(draw, setting)
    layers = [_distractor(draw, setting) for _ in range(draw.pick((0, 1, 1, 2)))]
    if draw.chance(0.15):
        layers.append(_idle_hand(draw, setting.time))
    layers.append(Layer("0000", plan.kind.name, object_sprite(plan.kind, draw), motion.target))
    if motion.cover is not None:
        layers.append(Layer("0001", plan.cover or "cover", cover_sprite(draw), motion.cover))
    layers.append(Layer("hand", "hand", hand_sprite(draw), motion.hand))
    flicker = draw.uniform(0.0, 0.04) * np.sin(np.arange(frames) * draw.uniform(0.2, 2.0))
    return Scene(
        width=options.width,
        height=options.height,
        frames=frames,
        table=background(draw, 2 * options.width, 2 * options.height),
        layers=tuple(layers),
        camera=_camera(draw, setting.time, motion.target),
        gain=draw.uniform(0.75, 1.15) * (1.0 + flicker),
        noise=draw.uniform(1.5, 5.0),
        key=(*key, 2),
    )


def _placement(scene: Scene, layer: Layer, moment: int) -> npt.NDArray[np.float64]:
    """Return the affine map (2, 3) from sprite pixels to frame pixels at one moment."""
    camera, track, sprite = scene.camera, layer.track, layer.sprite
    zoom, roll = camera.zoom[moment], camera.roll[moment]
    scale = track.size[moment] * zoom * scene.height / sprite.radius_px
    angle = track.angle[moment] + roll
    rotation = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    dx = (track.x[moment] - camera.x[moment]) * zoom * scene.height
    dy = (track.y[moment] - camera.y[moment]) * zoom * scene.height
    x = scene.width / 2 + dx * np.cos(roll) - dy * np.sin(roll)
    y = scene.height / 2 + dx * np.sin(roll) + dy * np.cos(roll)
    shift = np.array([x, y]) - rotation @ np.array(sprite.origin)
    return np.concatenate([rotation, shift[:, None]], axis=1)


def outline_at(scene: Scene, layer: Layer, frame: int) -> Float32Array:
    """Return a layer's outline (N, 2) in frame pixels at the middle of a frame's exposure."""
    matrix = _placement(scene, layer, frame * MOMENTS + MOMENTS // 2)
    return np.asarray(layer.sprite.outline @ matrix[:, :2].T + matrix[:, 2], np.float32)


def _paint(canvas: Float32Array, sprite: Sprite, matrix: npt.NDArray[np.float64]) -> None:
    """Draw a sprite onto the canvas (H, W, 3), touching only the part that it reaches."""
    height, width = sprite.rgba.shape[:2]
    corners = np.array([[0, 0], [width, 0], [0, height], [width, height]]) @ matrix[:, :2].T + matrix[:, 2]
    x1, y1 = np.floor(np.maximum(corners.min(axis=0), 0)).astype(int)
    x2, y2 = np.ceil(np.minimum(corners.max(axis=0), [canvas.shape[1], canvas.shape[0]])).astype(int)
    if x1 >= x2 or y1 >= y2:
        return
    local = matrix.copy()
    local[:, 2] -= (x1, y1)
    patch = cv2.warpAffine(sprite.rgba, local, (int(x2 - x1), int(y2 - y1)), flags=cv2.INTER_LINEAR)
    part = canvas[y1:y2, x1:x2]
    part *= (255.0 - patch[..., 3:].astype(np.float32)) / np.float32(255.0)
    part += patch[..., :3]  # premultiplied by alpha already


def _shrunk(layer: Layer, scene: Scene) -> Layer:
    """Return the layer with its sprite reduced to about the size it is shown at, against aliasing."""
    sprite = layer.sprite
    shown = float(layer.track.size.max() * scene.camera.zoom.max()) * scene.height * 1.15
    share = min(1.0, shown / sprite.radius_px)
    size = max(2, round(sprite.rgba.shape[1] * share)), max(2, round(sprite.rgba.shape[0] * share))
    fx, fy = size[0] / sprite.rgba.shape[1], size[1] / sprite.rgba.shape[0]
    rgba = np.asarray(cv2.resize(sprite.rgba, size, interpolation=cv2.INTER_AREA), np.uint8)
    origin = sprite.origin[0] * fx, sprite.origin[1] * fy
    outline = sprite.outline * np.array([fx, fy], np.float32)
    small = Sprite(rgba, outline, origin, sprite.radius_px * fx)
    return Layer(layer.name, layer.category, small, layer.track)


def _table(scene: Scene, moment: int) -> Float32Array:
    """Return what the camera sees of the background at one moment."""
    camera = scene.camera
    zoom, roll = camera.zoom[moment], camera.roll[moment]
    rotation = zoom * np.array([[np.cos(roll), -np.sin(roll)], [np.sin(roll), np.cos(roll)]])
    look = np.array([camera.x[moment], camera.y[moment]]) * scene.height
    middle = np.array([scene.table.shape[1], scene.table.shape[0]]) / 2
    shift = np.array([scene.width, scene.height]) / 2 - rotation @ (middle + look)
    matrix = np.concatenate([rotation, shift[:, None]], axis=1)
    seen = cv2.warpAffine(
        scene.table,
        matrix,
        (scene.width, scene.height),
        flags=cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REFLECT,
    )
    return seen.astype(np.float32)


def render(scene: Scene) -> UInt8Array:
    """Return the clip (frames, H, W, 3) RGB."""
    layers = [_shrunk(layer, scene) for layer in scene.layers]
    noise = Draw(*scene.key)
    clip = np.empty((scene.frames, scene.height, scene.width, 3), np.uint8)
    for frame in range(scene.frames):
        total = np.zeros((scene.height, scene.width, 3), np.float32)
        for moment in range(frame * MOMENTS, (frame + 1) * MOMENTS):
            canvas = _table(scene, moment)
            for layer in layers:
                _paint(canvas, layer.sprite, _placement(scene, layer, moment))
            total += canvas
        # Added after averaging: motion blurs no sensor's noise.
        grain = np.float32(scene.noise) * noise.noise(scene.height, scene.width, 1)
        picture = total * np.float32(scene.gain[frame] / MOMENTS) + grain
        clip[frame] = np.clip(np.rint(picture), 0, 255).astype(np.uint8)
    return clip
