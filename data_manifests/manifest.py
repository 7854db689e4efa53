"""Clips, heads and manifests: the named types with which every other part speaks of a data set.

A manifest is a JSON-lines file: line 1 is the header, every further line one clip, so that an error can name
its line and a shell can count clips. It holds no pixels and no absolute path: videos are named relative to a
root that the user gives, and a path that leaves that root is refused.
"""

import hashlib
import json
import math
import re
import sys
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mmkd.data_manifests.atomic import atomic_path
from mmkd.data_manifests.errors import InputError
from mmkd.data_manifests.json_file import unique_keys
from mmkd.data_manifests.kinds import MANIFEST, it_is, what_is

SCHEMA = "mmkd-manifest-1"
HEADER_KEYS = frozenset({"schema", "dataset", "flip_allowed", "heads"})
CLIP_KEYS = frozenset({"clip_id", "video", "split", "labels", "start_seconds", "end_seconds", "groups"})
MAX_HEADER_BYTES = 64 * 2**20
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


def save_manifest(manifest: Manifest, path: Path) -> None:
    """Write the manifest as JSON lines, replacing `path` in one step."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{line}\n" for line in manifest_lines(manifest))


def load_manifest(path: Path) -> Manifest:
    """Read and validate a manifest; every InputError names the file and, where there is one, the line."""
    lines = _numbered_lines(path)
    first = next(lines, None)
    if first is None:
        raise InputError(f"{path} is empty; make it with `mmkd-cache manifest`")
    try:
        dataset, heads, flip_allowed = _header(_object(first[1]))
    except InputError as error:
        kind = what_is(path)
        if kind is not None and kind != MANIFEST:
            raise InputError(f"{path} is not a manifest; it is {kind}") from error
        raise InputError(f"{path}:{first[0]}: {error}") from error
    clips = _clips(lines, heads, path)
    try:
        return Manifest(dataset, heads, clips, flip_allowed)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines that are not blank with their numbers; a line ends with a line feed and nothing else."""
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:  # JSON strings may hold other line breaks
            yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        reason = f"{error.strerror}" if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InputError(f"cannot read the manifest {path}: {reason}{it_is(path)}") from error


Labels = Mapping[str, int | None]
_TEXT, _NUMBER = r'"([^"\\\x00-\x1f]*)"', r"(-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?)"
AS_WE_WRITE = re.compile(
    rf'\{{"clip_id": {_TEXT}, "video": {_TEXT}, "split": {_TEXT}, "labels": (\{{[^{{}}]*\}}), '
    rf'"start_seconds": {_NUMBER}, "end_seconds": (?:{_NUMBER}|null), "groups": (\[[^\[\]]*\])\}}\r?\n?'
)
"""A line of `clip_line` whose id, video and split hold no escape; of any other one, JSON's parser takes care."""


class _ClipReader:
    """Turns lines into clips; equal labels and groups are one object, for clips may be millions."""

    def __init__(self, heads: Sequence[Head]) -> None:
        self._heads = heads
        self._labels: dict[str, Labels] = {}
        self._groups: dict[str, tuple[str, ...]] = {}

    def clip(self, line: str) -> Clip:
        """Return the clip of a line; InputError when it is none."""
        match = AS_WE_WRITE.fullmatch(line)
        if match is None:
            return self._clip(_object(line))
        clip_id, video, split, labels_text, start, end, groups_text = match.groups()
        if labels_text not in self._labels or groups_text not in self._groups:
            clip = self._clip(_object(line))
            self._labels.setdefault(labels_text, clip.labels)
            self._groups.setdefault(groups_text, clip.groups)
        labels, groups = self._labels[labels_text], self._groups[groups_text]
        start_seconds, end_seconds = float(start) or 0.0, None if end is None else float(end)  # one 0.0 for all
        return Clip(clip_id, video, sys.intern(split), labels, start_seconds, end_seconds, groups)

    def _clip(self, row: dict[str, Any]) -> Clip:
        _only(row, CLIP_KEYS)
        for key in ("clip_id", "video", "split"):
            if not isinstance(row.get(key), str):
                raise InputError(f"{key!r} must be a string, got {row.get(key)!r}")
        labels = row.get("labels")
        if not isinstance(labels, dict) or not all(v is None or type(v) is int for v in labels.values()):
            raise InputError(f"'labels' must map each head to a whole number or null, got {labels!r}")
        groups = row.get("groups", [])
        if not _is_list_of_strings(groups):
            raise InputError(f"'groups' must be a list of names, got {groups!r}")
        clip = Clip(
            clip_id=row["clip_id"],
            video=row["video"],
            split=sys.intern(row["split"]),
            labels=labels,
            start_seconds=_seconds(row, "start_seconds") or 0.0,
            end_seconds=_seconds(row, "end_seconds"),
            groups=tuple(groups),
        )
        check_labels(clip, self._heads)
        return clip


def _seconds(row: dict[str, Any], key: str) -> float | None:
    value = row.get(key)
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise InputError(f"start_seconds and end_seconds must be numbers, got {value!r}")
    try:
        return float(value)
    except OverflowError:
        raise InputError(f"{key} is too large a number") from None


def _clips(lines: Iterable[tuple[int, str]], heads: Sequence[Head], path: Path) -> tuple[Clip, ...]:
    reader, numbers, clips = _ClipReader(heads), array("q"), []
    for number, line in lines:
        try:
            clips.append(reader.clip(line))
        except InputError as error:
            raise InputError(f"{path}:{number}: {error}") from error
        numbers.append(number)
    if (repeated := _repeated_id(clips)) is not None:
        first, again = repeated
        raise InputError(
            f"{path}:{numbers[again]}: clip id {clips[again].clip_id!r} already stands in line {numbers[first]}"
        )
    return tuple(clips)


def _object(line: str) -> dict[str, Any]:
    if len(line) > MAX_HEADER_BYTES:
        raise InputError(f"the line is longer than {MAX_HEADER_BYTES} bytes")
    try:
        value = json.loads(line, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError("expected a JSON object")
    return value


def _only(value: dict[str, Any], allowed: Set[str]) -> None:
    if unknown := sorted(value.keys() - allowed):
        raise InputError(f"unknown key {unknown[0]!r}; allowed: {', '.join(sorted(allowed))}")


def _header(value: dict[str, Any]) -> tuple[str, tuple[Head, ...], bool]:
    """Return data set, heads and whether flips are allowed."""
    if value.get("schema") != SCHEMA:
        raise InputError(f"not a manifest of schema {SCHEMA!r}; make it with `mmkd-cache manifest`")
    _only(value, HEADER_KEYS)
    dataset, heads, flip_allowed = value.get("dataset"), value.get("heads"), value.get("flip_allowed", False)
    if not isinstance(dataset, str):
        raise InputError(f"'dataset' must be a name, got {dataset!r}")
    if not isinstance(flip_allowed, bool):
        raise InputError(f"'flip_allowed' must be true or false, got {flip_allowed!r}")
    if not isinstance(heads, dict) or not all(_is_list_of_strings(names) for names in heads.values()):
        raise InputError("'heads' must map each head to its list of class names")
    return dataset, tuple(Head(name, tuple(classes)) for name, classes in heads.items()), flip_allowed


def _is_list_of_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
