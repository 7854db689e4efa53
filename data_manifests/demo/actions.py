"""The demo's actions: how target, hand and cover move, in a world without pixels.

Positions are in frame heights from the middle of the frame, x to the right and y down; sizes are relative;
angles are radians, clockwise positive as seen on the screen; time runs from 0 (first frame) to 1 (last one).
Every action draws its extent, speed, start and end, so that a class is a motion and no fixed path. Several
differ in direction alone, and poking, lifting and pretending differ in whether the object moved.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from mmkd.data_manifests.demo.draw import Draw

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Track:
    """Where one thing is at each of N moments."""

    x: FloatArray
    """(N,) in frame heights from the middle, positive to the right."""
    y: FloatArray
    """(N,) in frame heights from the middle, positive down."""
    size: FloatArray
    """(N,) radius in frame heights."""
    angle: FloatArray
    """(N,) radians, clockwise."""


@dataclass(frozen=True)
class Motion:
    """All that moves on purpose in one clip."""

    target: Track
    """The object acted on."""
    hand: Track
    """The acting hand; its position is where the finger tips are."""
    cover: Track | None
    """The cloth or lid of covering and uncovering, else None."""


@dataclass(frozen=True)
class Setting:
    """What every action starts from."""

    time: FloatArray
    """(N,) moments, 0..1 (slightly outside at the ends, where the shutter opens early)."""
    x: float
    """Where the middle of the action lies."""
    y: float
    """Likewise, positive down."""
    radius: float
    """The target's radius in frame heights."""
    angle: float
    """The target's first angle."""
    start: float
    """When the action starts."""
    end: float
    """When it ends."""

    def progress(self) -> FloatArray:
        """Return how much of the action is done, 0..1, with a soft start and end."""
        return ease(self.time, self.start, self.end)


@dataclass(frozen=True)
class Action:
    """One class."""

    template: str
    """Something-Something's way to name a class: each object in brackets."""
    verb_group: int
    """0 or 1: which objects go with it in training (see demo_plan)."""
    move: Callable[[Draw, Setting], Motion]
    """Draws the motion."""

    @property
    def class_name(self) -> str:
        """Return the template without brackets, the key of labels.json."""
        return self.template.replace("[", "").replace("]", "")


def ease(time: FloatArray, start: float, end: float) -> FloatArray:
    """Return a smooth step from 0 at `start` to 1 at `end`."""
    share = np.clip((time - start) / max(end - start, 1e-6), 0.0, 1.0)
    return share * share * (3.0 - 2.0 * share)


def draw_setting(draw: Draw, time: FloatArray) -> Setting:
    """Draw place, size and timing of an action."""
    start = draw.uniform(0.1, 0.32)
    return Setting(
        time=time,
        x=draw.uniform(-0.16, 0.16),
        y=draw.uniform(-0.12, 0.14),
        radius=draw.uniform(0.13, 0.19),
        angle=draw.uniform(-0.5, 0.5),
        start=start,
        end=start + draw.uniform(0.35, 0.55),
    )


def _hand(draw: Draw, setting: Setting, x: FloatArray, y: FloatArray, tilt: FloatArray | float) -> Track:
    """Bring the hand in from below, let it follow (x, y) while it acts, and perhaps take it away again."""
    arrive = setting.start - draw.uniform(0.0, 0.05)
    present = ease(setting.time, arrive - draw.uniform(0.12, 0.3), arrive)
    if draw.chance(0.35):  # already there when the clip starts
        present = np.ones_like(present)
    if draw.chance(0.6):
        leave = setting.end + draw.uniform(0.02, 0.1)
        present = present * (1.0 - ease(setting.time, leave, leave + draw.uniform(0.12, 0.3)))
    side, depth = draw.uniform(-0.35, 0.35), draw.uniform(0.55, 0.9)
    size = np.full_like(x, draw.uniform(0.16, 0.2))
    angle = np.zeros_like(x) + tilt + draw.uniform(-0.2, 0.2)
    return Track(x + side * (1.0 - present), y + depth * (1.0 - present), size, angle)


def _target(setting: Setting, x: FloatArray | float, y: FloatArray | float, wobble: FloatArray | float) -> Track:
    still = np.zeros_like(setting.time)
    return Track(
        setting.x + x + still, setting.y + y + still, setting.radius + still, setting.angle + wobble + still
    )


def _grasp(draw: Draw, setting: Setting) -> tuple[float, float]:
    """Return where fingers hold the target, from its middle."""
    return draw.uniform(-0.5, 0.5) * setting.radius, draw.uniform(0.25, 0.75) * setting.radius


def push(draw: Draw, setting: Setting, *, direction: float) -> Motion:
    """Push along x in `direction` (1 to the right, -1 to the left)."""
    way = draw.uniform(0.2, 0.46) * (setting.progress() - 0.5)
    target = _target(setting, direction * way, draw.uniform(-0.25, 0.25) * way, draw.uniform(-0.8, 0.8) * way)
    contact = -direction * draw.uniform(0.3, 0.95) * setting.radius
    hand = _hand(
        draw,
        setting,
        target.x + contact,
        target.y + draw.uniform(0.0, 0.6) * setting.radius,
        direction * 0.25,
    )
    return Motion(target, hand, None)


def carry(draw: Draw, setting: Setting, *, direction: float) -> Motion:
    """Move along y in `direction` (1 down, -1 up) in the grip of the hand."""
    way = draw.uniform(0.18, 0.42) * (setting.progress() - 0.5)
    target = _target(setting, draw.uniform(-0.3, 0.3) * way, direction * way, draw.uniform(-0.8, 0.8) * way)
    dx, dy = _grasp(draw, setting)
    return Motion(target, _hand(draw, setting, target.x + dx, target.y + dy, 0.0), None)


def lift_and_drop(draw: Draw, setting: Setting) -> Motion:
    """Lift the target, then let it fall back while the hand stays up."""
    height = draw.uniform(0.2, 0.42)
    middle = setting.start + draw.uniform(0.5, 0.7) * (setting.end - setting.start)
    up = ease(setting.time, setting.start, middle)
    fallen = np.clip((setting.time - middle - 0.03) / draw.uniform(0.08, 0.16), 0.0, 1.0) ** 2  # as under gravity
    target = _target(setting, 0.0, height * (0.5 - up + fallen * up), draw.uniform(-0.5, 0.5) * fallen)
    dx, dy = _grasp(draw, setting)
    held = setting.y + height * (0.5 - up) + dy
    return Motion(target, _hand(draw, setting, target.x + dx, held, 0.0), None)


def approach(draw: Draw, setting: Setting, *, direction: float) -> Motion:
    """Move towards the camera (1) or away from it (-1): the thing and hand change size."""
    way = direction * draw.uniform(0.45, 0.95) * (setting.progress() - 0.5)
    scale = np.exp(way)  # as many times larger as smaller, and never 0
    base = _target(setting, draw.uniform(-0.1, 0.1) * way, draw.uniform(-0.05, 0.12) * way, 0.2 * way)
    target = Track(base.x, base.y, base.size * scale, base.angle)
    dx, dy = _grasp(draw, setting)
    hand = _hand(draw, setting, target.x + dx * scale, target.y + dy * scale, 0.0)
    return Motion(target, Track(hand.x, hand.y, hand.size * np.sqrt(scale), hand.angle), None)


def turn(draw: Draw, setting: Setting, *, direction: float) -> Motion:
    """Turn on the spot, clockwise (1) or counterclockwise (-1)."""
    turned = direction * draw.uniform(0.8, 2.2) * setting.progress()
    way = draw.uniform(-0.04, 0.04) * setting.progress()
    target = _target(setting, way, draw.uniform(-1, 1) * way, turned)
    rim, first = draw.uniform(0.4, 0.9) * setting.radius, draw.uniform(0.3, 2.8)
    x = target.x + rim * np.cos(first + 0.6 * turned)
    y = target.y + rim * np.sin(first + 0.6 * turned)
    return Motion(target, _hand(draw, setting, x, y, 0.4 * turned), None)


def cover(draw: Draw, setting: Setting, *, direction: float) -> Motion:
    """Bring a cover over the target (1) or take it off (-1)."""
    target = _target(setting, 0.0, 0.0, 0.0)
    off = 1.0 - setting.progress() if direction > 0 else setting.progress()
    side, far = draw.uniform(-2.6, -0.5), draw.uniform(0.34, 0.5)  # mostly from above or the sides
    x, y = far * np.cos(side) * off, far * np.sin(side) * off
    size = np.full_like(off, setting.radius * draw.uniform(1.1, 1.3))
    sheet = Track(target.x + x, target.y + y, size, 0.5 * draw.uniform(-1, 1) * off + draw.uniform(-0.4, 0.4))
    dx, dy = draw.uniform(-0.6, 0.6) * setting.radius, draw.uniform(0.4, 1.0) * setting.radius
    return Motion(target, _hand(draw, setting, sheet.x + dx, sheet.y + dy, 0.0), sheet)


def poke(draw: Draw, setting: Setting, *, least: float, most: float) -> Motion:
    """Poke so that the target moves by `least` to `most` frame heights."""
    side = draw.pick((-1.0, 1.0))
    touch = setting.start + draw.uniform(0.3, 0.5) * (setting.end - setting.start)
    way = draw.uniform(least, most) * ease(setting.time, touch, touch + draw.uniform(0.06, 0.16))
    lean = draw.uniform(-0.5, 0.2)
    target = _target(setting, side * way, lean * way, draw.uniform(-2.5, 2.5) * way)
    reach = ease(setting.time, touch - 0.15, touch) - ease(setting.time, touch + 0.12, touch + 0.3)
    gap = side * (-0.8 * setting.radius - draw.uniform(0.08, 0.16) * (1.0 - reach))
    x = setting.x + gap + reach * side * way
    y = setting.y + draw.uniform(0.0, 0.5) * setting.radius + lean * way
    return Motion(target, _hand(draw, setting, x, y, side * 0.3), None)


def pretend_to_lift(draw: Draw, setting: Setting) -> Motion:
    """Grasp at the target and raise the hand without it."""
    dx, dy = _grasp(draw, setting)
    target = _target(setting, 0.0, 0.1, 0.0)
    raised = draw.uniform(0.2, 0.42) * setting.progress()
    return Motion(target, _hand(draw, setting, target.x + dx, target.y + dy - raised, 0.0), None)


ACTIONS = (
    Action("Pushing [something] from left to right", 0, partial(push, direction=1.0)),
    Action("Pushing [something] from right to left", 1, partial(push, direction=-1.0)),
    Action("Moving [something] up", 0, partial(carry, direction=-1.0)),
    Action("Moving [something] down", 1, partial(carry, direction=1.0)),
    Action("Moving [something] away from the camera", 0, partial(approach, direction=-1.0)),
    Action("Moving [something] towards the camera", 1, partial(approach, direction=1.0)),
    Action("Turning [something] clockwise", 0, partial(turn, direction=1.0)),
    Action("Turning [something] counterclockwise", 1, partial(turn, direction=-1.0)),
    Action("Covering [something] with [something]", 0, partial(cover, direction=1.0)),
    Action("Uncovering [something]", 1, partial(cover, direction=-1.0)),
    Action("Poking [something] so it slightly moves", 0, partial(poke, least=0.08, most=0.2)),
    Action(
        "Poking [something] so lightly that it doesn't or almost doesn't move",
        1,
        partial(poke, least=0.0, most=0.012),
    ),
    Action("Lifting [something] up completely, then letting it drop down", 0, lift_and_drop),
    Action("Pretending to pick [something] up", 1, pretend_to_lift),
)
"""All classes in label order; each pair has one verb of each group, so that appearance helps."""
