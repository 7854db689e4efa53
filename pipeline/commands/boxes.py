"""The command `mmkd-cache boxes`: detections that others publish, as one table that `teach` and `build` read."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mmkd.cache_tools.cache.fingerprints import file_sha256
from mmkd.cache_tools.process.command import FILE, as_json, print_result
from mmkd.cache_tools.process.help_text import WholeHelp, example
from mmkd.cache_tools.process.progress import Progress
from mmkd.data_manifests.counted import counted

if TYPE_CHECKING:
    from mmkd.pipeline.detections.epic_hand_objects import Thresholds
    from mmkd.pipeline.detections.records import VideoDetections

FORM = "epic-hand-objects"


@click.command(
    cls=WholeHelp,
    epilog=example("mmkd-cache boxes P01_01.pkl P01_101.pkl --form epic-hand-objects \\\n    -o detections.h5"),
)
@click.argument("sources", nargs=-1, required=True, type=FILE)
@click.option("--form", required=True, type=click.Choice([FORM]), help="Whose form the files have.")
@click.option(
    "--fps",
    type=click.FloatRange(min=0, min_open=True),
    help="Rate that frame numbers count [default: 60 of P01_01, 50 of P01_101].",
)
@click.option("--hand-threshold", type=click.FloatRange(0, 1), default=0.1, show_default=True, help="Lowest score.")
@click.option(
    "--object-threshold", type=click.FloatRange(0, 1), default=0.01, show_default=True, help="Lowest score."
)
@click.option("-o", "--out", required=True, type=FILE, help="Table to write (HDF5).")
@as_json
def boxes(
    sources: tuple[Path, ...],
    *,
    form: str,
    fps: float | None,
    hand_threshold: float,
    object_threshold: float,
    out: Path,
    as_json: bool,
) -> None:
    """Make one table of detections from published files, one a video."""
    from mmkd.pipeline.detections.epic_hand_objects import Thresholds
    from mmkd.pipeline.detections.table import DetectionTable, write_table

    if out.exists():
        DetectionTable(out)  # refuses to write over anything else
    thresholds = Thresholds(hand_threshold, object_threshold)
    about = {
        "form": form,
        "fps": fps,
        "hand_threshold": hand_threshold,
        "object_threshold": object_threshold,
        "sources_sha256": sorted(file_sha256(path) for path in sources),
    }
    with Progress("reading detections", total=len(sources), unit="video") as progress:
        counts = write_table(out, _videos(sources, fps, thresholds, progress), about)
    nouns = ("video", "frame", "box")
    line = ", ".join(counted(count, noun) for count, noun in zip(counts.values(), nouns, strict=True))
    print_result({"table": str(out), **counts}, as_json=as_json, lines=[f"{out}: {line}"])


def _videos(
    sources: Sequence[Path], fps: float | None, thresholds: "Thresholds", progress: Progress
) -> Iterator["VideoDetections"]:
    from mmkd.pipeline.detections.epic_hand_objects import read_epic_video

    for path in sources:
        yield read_epic_video(path, fps=fps, thresholds=thresholds)
        progress.advance(1)
