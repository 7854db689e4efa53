"""The command `mmkd-cache detect`: a table of boxes, made with a detector of one's own."""

from pathlib import Path
from typing import Any

import click

from mmkd.cache_tools.process.command import (
    FILE,
    as_json,
    data_options,
    device_option,
    named_data,
    print_result,
    recipe_options,
)
from mmkd.cache_tools.process.help_text import WholeHelp, example
from mmkd.cache_tools.recipes.recipe import load_recipe
from mmkd.data_manifests.counted import counted
from mmkd.data_manifests.errors import InputError, TooManyUnusableError
from mmkd.pipeline.commands.boxes import report_lines
from mmkd.pipeline.detecting.detector_params import DETECTORS, DetectorParams
from mmkd.pipeline.recipe import TeacherRecipe


@click.command(
    cls=WholeHelp,
    epilog=example(
        "mmkd-cache detect --manifest manifest.jsonl --videos videos \\\n"
        "    --weights hands.pth --network fasterrcnn_resnet50_fpn --hand 1 \\\n"
        "    -o detections.h5"
    ),
)
@recipe_options
@data_options
@click.option("--weights", required=True, type=FILE, help="The detector's parameters; nothing is downloaded.")
@click.option("--network", required=True, type=click.Choice(DETECTORS), help="torchvision's name of it.")
@click.option("--hand", required=True, metavar="CLASSES", help="Its classes that are hands: 1, or 1,2.")
@click.option("--object", metavar="CLASSES", help="Its classes that are objects [default: all others].")
@click.option(
    "--min-score", type=click.FloatRange(0, 1), default=0.05, show_default=True, help="Lower ones are dropped."
)
@click.option(
    "--frames-per-second",
    type=click.FloatRange(min=0, min_open=True),
    help="Frames that are looked at [default: all].",
)
@click.option("--min-size", type=click.IntRange(16), help="Short side for the network [default: its own].")
@click.option("--max-size", type=click.IntRange(16), help="Bound on the long side [default: its own].")
@click.option(
    "--norm-eps",
    type=click.FloatRange(min=0),
    help="Of batch norms [default: 1e-5; 0 for torchvision's ResNet-50 file]; 0 if you tuned that one.",
)
@click.option("--batch", type=click.IntRange(1), default=8, show_default=True, help="Frames at once.")
@device_option
@click.option(
    "--max-unusable", type=click.IntRange(0), default=0, show_default=True, help="Videos that may be left out."
)
@click.option("-o", "--out", required=True, type=FILE, help="Table to write (HDF5).")
@as_json
def detect(files: tuple[Path, ...], overrides: tuple[str, ...], out: Path, **options: Any) -> None:
    """Find hands and objects in a manifest's videos with a torchvision detector; `--boxes` takes the table.

    Run it again and it continues.
    Exit code 3: written, but more videos are left out than --max-unusable; 75: interrupted, run me again.
    """
    recipe = load_recipe(TeacherRecipe, files=files, overrides=overrides, named=named_data(options))
    params = _params(options)
    from mmkd.cache_tools.frames.clip_set import ClipSet
    from mmkd.pipeline.detecting.detect import detect_videos
    from mmkd.student.training.devices import choose_device

    report = detect_videos(ClipSet(recipe.data), out, params, choose_device(options["device"]))
    print_result({"table": str(out), **vars(report)}, as_json=options["as_json"], lines=report_lines(out, report))
    if len(report.unusable) > options["max_unusable"]:
        raise TooManyUnusableError(
            f"{counted(len(report.unusable), 'video')} left out, more than --max-unusable {options['max_unusable']}"
        )


def _params(options: dict[str, Any]) -> DetectorParams:
    hand = _classes("hand", options["hand"])
    things = None if options["object"] is None else _classes("object", options["object"])
    if both := sorted(set(hand) & set(things or ())):
        raise InputError(f"class {both[0]} is in --hand and in --object")
    if not options["weights"].is_file():
        raise InputError(f"there is no weights file {options['weights']}; give one with --weights")
    return DetectorParams(
        network=options["network"],
        weights=options["weights"],
        hand=hand,
        object=things,
        min_score=options["min_score"],
        frames_per_second=options["frames_per_second"],
        min_size_px=options["min_size"],
        max_size_px=options["max_size"],
        norm_eps=options["norm_eps"],
        batch=options["batch"],
    )


def _classes(option: str, text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise InputError(f"--{option} {text!r} is not a list of class numbers such as 1 or 1,2")
    return tuple(sorted({int(part) for part in parts}))
