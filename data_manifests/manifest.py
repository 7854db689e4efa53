"""Clips, heads and manifests: the named types with which every other part speaks of a data set.

A manifest is a JSON-lines file: line 1 is the header, every further line one clip, so that an error can name
its line and a shell can count clips. It holds no pixels and no absolute path: videos are named relative to a
root that the user gives, and a path that leaves that root is refused.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property

from mmkd.data_manifests.errors import InputError

SCHEMA = "mmkd-manifest-1"
MOST_FRAMES_PER_SECOND = 1000
NOT_TEXT = re.compile("[\x00-\x1f\ud800-\udfff]")
"""Control characters, and halves of surrogate pairs, which UTF-8 cannot hold."""


@dataclass(frozen=True)
class Head:
    """A label space: `action`, or `verb` and `noun`."""

    name: str
    """Lower-case identifier."""
    classes: tuple[str, ...]
    """Class names in the order of their label numbers; unique, at least two."""

    def __post_init__(self) -> None:
        """Raise InputError when the name is not an identifier or the classes are not unique."""
        if not self.name.isidentifier() or self.name != self.name.lower():
            raise InputError(f"head name {self.name!r} is not a lower-case identifier")
        if len(self.classes) < 2:
            raise InputError(f"head {self.name!r} needs at least two classes, got {len(self.classes)}")
        if len(set(self.classes)) != len(self.classes):
            repeated = next(name for name in self.classes if self.classes.count(name) > 1)
            raise InputError(f"head {self.name!r} lists class {repeated!r} twice")
        if not all(_is_text(name) for name in self.classes):
            raise InputError(f"head {self.name!r} has a class name that holds control characters")


@dataclass(frozen=True, slots=True)
class Clip:
    """A labelled segment of a video."""

    clip_id: str
    """Unique within the manifest (compared without regard to case)."""
    video: str
    """Path of the video relative to the video root, with forward slashes."""
    split: str
    """Name of the one split it belongs to, e.g. `train`."""
    labels: Mapping[str, int | None]
    """Label number per head; None where the label is not known."""
    start_seconds: float = 0.0
    """First moment of the segment, in seconds from the start of the file, its sound included, as players count."""
    end_seconds: float | None = None
    """End of the segment (exclusive) in seconds; None means the end of the video."""
    groups: tuple[str, ...] = ()
    """Evaluation groups, e.g. `unseen`, `tail`."""

    def __post_init__(self) -> None:
        """Raise InputError for an empty id, a path out of the root or a segment that ends before it starts."""
        if not self.clip_id or not _is_text(self.clip_id):
            raise InputError(f"clip id {self.clip_id!r} is empty or holds control characters")
        if not self.split.isidentifier():
            raise InputError(f"clip {self.clip_id!r}: split {self.split!r} is not an identifier")
        parts = [part for part in self.video.split("/") if part not in ("", ".")]
        if not parts or self.video.startswith("/") or ".." in parts or ":" in self.video:
            raise InputError(
                f"clip {self.clip_id!r}: video {self.video!r} must be a path inside the video root, "
                "relative, without '..' or ':'"
            )
        if not _is_text(self.video) or not all(_is_text(group) for group in self.groups):
            raise InputError(f"clip {self.clip_id!r}: its video or a group holds control characters")
        end = self.start_seconds + 1 if self.end_seconds is None else self.end_seconds
        if not (math.isfinite(end) and 0 <= self.start_seconds <= end):  # an empty one is recorded as unusable
            raise InputError(
                f"clip {self.clip_id!r}: the segment {self.start_seconds} s to {self.end_seconds} s is not a part "
                "of a video"
            )


@dataclass(frozen=True)
class FrameRate:
    """The rate of frames that are stored as pictures, and so have no times of their own."""

    pattern: str
    """Which videos: a shell pattern (`*`, `?`, `[...]`) that a clip's whole `video` matches."""
    frames_per_second: float
    """Their rate: frame n, counted from 0, is at n / frames_per_second seconds."""

    def __post_init__(self) -> None:
        """Raise InputError for a rate that is none."""
        if not self.pattern or not _is_text(self.pattern):
            raise InputError(f"frame rate pattern {self.pattern!r} is empty or holds control characters")
        if not (math.isfinite(self.frames_per_second) and 0 < self.frames_per_second <= MOST_FRAMES_PER_SECOND):
            raise InputError(
                f"frame rate {self.frames_per_second} of {self.pattern!r} is not between 0 and "
                f"{MOST_FRAMES_PER_SECOND}"
            )


@dataclass(frozen=True)
class Manifest:
    """The clips of a data set with heads, splits and evaluation groups."""

    dataset: str
    """Name of the data set; part of every view's random key."""
    heads: tuple[Head, ...]
    """At least one."""
    clips: tuple[Clip, ...]
    """At least one; ids unique without regard to case."""
    flip_allowed: bool = False
    """Whether a horizontal flip keeps the labels true (never for Something-Something)."""
    frame_rates: tuple[FrameRate, ...] = ()
    """Rates of videos that are stored as pictures; of several patterns that match, the first counts."""
    _by_split: dict[str, tuple[Clip, ...]] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Raise InputError when a clip id repeats, or a label is outside its head's class list."""
        if not self.dataset or not _is_text(self.dataset):
            raise InputError(f"data set name {self.dataset!r} is empty or holds control characters")
        if not self.clips:
            raise InputError("the manifest holds no clip")
        if len({head.name for head in self.heads}) != len(self.heads) or not self.heads:
            raise InputError("the manifest needs at least one head, each named once")
        if (repeated := _repeated_id(self.clips)) is not None:
            first, again = repeated
            raise InputError(
                f"clip {again + 1}: id {self.clips[again].clip_id!r} is already that of clip {first + 1}"
            )
        for clip in {id(clip.labels): clip for clip in self.clips}.values():  # equal labels may be one object
            check_labels(clip, self.heads)
        splits = dict.fromkeys(clip.split for clip in self.clips)
        for split in splits:
            own = self.clips if len(splits) == 1 else (clip for clip in self.clips if clip.split == split)
            self._by_split[split] = tuple(own)  # of a tuple, itself

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits in order of first appearance."""
        return tuple(self._by_split)

    def frame_rate(self, video: str) -> float | None:
        """Return the stated rate of a video in frames a second; None where none is stated."""
        rates = (rate for rate in self.frame_rates if fnmatchcase(video, rate.pattern))
        return next((rate.frames_per_second for rate in rates), None)

    def unlabelled(self, name: str) -> int:
        """Return how many clips of a split have no label of any head."""
        return sum(all(label is None for label in clip.labels.values()) for clip in self.split(name))

    def split(self, name: str) -> tuple[Clip, ...]:
        """Return the clips of one split; raise InputError, naming the splits there are, for another."""
        if name not in self._by_split:
            raise InputError(f"the manifest has no split {name!r}; it has: {', '.join(self.splits)}")
        return self._by_split[name]

    def fingerprint(self) -> str:
        """Return the SHA-256 of everything that the manifest says, independent of its file's form."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        # Once: of a million clips it takes seconds, and every split that is opened asks for it.
        digest = hashlib.sha256()
        for number, line in enumerate(manifest_lines(self)):
            digest.update(f"\n{line}".encode() if number else line.encode())
        return digest.hexdigest()


def _is_text(text: str) -> bool:
    """Return whether the text can be written as UTF-8 and holds no control characters."""
    return NOT_TEXT.search(text) is None


def _repeated_id(clips: Sequence[Clip]) -> tuple[int, int] | None:
    """Return the rows of the first id that repeats (without regard to case), or None."""
    seen: set[str] = set()
    for again, clip in enumerate(clips):
        key = clip.clip_id.casefold()
        if key in seen:
            return next(row for row, other in enumerate(clips) if other.clip_id.casefold() == key), again
        seen.add(clip.clip_id if key == clip.clip_id else key)  # without a copy of each of a million ids
    return None


def check_labels(clip: Clip, heads: Sequence[Head]) -> None:
    """Raise InputError unless the clip has one label (or None) inside the class list of each head."""
    sizes = {head.name: len(head.classes) for head in heads}
    if set(clip.labels) != set(sizes):
        raise InputError(
            f"clip {clip.clip_id!r} has labels for {sorted(clip.labels)}, the heads are {sorted(sizes)}"
        )
    for name, label in clip.labels.items():
        if label is not None and not 0 <= label < sizes[name]:
            raise InputError(
                f"clip {clip.clip_id!r}: {name} label {label} is outside the class list (0..{sizes[name] - 1})"
            )


def manifest_lines(manifest: Manifest) -> Iterable[str]:
    """Yield the manifest's canonical JSON lines: header first, then one clip a line."""
    header = {
        "schema": SCHEMA,
        "dataset": manifest.dataset,
        "flip_allowed": manifest.flip_allowed,
        "heads": {head.name: list(head.classes) for head in manifest.heads},
    }
    if manifest.frame_rates:  # else the line, and with it the fingerprint, is that of before there were rates
        header["frame_rates"] = [[rate.pattern, float(rate.frames_per_second)] for rate in manifest.frame_rates]
    yield _encode(header)
    for clip in manifest.clips:
        yield clip_line(clip, manifest.heads)


def clip_line(clip: Clip, heads: Sequence[Head]) -> str:
    """Return a clip's canonical JSON line: what `json.dumps` would write of it, in a third of the time."""
    labels = ", ".join(f'"{head.name}": {_number(clip.labels[head.name])}' for head in heads)
    start, end = float(clip.start_seconds), None if clip.end_seconds is None else float(clip.end_seconds)
    groups = _encode(list(clip.groups)) if clip.groups else "[]"
    return (
        f'{{"clip_id": {_encode(clip.clip_id)}, "video": {_encode(clip.video)}, "split": {_encode(clip.split)}, '
        f'"labels": {{{labels}}}, "start_seconds": {start!r}, "end_seconds": {_number(end)}, "groups": {groups}}}'
    )


def _number(value: float | None) -> str:
    return "null" if value is None else repr(value)


_encode = json.JSONEncoder(ensure_ascii=False).encode
