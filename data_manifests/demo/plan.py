"""Which clips the demo has: options, splits, and the pairing of verbs with objects.

As in Something-Else, verbs and objects each come in two groups. In training and in the *standard* split verb
group 0 acts on objects A and group 1 on objects B; in the *compositional* split the pairing is swapped, so
what an object looks like, a useful hint in training, misleads there.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from mmkd.data_manifests.demo.actions import ACTIONS, Action
from mmkd.data_manifests.demo.draw import Draw
from mmkd.data_manifests.demo.sprites import KINDS_A, KINDS_B, Kind
from mmkd.data_manifests.errors import InputError

SPLITS = ("train", "standard", "compositional")
COVERS = ("cloth", "napkin", "lid", "sheet of paper")


@dataclass(frozen=True)
class DemoOptions:
    """What can be chosen about the demo data set; the same options give the same bytes."""

    seed: int = 0
    """Which of the many equal data sets; 0 or more."""
    train_clips: int = 896
    """Number of training clips."""
    standard_clips: int = 280
    """Number of test clips with training's pairing of verbs and objects."""
    compositional_clips: int = 280
    """Number of test clips with the swapped pairing."""
    width: int = 96
    """Frame width in pixels; even, at least 32."""
    height: int = 72
    """Frame height in pixels; even, at least 32."""
    min_frames: int = 20
    """Fewest frames of a clip, at least 8."""
    max_frames: int = 26
    """Most frames of a clip."""
    fps: int = 12
    """Frames per second."""

    def __post_init__(self) -> None:
        """Raise InputError, naming the option, for a value that makes no data set."""
        for name, clips in self.clips_per_split().items():
            if clips < len(ACTIONS):
                raise InputError(f"{name}_clips is {clips}; at least {len(ACTIONS)}, one per class, are needed")
        for name, pixels in (("width", self.width), ("height", self.height)):
            if pixels % 2 or not 32 <= pixels <= 2048:
                raise InputError(f"{name} is {pixels}; choose an even number from 32 to 2048")
        if not 8 <= self.min_frames <= self.max_frames <= 1000:
            raise InputError(
                f"min_frames {self.min_frames} and max_frames {self.max_frames}: "
                "choose 8 <= min_frames <= max_frames <= 1000"
            )
        if self.seed < 0 or not 1 <= self.fps <= 120:
            raise InputError(f"seed {self.seed} must not be negative, and fps {self.fps} must be 1 to 120")

    def clips_per_split(self) -> Mapping[str, int]:
        """Return the number of clips of each split."""
        return dict(zip(SPLITS, (self.train_clips, self.standard_clips, self.compositional_clips), strict=True))


@dataclass(frozen=True)
class ClipPlan:
    """What one clip shall show; how it looks in detail follows from `number` and the seed."""

    number: int
    """Its id as a whole number, from 1; with the seed the key of all that is random in it."""
    split: str
    """One of SPLITS."""
    action: Action
    """The class."""
    kind: Kind
    """What is acted on."""
    cover: str | None
    """What covers it, in the one action that names it, else None."""

    @property
    def clip_id(self) -> str:
        """Return the id as the annotation files spell it."""
        return str(self.number)

    def placeholders(self) -> list[str]:
        """Return what stands for each [something] of the template."""
        return [self.kind.name] if self.cover is None else [self.kind.name, self.cover]

    def label(self) -> str:
        """Return the sentence: the template with its placeholders filled in."""
        text = self.action.template[0].lower() + self.action.template[1:]
        for placeholder in self.placeholders():
            text = text.replace("[something]", placeholder, 1)
        return text


def kinds_for(action: Action, split: str) -> tuple[Kind, ...]:
    """Return the object group that goes with an action in a split."""
    swapped = split == "compositional"
    return KINDS_B if (action.verb_group == 1) != swapped else KINDS_A


def plan_clips(options: DemoOptions) -> list[ClipPlan]:
    """Return all clips in order of their numbers; classes are balanced within a split, in random order."""
    slots = [
        (split, ACTIONS[i % len(ACTIONS)], i // len(ACTIONS))
        for split, clips in options.clips_per_split().items()
        for i in range(clips)
    ]
    draw = Draw(options.seed, 0)
    plans = []
    for number, (split, action, turn) in enumerate(draw.shuffled(slots), 1):
        kinds = kinds_for(action, split)
        cover = draw.pick(COVERS) if action.template.count("[something]") == 2 else None
        plans.append(ClipPlan(number, split, action, kinds[turn % len(kinds)], cover))
    return plans
