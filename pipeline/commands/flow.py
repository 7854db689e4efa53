"""The command `mmkd-cache flow`: optical flow as files."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mmkd.cache_tools.process.command import FILE, FOLDER, LocalPath, as_json, device_option, print_result
from mmkd.cache_tools.process.help_text import WholeHelp, example
from mmkd.cache_tools.process.place import place_options, task_place
from mmkd.data_manifests.counted import counted
from mmkd.data_manifests.errors import StorageError, TooManyUnusableError
from mmkd.pipeline.flow.file_names import LAYOUTS
from mmkd.pipeline.flow.flow_method import PRESETS, FlowMethod

if TYPE_CHECKING:
    from mmkd.pipeline.flow_command.options import FlowRequest

PRESETS_OF_METHODS = "; ".join(f"{method}: {', '.join(known)}" for method, known in PRESETS.items() if known)


@click.command(cls=WholeHelp, epilog=example("mmkd-cache flow videos -o flow --new-short 256 --bound 20"))
@click.argument("videos", nargs=-1, metavar="VIDEO...")
@click.option("--list", "lists", multiple=True, type=FILE, help="Text file with a video's path on each line.")
@click.option("--class-folder", is_flag=True, help="Call results CLASS/NAME, after the folder a video lies in.")
@click.option("--keep-ending", is_flag=True, help="Call results NAME.mp4, with the video's ending, not NAME.")
@click.option("-o", "--out", required=True, type=LocalPath(path_type=Path), help="Folder, or one file NAME.h5.")
@click.option(
    "--layout",
    type=click.Choice(LAYOUTS),
    help="Files, names, frame sizes [default: denseflow; hdf5 for -o NAME.h5].",
)
@click.option("--method", type=click.Choice(list(PRESETS)), default="tvl1", show_default=True, help="Algorithm.")
@click.option("--preset", help=f"{PRESETS_OF_METHODS} [default: the first].")
@click.option("--weights", type=FILE, help="raft: torchvision's weights, safetensors or a state dict.")
@click.option(
    "-b",
    "--bound",
    "bound_px",
    type=int,
    default=20,
    show_default=True,
    help="Flow in pixels stored as code 255; larger flow is clipped.",
)
@click.option(
    "-s",
    "--step",
    type=int,
    default=1,
    show_default=True,
    help="Frames between the two of a pair (negative: backward flow).",
)
@click.option(
    "--stride",
    type=int,
    default=1,
    show_default=True,
    help="epic: frames from the start of a pair to that of the next.",
)
@click.option(
    "--short-side",
    "--new-short",
    "new_short",
    type=int,
    default=0,
    help="Short side of larger frames [default: 256 for epic and i3d, else the video's].",
)
@click.option(
    "--enlarge", is_flag=True, help="Enlarge smaller frames to the short side, too; EPIC's tool and I3D do."
)
@click.option("--new-width", type=int, default=0, help="Width of the frames, the height in proportion or as given.")
@click.option(
    "--new-height", type=int, default=0, help="Height of the frames, the width in proportion or as given."
)
@click.option("--preview", type=FOLDER, help="Folder for a picture of each video: frames over colour-coded flow.")
@click.option(
    "--workers", type=click.IntRange(0), help="Processes that decode and, on a CPU, compute [default: cores]."
)
@place_options
@click.option("--max-unusable", type=click.IntRange(0), default=0, show_default=True, help="Videos that may fail.")
@device_option
@as_json
def flow(videos: tuple[str, ...], **options: Any) -> None:
    """Compute optical flow of videos, folders or @LIST into the files that denseflow, EPIC or I3D would write.

    What is there already is kept; several runs into one folder share the work. Exit code 3: finished, but videos
    failed; 75: interrupted, run me again.
    """
    from mmkd.pipeline.flow_command.run import run_flow

    report = run_flow(flow_request(videos, options))
    value = asdict(report)
    print_result(value, as_json=options["as_json"], lines=report.lines(options["out"]))
    for video, reason in report.failed.items():
        click.echo(f"{video}: {reason}", err=True)
    if report.faults:
        raise StorageError(
            f"{counted(len(report.faults), 'video')} failed by a fault of the machine, not of its own; fix it and "
            "run again: the flow of the others is kept"
        )
    if len(report.failed) > options["max_unusable"]:
        raise TooManyUnusableError(
            f"{counted(len(report.failed), 'video', ('has', 'have'))} no flow, more than "
            f"--max-unusable {options['max_unusable']}; "
            "the reasons are above, and the flow of the others is complete"
        )


def flow_request(videos: tuple[str, ...], values: dict[str, Any]) -> "FlowRequest":
    """Return what click's values ask for; InputError for those that do not go together."""
    from mmkd.data_manifests.video_files import Naming
    from mmkd.pipeline.flow_command.options import FlowOptions, FlowRequest, is_one_file

    return FlowRequest(
        videos=videos,
        lists=values["lists"],
        naming=Naming(class_folder=values["class_folder"], keep_ending=values["keep_ending"]),
        out=values["out"],
        options=FlowOptions(
            layout=values["layout"] or ("hdf5" if is_one_file(values["out"]) else "denseflow"),
            method=FlowMethod(values["method"], values["preset"], values["weights"]),
            step=values["step"],
            stride=values["stride"],
            bound_px=values["bound_px"],
            new_short=values["new_short"],
            new_width=values["new_width"],
            new_height=values["new_height"],
            enlarge=values["enlarge"],
        ),
        device=values["device"],
        workers=values["workers"],
        preview=values["preview"],
        task=task_place(values["task"], values["tasks"]),
    )
