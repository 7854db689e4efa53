"""Manifests as files: JSON lines, written in one step, read with every fault named by its line."""

import json
import re
import sys
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from mmkd.data_manifests.atomic import atomic_path
from mmkd.data_manifests.errors import InputError
from mmkd.data_manifests.json_file import unique_keys
from mmkd.data_manifests.kinds import MANIFEST, it_is, what_is
from mmkd.data_manifests.manifest import (
    SCHEMA,
    Clip,
    FrameRate,
    Head,
    Manifest,
    _repeated_id,
    check_labels,
    manifest_lines,
)
from mmkd.data_manifests.system_errors import cannot_read

HEADER_KEYS = frozenset({"schema", "dataset", "flip_allowed", "heads", "frame_rates"})


CLIP_KEYS = frozenset({"clip_id", "video", "split", "labels", "start_seconds", "end_seconds", "groups"})


MAX_HEADER_BYTES = 64 * 2**20


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
        dataset, heads, flip_allowed, frame_rates = _header(_object(first[1]))
    except InputError as error:
        kind = what_is(path)
        if kind is not None and kind != MANIFEST:
            raise InputError(f"{path} is not a manifest; it is {kind}") from error
        raise InputError(f"{path}:{first[0]}: {error}") from error
    clips = _clips(lines, heads, path)
    try:
        return Manifest(dataset, heads, clips, flip_allowed, frame_rates)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines that are not blank with their numbers; a line ends with a line feed and nothing else."""
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:  # JSON strings may hold other line breaks
            yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())
    except OSError as error:
        raise cannot_read(f"the manifest {path}", error, it_is(path)) from error
    except UnicodeDecodeError as error:
        raise InputError(f"cannot read the manifest {path}: it is not UTF-8 text{it_is(path)}") from error


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
        # Only text that is new is checked: equal labels were right for these heads before.
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
        # By `type`, for to isinstance true and false are whole numbers.
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
    reader, numbers, clips = _ClipReader(heads), array("q"), []  # 8 bytes a line: there may be millions
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


def _header(value: dict[str, Any]) -> tuple[str, tuple[Head, ...], bool, tuple[FrameRate, ...]]:
    """Return data set, heads, whether flips are allowed, and rates of frames that are stored as pictures."""
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
    own = tuple(Head(name, tuple(classes)) for name, classes in heads.items())
    return dataset, own, flip_allowed, _frame_rates(value.get("frame_rates", []))


def _frame_rates(value: Any) -> tuple[FrameRate, ...]:
    pairs: list[Any] = value if isinstance(value, list) else [None]
    for pair in pairs:
        is_pair = isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)
        if not is_pair or type(pair[1]) not in (int, float):
            raise InputError(f"'frame_rates' must be pairs of a pattern and frames a second, got {value!r}")
    return tuple(FrameRate(pattern, float(rate)) for pattern, rate in pairs)


def _is_list_of_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
