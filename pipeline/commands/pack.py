"""The command `mmkd-cache pack`: videos as pictures in one HDF5 file."""

from pathlib import Path
from typing import Any

import click

from mmkd.cache_tools.process.command import FILE, as_json, data_options, named_data, print_result, recipe_options
from mmkd.cache_tools.process.help_text import WholeHelp, example
from mmkd.cache_tools.recipes.recipe import load_recipe
from mmkd.data_manifests.counted import counted
from mmkd.data_manifests.errors import TooManyUnusableError
from mmkd.pipeline.recipe import TeacherRecipe


@click.command(
    cls=WholeHelp,
    epilog=example(
        "mmkd-cache pack --manifest manifest.jsonl --videos videos \\\n    --short-side 256 -o frames.h5"
    ),
)
@recipe_options
@data_options
@click.option("-o", "--out", required=True, type=FILE, help="HDF5 file to write; --videos takes it afterwards.")
@click.option(
    "--short-side",
    type=click.IntRange(16, 4096),
    default=256,
    show_default=True,
    help="Larger frames are shrunk to this short side, in pixels.",
)
@click.option("--quality", type=click.IntRange(1, 100), default=95, show_default=True, help="Of the JPEG pictures.")
@click.option(
    "--max-unusable", type=click.IntRange(0), default=0, show_default=True, help="Videos that may be left out."
)
@as_json
def pack(files: tuple[Path, ...], overrides: tuple[str, ...], **options: Any) -> None:
    """Write a manifest's videos as small pictures into one HDF5 file, which decodes faster and is one file to copy.

    For large videos (EPIC-KITCHENS is 1080p) and for sites with few processors. Run it again and it continues. A
    cache that is built from it is another one than from the videos: pictures lose a little.
    Exit code 3: written, but more videos are left out than --max-unusable.
    """
    recipe = load_recipe(TeacherRecipe, files=files, overrides=overrides, named=named_data(options))
    from mmkd.cache_tools.frames.clip_set import ClipSet
    from mmkd.pipeline.pack.pack import pack_videos
    from mmkd.pipeline.pack.pack_video import PackParams

    report = pack_videos(
        ClipSet(recipe.data), options["out"], PackParams(options["short_side"], options["quality"])
    )
    value = {
        "videos": report.videos,
        "packed": report.packed,
        "size_bytes": report.size_bytes,
        "unusable": report.unusable,
    }
    print_result(value, as_json=options["as_json"], lines=report.lines(options["out"]))
    if len(report.unusable) > options["max_unusable"]:
        raise TooManyUnusableError(
            f"{counted(len(report.unusable), 'video')} left out, more than --max-unusable {options['max_unusable']}"
        )
