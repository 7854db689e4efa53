"""Adapters for Something-Something V2 and Something-Else: their published files as a manifest.

Both publish one JSON list per split, of elements {id, label, template, placeholders}, and one file of class
numbers. A clip's class is `labels[template without the characters [ and ]]`: the brackets hold many different
words ("[something in it]"), so they are stripped, never replaced. The two number the same classes in another
order, and each few-shot part of Something-Else has a numbering of its own, so the manifest carries the class
names in order: two manifests never share label numbers by chance.
"""

import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmkd.data_manifests.counted import counted
from mmkd.data_manifests.errors import InputError
from mmkd.data_manifests.json_file import read_json
from mmkd.data_manifests.manifest import Clip, Head, Manifest

SOMETHING_SOMETHING = "something-something-v2"
SOMETHING_ELSE = "something-else"
VIDEO_SUFFIX = ".webm"
LEAK_WARNING = (
    "Something-Else's splits mix train and validation videos of Something-Something V2: a network trained (or "
    "initialised) on V2 train has SEEN videos of this evaluation. `mmkd-cache build` finds such experts by the "
    "clips that they were trained on; of a weights file nobody can tell."
)

log = logging.getLogger(__name__)


def read_something_something(
    splits: Mapping[str, Path],
    labels: Path,
    *,
    dataset: str = SOMETHING_SOMETHING,
    video_suffix: str = VIDEO_SUFFIX,
) -> Manifest:
    """Read the official V2 files into a manifest with the single head `action`.

    `splits` maps split names of the caller's choice to element lists, e.g. `{"train": Path("train.json")}`.
    A file none of whose elements has a template (the published test.json) gives clips without labels. An
    InputError names the file and the element, counted from 1.
    """
    if not splits:
        raise InputError("no split file was given; give at least one, e.g. train=train.json")
    classes = read_class_list(labels)
    numbers = {name: number for number, name in enumerate(classes)}
    clips: dict[str, Clip] = {}
    places: dict[str, str] = {}
    for split, path in splits.items():
        for place, element_id, label in _elements(path, numbers, labels):
            try:
                clip = Clip(element_id, f"{element_id}{video_suffix}", split, {"action": label})
            except InputError as error:
                raise InputError(f"{place}: {error}") from error
            key = element_id.casefold()
            if key in places:
                raise InputError(f"{place}: id {element_id!r} already stands in {places[key]}")
            places[key], clips[key] = place, clip
    return Manifest(dataset, (Head("action", classes),), tuple(clips.values()), flip_allowed=False)


def read_something_else(
    splits: Mapping[str, Path],
    labels: Path,
    *,
    dataset: str = SOMETHING_ELSE,
    video_suffix: str = VIDEO_SUFFIX,
) -> Manifest:
    """Read Something-Else's split files (compositional, few-shot, ...) and log `LEAK_WARNING`."""
    log.warning(LEAK_WARNING)
    return read_something_something(splits, labels, dataset=dataset, video_suffix=video_suffix)


def read_class_list(labels: Path) -> tuple[str, ...]:
    """Return the class names of a labels.json in the order of their numbers, which must be 0, 1, 2, ...

    V2 writes the numbers as strings, Something-Else as whole numbers; both are read.
    """
    table = read_json(labels)
    if not isinstance(table, dict):
        raise InputError(f"{labels}: expected an object of class names and numbers")
    by_number: dict[int, str] = {}
    for name, value in table.items():
        number = _class_number(value)
        if number is None:
            raise InputError(f"{labels}: class {name!r} has {value!r} where a whole number from 0 is expected")
        if number in by_number:
            raise InputError(f"{labels}: number {number} belongs to {by_number[number]!r} and to {name!r}")
        by_number[number] = name
    missing = next((number for number in range(len(by_number)) if number not in by_number), None)
    if missing is not None:
        raise InputError(f"{labels}: {counted(len(by_number), 'class')}, but none has number {missing}")
    try:
        return Head("action", tuple(by_number[number] for number in range(len(by_number)))).classes
    except InputError as error:
        raise InputError(f"{labels}: {error}") from error


def _class_number(value: Any) -> int | None:
    if isinstance(value, str) and re.fullmatch(r"0|[1-9][0-9]{0,8}", value):
        return int(value)
    return value if type(value) is int and value >= 0 else None


def _elements(path: Path, numbers: Mapping[str, int], labels: Path) -> Iterator[tuple[str, str, int | None]]:
    """Yield (place, id, label number or None) for each element of a split file."""
    elements = read_json(path)
    if not isinstance(elements, list) or not elements:
        raise InputError(f"{path}: expected a list of elements {{id, label, template, placeholders}}")
    labelled = any(isinstance(element, dict) and "template" in element for element in elements)
    for number, element in enumerate(elements, 1):
        place = f"{path}: element {number}"
        if not isinstance(element, dict):
            raise InputError(f"{place}: expected an object with id and template, got {str(element)[:60]!r}")
        element_id = element.get("id")
        if not isinstance(element_id, str):
            got = f"got {element_id!r}" if "id" in element else "it has none"
            raise InputError(f'{place}: "id" must be a string (leading zeros count), {got}')
        yield place, element_id, _label(element, numbers, place=place, labels=labels) if labelled else None


def _label(element: Mapping[str, Any], numbers: Mapping[str, int], *, place: str, labels: Path) -> int:
    template = element.get("template")
    if not isinstance(template, str):
        raise InputError(f'{place}: id {element["id"]!r} has no "template", while other elements have one')
    name = template.replace("[", "").replace("]", "")
    if name not in numbers:
        raise InputError(f"{place}: template {template!r} names no class of {labels}; is it this split's file?")
    return numbers[name]
