"""The command `mmkd-cache boxes`: boxes that others publish, as one table that `teach` and `build` read."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mmkd.cache_tools.cache.fingerprints import file_sha256
from mmkd.cache_tools.process.command import FILE, as_json, data_options, named_data, print_result
from mmkd.cache_tools.process.help_text import WholeHelp, example
from mmkd.cache_tools.process.progress import Progress
from mmkd.cache_tools.recipes.recipe import load_recipe
from mmkd.data_manifests.counted import counted
from mmkd.data_manifests.errors import InputError, TooManyUnusableError, VideoError
from mmkd.pipeline.recipe import TeacherRecipe

if TYPE_CHECKING:
    from mmkd.pipeline.detections.pixel_boxes import Sizes
    from mmkd.pipeline.detections.records import Unusable, VideoDetections
    from mmkd.pipeline.detections.table_writer import TableReport

EPIC, SOMETHING_ELSE, AUTHORS = "epic-hand-objects", "something-else", "authors"
VIDEOS_FPS = 12.0
"""Rate that frames of Something-Something count."""


@click.command(
    cls=WholeHelp,
    epilog=example("mmkd-cache boxes P01_01.pkl P01_101.pkl --form epic-hand-objects \\\n    -o detections.h5"),
)
@click.argument("sources", nargs=-1, required=True, type=FILE)
@click.option(
    "--form",
    required=True,
    type=click.Choice([SOMETHING_ELSE, AUTHORS, EPIC]),
    help="Whose form the files have.",
)
@data_options
@click.option(
    "--frame-size",
    metavar="WxH",
    help="something-else: size of all videos in pixels, in place of --manifest and --videos.",
)
@click.option(
    "--fps",
    type=click.FloatRange(min=0, min_open=True),
    help="Rate that frame numbers count [default: 12; of EPIC's P01_01 60, of P01_101 50].",
)
@click.option(
    "--hand-threshold", type=click.FloatRange(0, 1), default=0.1, show_default=True, help="EPIC: lowest score."
)
@click.option(
    "--object-threshold", type=click.FloatRange(0, 1), default=0.01, show_default=True, help="EPIC: lowest score."
)
@click.option(
    "--max-unusable", type=click.IntRange(0), default=0, show_default=True, help="Videos that may be left out."
)
@click.option("-o", "--out", required=True, type=FILE, help="Table to write (HDF5).")
@as_json
def boxes(sources: tuple[Path, ...], form: str, out: Path, **options: Any) -> None:
    """Make one table of boxes from published files.

    Something-Else states no sizes of its videos: they are probed where --manifest and --videos are given. Then
    only the manifest's videos are taken.
    Exit code 3: written, but more videos are left out than --max-unusable.
    """
    from mmkd.pipeline.detections.table import DetectionTable
    from mmkd.pipeline.detections.table_writer import write_table

    if out.exists():
        DetectionTable(out)  # refuses to write over anything else
    sizes = _sizes(form, options)
    about = {
        "form": form,
        "fps": options["fps"],
        "hand_threshold": options["hand_threshold"],
        "object_threshold": options["object_threshold"],
        "sources_sha256": sorted(file_sha256(path) for path in sources),
    }
    with Progress("reading boxes", total=len(sources), unit="file") as progress:
        report = write_table(out, _videos(sources, form, options, sizes, progress), about)
    print_result({"table": str(out), **vars(report)}, as_json=options["as_json"], lines=report_lines(out, report))
    if len(report.unusable) > options["max_unusable"]:
        raise TooManyUnusableError(
            f"{counted(len(report.unusable), 'video')} left out, more than --max-unusable {options['max_unusable']}"
        )


def report_lines(out: Path, report: "TableReport") -> list[str]:
    """Return what a table has and what was left out, for people."""
    counts = (report.videos, "video"), (report.frames, "frame"), (report.boxes, "box")
    left_out = [f"left out: {video}: {reason}" for video, reason in report.unusable.items()]
    return [f"{out}: {', '.join(counted(*count) for count in counts)}", *left_out]


def _videos(
    sources: tuple[Path, ...], form: str, options: dict[str, Any], sizes: "Sizes | None", progress: Progress
) -> Iterator["VideoDetections | Unusable"]:
    from mmkd.pipeline.detections.pixel_boxes import read_authors, read_something_else

    fps, count = options["fps"] or VIDEOS_FPS, 0
    for path in sources:
        if form == EPIC:
            videos = iter([_epic_video(path, options)])
        elif form == AUTHORS:
            videos = read_authors(path, fps=fps, sizes=sizes)
        else:
            assert sizes is not None
            videos = read_something_else(path, fps=fps, sizes=sizes)
        for video in videos:
            yield video
            count += 1
            progress.advance(0, note=counted(count, "video"))
        progress.advance(1)


def _epic_video(path: Path, options: dict[str, Any]) -> "VideoDetections | Unusable":
    from mmkd.pipeline.detections.epic_hand_objects import Thresholds, read_epic_video
    from mmkd.pipeline.detections.records import Unusable

    thresholds = Thresholds(options["hand_threshold"], options["object_threshold"])
    try:
        return read_epic_video(path, fps=options["fps"], thresholds=thresholds)
    except VideoError as error:
        return Unusable(path.stem, str(error))


def _sizes(form: str, options: dict[str, Any]) -> "Sizes | None":
    """Return where sizes of videos come from; None where the files state them and all videos are wanted."""
    from mmkd.pipeline.detections.pixel_boxes import one_size

    named, size = named_data(options), options["frame_size"]
    has_data = named["data.manifest"] is not None or named["data.videos"] is not None
    if (has_data and form == EPIC) or (size is not None and (has_data or form != SOMETHING_ELSE)):
        raise InputError(f"--form {form} takes no --frame-size, or not with --manifest and --videos")
    if has_data:
        return _probed_sizes(load_recipe(TeacherRecipe, files=(), overrides=(), named=named))
    if size is not None:
        with suppress(ValueError):
            width, height = map(int, size.split("x"))
            if width > 0 and height > 0:
                return one_size(width, height)
        raise InputError(f"--frame-size {size!r} is not of the form 427x240")
    if form == SOMETHING_ELSE:
        raise InputError(
            "boxes in pixels need the sizes of the videos: give --manifest and --videos, or --frame-size"
        )
    return None


def _probed_sizes(recipe: TeacherRecipe) -> "Sizes":
    from mmkd.cache_tools.frames.clip_set import ClipSet
    from mmkd.pipeline.detections.records import ids_of_videos

    data = ClipSet(recipe.data)
    ids = ids_of_videos(clip.video for clip in data.manifest.clips)
    found = data.probe_videos(ids.values())

    def size(video: str) -> tuple[int, int] | None:
        facts = found[ids[video]] if video in ids else None
        if isinstance(facts, VideoError):
            raise facts
        return None if facts is None else (facts.width, facts.height)

    return size
