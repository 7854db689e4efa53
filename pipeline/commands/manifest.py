"""The commands `mmkd-cache manifest …`: from published annotation files to a manifest."""

from pathlib import Path
from typing import Any

import click

from mmkd.cache_tools.process.command import FILE, FOLDER
from mmkd.cache_tools.process.help_text import WholeHelpGroup, example
from mmkd.data_manifests.counted import counted
from mmkd.data_manifests.errors import InputError
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
        click.option("--videos", type=FOLDER, help="Video folder, to check that the clips' files are there."),
        click.option("--suffix", default=".webm", show_default=True, help="Ending of the video files."),
        click.option("-o", "--out", required=True, type=FILE, help="Manifest to write (JSON lines)."),
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
    from mmkd.data_manifests.something import read_something_something

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
    """Read Something-Else split files (compositional, few-shot) and their labels.json."""
    from mmkd.data_manifests.something import read_something_else

    made = read_something_else(
        _splits(options), options["labels"], video_suffix=options["suffix"], dataset=options["dataset"]
    )
    _write_manifest(made, options)


def _splits(options: dict[str, Any]) -> dict[str, Path]:
    splits: dict[str, Path] = {}
    for text in options["splits"]:
        name, _, path = text.partition("=")
        if not path or name in splits:
            raise InputError(f"--split {text!r}: expected NAME=FILE, each name once")
        splits[name] = Path(path)
    return splits


def _write_manifest(made: Manifest, options: dict[str, Any]) -> None:
    videos = options["videos"]
    if videos is not None:
        missing = [clip for clip in made.clips if not (videos / clip.video).is_file()]
        if len(missing) == len(made.clips):
            raise InputError(f"none of {counted(len(made.clips), 'video')} is in {videos}, e.g. {missing[0].video}")
        if missing:
            click.echo(
                f"{len(missing)} of {counted(len(made.clips), 'video')} not found in {videos}, "
                f"e.g. {missing[0].video}",
                err=True,
            )
    save_manifest(made, options["out"])
    counts = ", ".join(f"{name} {len(made.split(name))}{_without_labels(made, name)}" for name in made.splits)
    classes = ", ".join(f"{head.name} {len(head.classes)}" for head in made.heads)
    click.echo(f"{options['out']}: clips {counts}; classes {classes}")


def _without_labels(made: Manifest, split: str) -> str:
    count = made.unlabelled(split)
    return f" ({count} without a label)" if count else ""
