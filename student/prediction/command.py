"""The command `mmkd-student predict`: what a finished student says of videos."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from mmkd.cache_tools.process.command import (
    FILE,
    FOLDER,
    Function,
    as_json,
    device_option,
    print_result,
    trust_option,
)
from mmkd.cache_tools.process.help_text import WholeHelp, example
from mmkd.cache_tools.process.interrupt import stop_on_signals
from mmkd.data_manifests.atomic import write_atomically
from mmkd.data_manifests.counted import counted
from mmkd.data_manifests.errors import InputError, TooManyUnusableError
from mmkd.data_manifests.kinds import PREDICTIONS, refuse_another
from mmkd.data_manifests.video_files import named_videos
from mmkd.student.training.launcher import refuse_several_processes

if TYPE_CHECKING:
    from mmkd.student.data.evaluation_views import EvaluationLook

log = logging.getLogger("mmkd")
CROPS: dict[str, Literal[1, 3]] = {"1": 1, "3": 3}
"""What --crops takes."""


def look_options(function: Function) -> Function:
    """Add --views and --crops: the evaluation views of each clip, whatever a cache holds."""
    views = click.option(
        "--views", type=click.IntRange(1, 32), help="Places in time of each clip [default: the run's or cache's]."
    )
    crops = click.option(
        "--crops", type=click.Choice(list(CROPS)), help="Windows at each place [default: the run's or cache's]."
    )
    return views(crops(function))


def asked_look(options: dict[str, Any]) -> "EvaluationLook | None":
    """Return what `look_options` ask for; None where they are not given."""
    from mmkd.student.data.evaluation_views import EvaluationLook

    views, crops = options["views"], options["crops"]
    return None if views is None and crops is None else EvaluationLook(views, CROPS.get(crops))


@click.command(
    cls=WholeHelp,
    epilog=example(
        "mmkd-student predict runs/student clip.webm",
        "mmkd-student predict runs/student long.mp4 --window-s 2 --csv found.csv",
    ),
)
@click.argument("run", type=FOLDER)
@click.argument("videos", nargs=-1, metavar="VIDEO...")
@click.option("--list", "lists", multiple=True, type=FILE, help="Text file with a video's path on each line.")
@click.option("--top-k", type=click.IntRange(1), default=5, show_default=True, help="Classes of each head.")
@click.option("--window-s", type=float, help="Slide a window of so many seconds over each video.")
@click.option("--stride-s", type=float, help="Seconds from one window to the next [default: --window-s].")
@look_options
@click.option("--csv", type=FILE, help="Write a row for each clip, head and class.")
@click.option("--batch-size", type=click.IntRange(1), help="Views at once [default: 32, as evaluate has].")
@click.option("--workers", type=click.IntRange(0), default=0, show_default=True, help="Processes that probe.")
@trust_option
@device_option
@as_json
def predict(videos: tuple[str, ...], **options: Any) -> None:
    """Name the classes of videos, folders or @LIST by a finished RUN, which needs neither cache nor manifest.

    A clip of the test split gets the logits of `mmkd-student evaluate`, bit for bit, on the same device; another
    --batch-size changes them by rounding, and takes less time where few clips are asked for. Exit code 3:
    finished, but some videos could not be read.
    """
    refuse_several_processes("mmkd-student predict")
    if options["csv"]:
        refuse_another(options["csv"], PREDICTIONS, "--csv")
    if options["stride_s"] is not None and options["window_s"] is None:
        raise click.UsageError("--stride-s needs --window-s")
    paths = [Path(video.path) for video in named_videos(videos, lists=options["lists"])]
    from mmkd.student.evaluation.trained import load_student
    from mmkd.student.prediction import predictions
    from mmkd.student.prediction.predict_videos import predict_videos
    from mmkd.student.prediction.video_clips import Windows
    from mmkd.student.training.devices import choose_device

    window, stride, top_k = (options[name] for name in ("window_s", "stride_s", "top_k"))
    windows = None if window is None else Windows(window, window if stride is None else stride)
    student = load_student(options["run"], choose_device(options["device"]), options["trusted"])
    if (look := asked_look(options)) is not None:
        student = replace(student, policy=look.of(student.policy))
    batch = {} if options["batch_size"] is None else {"batch_size": options["batch_size"]}
    with stop_on_signals() as stop, stop.at_once("nothing was written"):
        found = predict_videos(student, paths, windows=windows, workers=options["workers"], **batch)
    unread = predictions.unread_lines(found)
    if not found.clips:
        raise InputError(nothing_read(unread))
    for line in unread:
        log.warning(line)
    if options["csv"]:
        write_atomically(options["csv"], predictions.as_csv(found, top_k))
    value = {"run": str(options["run"]), **predictions.as_json(found, top_k)}
    lines = list(predictions.as_lines(found, top_k, with_times=windows is not None))
    print_result(value, as_json=options["as_json"], lines=lines)
    if unread:
        raise TooManyUnusableError(
            f"{counted(len(unread), 'clip')} could not be read, {counted(len(found.clips), 'clip')} could; "
            f"the first one, {unread[0]}"
        )


def nothing_read(unread: list[str]) -> str:
    """Return in one line why there is no prediction."""
    if len(unread) > 1:
        return f"none of {counted(len(unread), 'video')} can be read; the first one, {unread[0]}"
    return unread[0] if unread else "no frame begins in any window; give a longer --window-s"
