"""EPIC-KITCHENS-100's annotation files as a manifest with the heads verb and noun.

The publisher's columns give narration, participant, video, start and stop as times, and the classes' numbers. Times
are what counts: the frame numbers beside them are those of a nominal rate (60 a second for PXX_YY, 50 for PXX_1YY),
which most videos do not have. Evaluation groups are the scorer's: `unseen` participants, `tail_verb`, `tail_noun`,
and `tail_action`, whose verb or noun is in the tail. Rows without class columns, as those of the test split, have
no labels.
"""

import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mmkd.data_manifests.counted import counted
from mmkd.data_manifests.errors import InputError
from mmkd.data_manifests.manifest import Clip, FrameRate, Head, Manifest
from mmkd.data_manifests.published.csv_table import Row, read_table, require_column

EPIC_KITCHENS = "epic-kitchens-100"
SPLIT_FILES = {
    "train": "EPIC_100_train.csv",
    "validation": "EPIC_100_validation.csv",
    "test": "EPIC_100_test_timestamps.csv",
}
"""Split -> the publisher's file."""
TRAIN = "train"
CLASS_FILES = {"verb": "EPIC_100_verb_classes.csv", "noun": "EPIC_100_noun_classes.csv"}
TAIL_FILES = {"verb": "EPIC_100_tail_verbs.csv", "noun": "EPIC_100_tail_nouns.csv"}
UNSEEN_FILE = "EPIC_100_unseen_participant_ids_validation.csv"
VIDEO_INFO_FILE = "EPIC_100_video_info.csv"
ROUNDING_SECONDS = 0.01
"""Time stamps are written in hundredths."""
PUBLISHED_COUNTS = {
    "train": {"clips": 67_217},
    "validation": {"clips": 9_668, "unseen": 1_065, "tail_verb": 1_760, "tail_noun": 1_900, "tail_action": 3_105},
    "test": {"clips": 13_092},
}
"""Split -> what -> how many clips; of the groups counted from the publisher's files."""
COLUMNS = ("narration_id", "participant_id", "video_id", "start_timestamp", "stop_timestamp")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Layout:
    """Where a clip's frames lie."""

    video: str
    """Path below the video folder, with the names of columns in braces."""
    is_whole_video: bool = False
    """Whether the file is the clip."""
    frame_rates: tuple[FrameRate, ...] = ()
    """Rates of frames stored as pictures."""


NOMINAL_RATES = (60.0, 50.0)
"""Frames a second of official frame folders: of PXX_YY, and of PXX_1YY."""
PICTURE_SUFFIXES = ("", ".tar")
"""Endings of a path of one's own that names stored pictures: a folder, or a tar."""
OWN_RATES = (FrameRate("*P??_1[0-9][0-9]*", NOMINAL_RATES[1]), FrameRate("*", NOMINAL_RATES[0]))
"""Of such a path, whatever stands around the video's id."""
LAYOUTS = {
    "videos": Layout("{participant_id}/videos/{video_id}.MP4"),
    "trimmed": Layout("{participant_id}/{narration_id}.mp4", is_whole_video=True),
    "frames": Layout(
        "{participant_id}/rgb_frames/{video_id}",
        frame_rates=(FrameRate("*/P??_1??", NOMINAL_RATES[1]), FrameRate("*", NOMINAL_RATES[0])),
    ),
    "tars": Layout(
        "{participant_id}/rgb_frames/{video_id}.tar",
        frame_rates=(FrameRate("*/P??_1??.tar", NOMINAL_RATES[1]), FrameRate("*", NOMINAL_RATES[0])),
    ),
}
"""Name -> layout: as the official script downloads videos, a file for each narration, official frames."""
OTHER_PATHS = (
    "{participant_id}/{video_id}.MP4",
    "{video_id}.MP4",
    "{participant_id}/videos/{video_id}.mp4",
    "{participant_id}/{video_id}.mp4",
    "{video_id}.mp4",
    "{narration_id}.mp4",
    "{participant_id}/{video_id}",
    "{video_id}",
    "{participant_id}/{video_id}.tar",
    "{video_id}.tar",
)
"""Arrangements that people have besides: `--layout` takes each as it stands."""


@dataclass(frozen=True)
class EpicOptions:
    """Which clips, and where their frames lie."""

    layout: str = "videos"
    """A name of `LAYOUTS`, or a path of a video with the names of columns in braces."""
    participants: Collection[str] = ()
    """Those alone; empty: all."""
    where: Sequence[tuple[str, str]] = ()
    """(column, value): rows that have these values alone."""


def read_epic_kitchens(
    annotations: Path, options: EpicOptions, splits: Mapping[str, Path] | None = None, dataset: str = EPIC_KITCHENS
) -> Manifest:
    """Read a folder of the official annotation files; `splits` (name -> file) replaces its split files.

    InputError names the file and the line, counted from 1.
    """
    if missing := next((name for name in CLASS_FILES.values() if not (annotations / name).exists()), None):
        raise InputError(f"{annotations} lacks {missing}; give the folder of the official annotation files")
    heads = tuple(Head(name, _classes(annotations / file)) for name, file in CLASS_FILES.items())
    groups = _Groups.read(annotations)
    layout = layout_of(options.layout)
    clips: list[Clip] = []
    places: dict[str, str] = {}
    tables = {split: read_table(path, COLUMNS) for split, path in (splits or _split_files(annotations)).items()}
    _check_filters(options, tables, annotations)
    _warn_of_ends([row for rows in tables.values() for row in rows if _is_wanted(row, options)], annotations)
    for split, rows in tables.items():
        for row in (row for row in rows if _is_wanted(row, options)):
            clip = _clip(row, split, heads, layout, groups)
            if clip.clip_id in places:
                raise InputError(f"{row.place}: {clip.clip_id!r} already stands in {places[clip.clip_id]}")
            places[clip.clip_id] = row.place
            clips.append(clip)
    if not clips:
        raise InputError(f"no row of {annotations} is left by --participants and --where")
    return Manifest(dataset, heads, tuple(clips), flip_allowed=False, frame_rates=layout.frame_rates)


def layout_of(text: str) -> Layout:
    """Return a layout by its name, or by a path with columns in braces; InputError for anything else."""
    if text in LAYOUTS:
        return LAYOUTS[text]
    if "{" in text:
        is_pictures = PurePosixPath(text).suffix.lower() in PICTURE_SUFFIXES
        return Layout(text, frame_rates=OWN_RATES if is_pictures else ())
    raise InputError(
        f"--layout {text!r}: choose among {', '.join(LAYOUTS)}, or give a path with columns in braces, such as "
        f"'{LAYOUTS['videos'].video}'"
    )


def group_counts(manifest: Manifest) -> dict[str, dict[str, int]]:
    """Return split -> `clips` and each evaluation group -> how many clips."""
    found: dict[str, dict[str, int]] = {}
    for split in manifest.splits:
        groups = Counter(group for clip in manifest.split(split) for group in clip.groups)
        found[split] = {"clips": len(manifest.split(split)), **dict(sorted(groups.items()))}
    return found


def _split_files(annotations: Path) -> dict[str, Path]:
    there = {split: annotations / name for split, name in SPLIT_FILES.items() if (annotations / name).is_file()}
    if not there:
        raise InputError(
            f"{annotations} holds none of {', '.join(SPLIT_FILES.values())}: give the folder of the official "
            "annotations, or each file with --split NAME=FILE"
        )
    return there


def _classes(path: Path) -> tuple[str, ...]:
    """Return class names in the order of their numbers, which must be 0, 1, 2, ..."""
    rows = read_table(path, ("id", "key"))
    for number, row in enumerate(rows):
        if row.text("id") != str(number):
            raise InputError(f"{row.place}: class id {row.text('id')!r} where {number} is expected")
    try:
        return Head("head", tuple(row.text("key") for row in rows)).classes
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


@dataclass(frozen=True)
class _Groups:
    """What puts a clip into evaluation groups."""

    unseen: frozenset[str]
    """Participants without a video in training."""
    tail: Mapping[str, frozenset[str]]
    """Head -> class numbers, as text."""

    @classmethod
    def read(cls, annotations: Path) -> "_Groups":
        """Read the lists that are there; one that is not gives no group."""

        def values(name: str, column: str) -> frozenset[str]:
            path = annotations / name
            return (
                frozenset(row.text(column) for row in read_table(path, (column,))) if path.exists() else frozenset()
            )

        return cls(
            values(UNSEEN_FILE, "participant_id"), {head: values(name, head) for head, name in TAIL_FILES.items()}
        )

    def of(self, row: Row) -> tuple[str, ...]:
        """Return the groups of a row."""
        tail = [head for head, numbers in self.tail.items() if row.values.get(f"{head}_class") in numbers]
        names = ["unseen"] if row.values["participant_id"] in self.unseen else []
        return tuple(names + [f"tail_{head}" for head in tail] + (["tail_action"] if tail else []))


def nearest_layout(manifest: Manifest, videos: Path) -> str | None:
    """Return another layout of which a folder holds a clip's file: a name of `LAYOUTS`, or a path in braces."""
    ids = [clip.clip_id for clip in manifest.clips]  # PXX_YY_N
    rows = [{"participant_id": i[:3], "video_id": i.rpartition("_")[0], "narration_id": i} for i in ids]
    for name, path in [
        *((name, layout.video) for name, layout in LAYOUTS.items()),
        *((path, path) for path in OTHER_PATHS),
    ]:
        if any((videos / file).exists() for file in dict.fromkeys(path.format_map(row) for row in rows)):
            return name
    return None


def _check_filters(options: EpicOptions, tables: Mapping[str, Sequence[Row]], annotations: Path) -> None:
    """Raise InputError for a participant or a column of --where that no split has; the test split has fewer."""
    there = {row.values["participant_id"] for rows in tables.values() for row in rows}
    if absent := sorted(set(options.participants) - there):
        raise InputError(
            f"--participants {absent[0]}: no row of {annotations} has it; there are {min(there)} to {max(there)}"
        )
    names = list(dict.fromkeys(column for rows in tables.values() for column in rows[0].values))
    for column, _ in options.where:
        require_column(column, names, annotations)


def _warn_of_ends(rows: Sequence[Row], annotations: Path) -> None:
    """Log how many segments end after their video, where the publisher's list of videos is there."""
    path = annotations / VIDEO_INFO_FILE
    if not path.exists():
        return
    durations = {
        row.text("video_id"): row.seconds("duration") for row in read_table(path, ("video_id", "duration"))
    }
    late = [
        row
        for row in rows
        if row.seconds("stop_timestamp") > durations.get(row.values["video_id"], float("inf")) + ROUNDING_SECONDS
    ]
    if late:
        text, video = late[0].values["stop_timestamp"], late[0].values["video_id"]
        log.warning(
            "%s: the segment ends at %s, after video %s, which has %g s (%s of this kind in all): a build records "
            "such clips as unusable; data.clip_segments=true clips their ends",
            late[0].place,
            text,
            video,
            durations[video],
            counted(len(late), "segment"),
        )


def _is_wanted(row: Row, options: EpicOptions) -> bool:
    chosen = not options.participants or row.values["participant_id"] in options.participants
    return chosen and all(row.values.get(column) == value for column, value in options.where)


def _clip(row: Row, split: str, heads: Sequence[Head], layout: Layout, groups: _Groups) -> Clip:
    start, stop = row.seconds("start_timestamp"), row.seconds("stop_timestamp")
    if stop <= start:
        raise InputError(f"{row.place}: the segment ends at {stop:g} s, and begins at {start:g} s")
    labels = {head.name: _label(row, head) for head in heads}
    try:
        video = layout.video.format_map(row.values)
    except (KeyError, ValueError, IndexError, AttributeError) as error:
        known = ", ".join(f"{{{name}}}" for name in row.values)
        raise InputError(f"--layout {layout.video!r}: {error} is no column in braces; there are {known}") from None
    whole = layout.is_whole_video
    try:
        return Clip(
            clip_id=row.text("narration_id"),
            video=video,
            split=split,
            labels=labels,
            start_seconds=0.0 if whole else start,
            end_seconds=None if whole else stop,
            groups=() if split == TRAIN else groups.of(row),
        )
    except InputError as error:
        raise InputError(f"{row.place}: {error}") from error


def _label(row: Row, head: Head) -> int | None:
    column = f"{head.name}_class"
    return row.number(column, len(head.classes), f"the {head.name} classes") if column in row.values else None


def count_lines(manifest: Manifest, *, is_whole: bool) -> list[str]:
    """Return a line for each split with its counts, beside the published ones where the data set `is_whole`."""
    lines = []
    for split, found in group_counts(manifest).items():
        published = PUBLISHED_COUNTS.get(split, {}) if is_whole else {}
        texts = [
            (counted(count, "clip") if what == "clips" else f"{what} {count}")
            + (f" (published: {published[what]})" if what in published else "")
            for what, count in found.items()
        ]
        lines.append(f"{split}: {', '.join(texts)}")
    return lines
