"""The commands `mmkd-cache manifest …`: from published annotation files to a manifest."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from mmkd.cache_tools.process.command import FILE, FOLDER, PLACE, as_json, print_result
from mmkd.cache_tools.process.help_text import WholeHelpGroup, example
from mmkd.data_manifests.counted import counted
from mmkd.data_manifests.errors import InputError
from mmkd.data_manifests.kinds import MANIFEST, refuse_another
from mmkd.data_manifests.manifest import Manifest
from mmkd.data_manifests.manifest_file import save_manifest


@click.group(
    cls=WholeHelpGroup,
    epilog=example(
        "mmkd-cache manifest something-something --split train=train.json \\\n"
        "    --labels labels.json -o manifest.jsonl"
    ),
)
def manifest() -> None:
    """Make a manifest from a data set's published annotation files."""


videos_option = click.option(
    "--videos",
    type=PLACE,
    help="Folder of the videos, or an HDF5 file of frames, to check that those of the clips are there.",
)
out_option = click.option("-o", "--out", required=True, type=FILE, help="Manifest to write (JSON lines).")


def split_options(function: Any) -> Any:
    """Add the options that both Something data sets share."""
    options = (
        click.option(
            "--split",
            "splits",
            multiple=True,
            required=True,
            metavar="NAME=FILE",
            help="A split file; repeatable.",
        ),
        click.option("--labels", required=True, type=FILE, help="labels.json of the same data set."),
        videos_option,
        click.option("--suffix", default=".webm", show_default=True, help="Ending of the video files."),
        out_option,
        as_json,
    )
    for option in reversed(options):
        function = option(function)
    return function


@manifest.command(
    "something-something",
    epilog=example(
        "mmkd-cache manifest something-something --split train=train.json \\\n"
        "    --split validation=validation.json --labels labels.json \\\n"
        "    --videos videos -o manifest.jsonl"
    ),
)
@split_options
@click.option("--dataset", default="something-something-v2", show_default=True, help="Name of the data set.")
def something_something(**options: Any) -> None:
    """Read Something-Something V2's official train, validation and test files (or the demo's) and labels.json."""
    from mmkd.data_manifests.published.something import read_something_something

    made = read_something_something(
        _splits(options), options["labels"], video_suffix=options["suffix"], dataset=options["dataset"]
    )
    _write_manifest(made, options)


@manifest.command(
    "something-else",
    epilog=example(
        "mmkd-cache manifest something-else --split train=train.json \\\n"
        "    --split compositional=validation.json --labels labels.json \\\n"
        "    --videos videos -o manifest.jsonl"
    ),
)
@split_options
@click.option("--dataset", default="something-else", show_default=True, help="Name of the data set.")
def something_else(**options: Any) -> None:
    """Read Something-Else split files and their own labels.json.

    Compositional, or a part of few-shot: base and novel classes, 5 and 10 shots, have class numbers of their own,
    so each is a manifest with the labels.json beside it.
    """
    from mmkd.data_manifests.published.something import read_something_else

    made = read_something_else(
        _splits(options), options["labels"], video_suffix=options["suffix"], dataset=options["dataset"]
    )
    _write_manifest(made, options)


@manifest.command(
    "epic-kitchens",
    epilog=example(
        "mmkd-cache manifest epic-kitchens epic-kitchens-100-annotations \\\n"
        "    --videos EPIC-KITCHENS -o manifest.jsonl"
    ),
)
@click.argument("annotations", type=FOLDER)
@click.option("--split", "splits", multiple=True, metavar="NAME=FILE", help="In place of its files; repeatable.")
@click.option(
    "--layout",
    default="videos",
    show_default=True,
    help="videos (PXX/videos/PXX_YY.MP4), trimmed (a file for each narration), frames or tars (official RGB "
    "frames), or a path such as '{participant_id}/{video_id}.mp4'.",
)
@click.option("--participants", metavar="P01,P02", help="These alone.")
@click.option("--where", multiple=True, metavar="COLUMN=VALUE", help="Rows with this value alone; repeatable.")
@click.option("--dataset", default="epic-kitchens-100", show_default=True, help="Name of the data set.")
@videos_option
@out_option
@as_json
def epic_kitchens(**options: Any) -> None:
    """Read EPIC-KITCHENS-100's ANNOTATIONS, the folder of its CSV files: verb and noun of each narration.

    Evaluation groups: unseen, tail_verb, tail_noun and tail_action (verb or noun in the tail).
    """
    from mmkd.data_manifests.published.epic_kitchens import (
        EpicOptions,
        count_lines,
        group_counts,
        nearest_layout,
        read_epic_kitchens,
    )

    where = [tuple(text.split("=", 1)) for text in options["where"]]
    if wrong := next((text for text in options["where"] if "=" not in text), None):
        raise InputError(f"--where {wrong!r}: expected COLUMN=VALUE")
    participants = [name.strip() for name in (options["participants"] or "").split(",") if name.strip()]
    chosen = EpicOptions(options["layout"], frozenset(participants), [(name, value) for name, value in where])
    made = read_epic_kitchens(options["annotations"], chosen, _splits(options), options["dataset"])
    is_whole = not (participants or where or options["splits"])
    lines = count_lines(made, is_whole=is_whole)
    _write_manifest(made, options, group_counts(made), lines, lambda videos: nearest_layout(made, videos))


@manifest.command(
    "csv",
    epilog=example(
        "mmkd-cache manifest csv clips.csv --head action --dataset kitchen \\\n"
        "    --videos videos -o manifest.jsonl"
    ),
)
@click.argument("list", type=FILE)
@click.option(
    "--head", "heads", multiple=True, required=True, metavar="NAME[=COLUMN]", help="A column of labels; repeatable."
)
@click.option(
    "--classes",
    multiple=True,
    metavar="NAME=FILE",
    help="A head's class names: a text file, a CSV file of id and key, or a labels.json [default: those that "
    "occur].",
)
@click.option("--split", default="train", show_default=True, help="Split of all clips, without such a column.")
@click.option("--dataset", required=True, help="Name of the data set.")
@click.option("--flip-allowed", is_flag=True, help="A mirrored clip has the same labels.")
@click.option("--frames-per-second", type=float, help="Rate of frames that are stored as pictures.")
@videos_option
@out_option
@as_json
def csv_list(**options: Any) -> None:
    """Read a LIST of clips, a CSV file with the columns video, clip, split, start, end, groups and those of labels.

    All but video and the labels may be left out; start and end are seconds, or times such as 00:01:02.5.
    """
    from mmkd.data_manifests.published.csv_list import ListOptions, read_csv_list

    heads = {name: column or name for name, _, column in (text.partition("=") for text in options["heads"])}
    if len(heads) < len(options["heads"]):
        raise InputError("--head: each head has one column, and a name of its own")
    chosen = ListOptions(
        dataset=options["dataset"],
        heads=heads,
        classes=_named_files(options["classes"], "--classes"),
        split=options["split"],
        flip_allowed=options["flip_allowed"],
        frames_per_second=options["frames_per_second"],
    )
    _write_manifest(read_csv_list(options["list"], chosen), options)


def _splits(options: dict[str, Any]) -> dict[str, Path]:
    return _named_files(options["splits"], "--split")


def _named_files(texts: Sequence[str], option: str) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for text in texts:
        name, _, path = text.partition("=")
        if not path or name in files:
            raise InputError(f"{option} {text!r}: expected NAME=FILE, each name once")
        files[name] = Path(path)
    return files


def _write_manifest(
    made: Manifest,
    options: dict[str, Any],
    counts: Mapping[str, Any] | None = None,
    lines: Sequence[str] = (),
    nearest: Callable[[Path], str | None] = lambda videos: None,
) -> None:
    """Write a manifest and say what it holds, unless its videos are not there or another thing is in its place.

    `nearest` returns the layout that a video folder has where none of its videos is found.
    """
    out = options["out"]
    refuse_another(out, MANIFEST)
    missing = _missing_videos(made, options["videos"], nearest)
    save_manifest(made, out)
    splits = ", ".join(f"{name} {len(made.split(name))}{_without_labels(made, name)}" for name in made.splits)
    classes = ", ".join(f"{head.name} {len(head.classes)}" for head in made.heads)
    if options.get("as_json"):
        value = {
            "splits": counts or {name: {"clips": len(made.split(name))} for name in made.splits},
            "classes": {head.name: len(head.classes) for head in made.heads},
            "missing_videos": missing,
        }
        print_result(value, as_json=True, lines=[])
        return
    click.echo("\n".join([f"{out}: clips {splits}; classes {classes}", *lines]))


def _missing_videos(made: Manifest, videos: Path | None, nearest: Callable[[Path], str | None]) -> int | None:
    """Return how many videos are not below a folder, saying so; None where it is not asked. All are an error."""
    if videos is None:
        return None
    from mmkd.cache_tools.frames.data_frames import open_data_frames  # not at the top: help is to be quick
    from mmkd.cache_tools.frames.source import DEFAULT_LIMITS

    source = open_data_frames(videos, DEFAULT_LIMITS, "allow", made.frame_rates)
    names = dict.fromkeys(clip.video for clip in made.clips)
    missing = [name for name in names if not source.is_there(name)]
    if len(missing) == len(names):
        found = nearest(videos)
        hint = f"; it has the layout of --layout '{found}'" if found else ""
        raise InputError(f"none of {counted(len(names), 'video')} is in {videos}, e.g. {missing[0]}{hint}")
    if missing:
        text = f"{len(missing)} of {counted(len(names), 'video')} not found in {videos}, e.g. {missing[0]}"
        click.echo(text, err=True)
    return len(missing)


def _without_labels(made: Manifest, split: str) -> str:
    count = made.unlabelled(split)
    return f" ({count} without a label)" if count else ""
