"""Anyone's own list of clips as a manifest: a CSV file with a line for each clip.

    video    path of its video below the video folder
    clip     id, unique; without the column a clip's id is its video's path, with the start where it has one
    split    name of its split; without the column all clips are in one
    start    seconds (12.5) or a time (00:01:02.34) from the video's start; empty: from its start
    end      likewise; empty: to its end
    groups   evaluation groups, separated by `;`
    ...      a column for each head: class names, or numbers from 0; empty: not known

Class lists come from files (a name in each line, or `id,key` as EPIC-KITCHENS has them, or a labels.json), or are
the names that occur, in the order of the alphabet; numbers without a list are their own names.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmkd.data_manifests.errors import InputError
from mmkd.data_manifests.manifest import Clip, FrameRate, Head, Manifest
from mmkd.data_manifests.published.csv_table import MOST_DIGITS, Row, read_table, read_text, require_column
from mmkd.data_manifests.published.something import read_class_list

CLIP, VIDEO, SPLIT, START, END, GROUPS = "clip", "video", "split", "start", "end", "groups"
OWN_COLUMNS = (CLIP, VIDEO, SPLIT, START, END, GROUPS)
GROUP_SEPARATOR = ";"


@dataclass(frozen=True)
class ListOptions:
    """How a list is read."""

    dataset: str
    """Name of the data set."""
    heads: Mapping[str, str]
    """Head -> its column."""
    classes: Mapping[str, Path]
    """Head -> file of its class names; without one they are those that occur."""
    split: str = "train"
    """The split of all clips, where the file has no such column."""
    flip_allowed: bool = False
    """Whether a horizontal flip keeps the labels true."""
    frames_per_second: float | None = None
    """Rate of frames that are stored as pictures."""


def read_csv_list(path: Path, options: ListOptions) -> Manifest:
    """Read a list; InputError names the file and the line, counted from 1."""
    if not options.heads:
        raise InputError("name a column of labels with --head, e.g. --head action")
    if unknown := sorted(options.classes.keys() - options.heads.keys()):
        raise InputError(
            f"--classes {unknown[0]}: there is no head of that name; there are {', '.join(options.heads)}"
        )
    rows = read_table(path, (VIDEO,))
    names = list(rows[0].values)
    for head, column in options.heads.items():
        if column in OWN_COLUMNS:
            raise InputError(f"--head {head}={column}: that column has a meaning of its own")
        require_column(column, names, path)
    heads = tuple(
        _head(head, column, rows, options.classes.get(head), path) for head, column in options.heads.items()
    )
    clips: list[Clip] = []
    places: dict[str, str] = {}
    for row in rows:
        clip = _clip(row, options, heads)
        key = clip.clip_id.casefold()
        if key in places:
            raise InputError(f"{row.place}: clip {clip.clip_id!r} already stands in {places[key]}")
        places[key] = row.place
        clips.append(clip)
    rates = () if options.frames_per_second is None else (FrameRate("*", options.frames_per_second),)
    return Manifest(options.dataset, heads, tuple(clips), options.flip_allowed, rates)


def read_classes(path: Path) -> tuple[str, ...]:
    """Return class names in the order of their numbers, from a file in one of the usual forms."""
    if path.suffix == ".json":
        return read_class_list(path)
    if path.suffix == ".csv":
        rows = read_table(path, ("id", "key"))
        if wrong := next((row for number, row in enumerate(rows) if row.values["id"] != str(number)), None):
            raise InputError(
                f"{wrong.place}: class id {wrong.values['id']!r} is out of order; they are 0, 1, 2, ..."
            )
        return tuple(row.text("key") for row in rows)
    return tuple(line.strip() for line in read_text(path).split("\n") if line.strip())


def _head(name: str, column: str, rows: Sequence[Row], classes: Path | None, path: Path) -> Head:
    values = {row.values[column] for row in rows} - {""}
    if classes is not None:
        names, where = read_classes(classes), classes
    elif values and all(value.isascii() and value.isdigit() for value in values):
        if too_long := next((row for row in rows if len(row.values[column].lstrip("0")) > MOST_DIGITS), None):
            raise InputError(
                f"{too_long.place}: {column} {too_long.values[column][:20]} is too large a class number"
            )
        names, where = tuple(str(number) for number in range(max(map(int, values)) + 1)), path
    else:
        names, where = tuple(sorted(values)), path
    try:
        return Head(name, names)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _clip(row: Row, options: ListOptions, heads: Sequence[Head]) -> Clip:
    start = row.seconds(START) if row.values.get(START) else 0.0
    end = row.seconds(END) if row.values.get(END) else None
    if end is not None and end <= start:
        raise InputError(f"{row.place}: the segment ends at {end:g} s, and begins at {start:g} s")
    video = row.text(VIDEO)
    groups = [name.strip() for name in row.values.get(GROUPS, "").split(GROUP_SEPARATOR)]
    try:
        return Clip(
            clip_id=row.text(CLIP) if CLIP in row.values else f"{video}@{start:g}" if start else video,
            video=video,
            split=row.text(SPLIT) if SPLIT in row.values else options.split,
            labels={head.name: _label(row, options.heads[head.name], head) for head in heads},
            start_seconds=start,
            end_seconds=end,
            groups=tuple(name for name in groups if name),
        )
    except InputError as error:
        text = str(error)
        raise InputError(text if text.startswith(row.place) else f"{row.place}: {text}") from error


def _label(row: Row, column: str, head: Head) -> int | None:
    text = row.values[column]
    if not text:
        return None
    if text in head.classes:
        return head.classes.index(text)
    if text.isascii() and text.isdigit():
        return row.number(column, len(head.classes), f"the {head.name} classes")
    raise InputError(f"{row.place}: {column} {text!r} is no class of head {head.name!r}")
