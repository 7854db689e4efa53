"""Options that several commands of `mmkd-cache` share, and the recipe that they make."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, get_args

import click

from mmkd.cache_tools.process.command import (
    FILE,
    FOLDER,
    PLACE,
    Function,
    cache_location,
    data_options,
    device_option,
    named_data,
    recipe_options,
    trust_option,
)
from mmkd.cache_tools.recipes.recipe import load_recipe
from mmkd.pipeline.recipe import FlowLayout, Precision, TeacherRecipe

cache_argument = click.argument("cache", type=cache_location, metavar="CACHE")
boxes_option = click.option(
    "--boxes",
    multiple=True,
    type=FILE,
    help="Boxes: Something-Else's annotations, or a table of `mmkd-cache boxes`; repeatable.",
)


def flow_options(function: Function) -> Function:
    """Add where flow is kept that is computed, and where flow lies that is there already."""
    options = (
        click.option("--flow-scratch", type=FOLDER, help="Folder for flow computed once [default: MANIFEST.flow]."),
        click.option(
            "--flow-files",
            type=PLACE,
            help="Flow that is there, read in place of computed: a folder or an HDF5 file.",
        ),
        click.option(
            "--flow-layout", type=click.Choice(get_args(FlowLayout)), help="How those files are named and numbered."
        ),
        click.option(
            "--flow-bound",
            type=click.FloatRange(0, min_open=True),
            metavar="PX",
            help="What their 8-bit codes mean: denseflow 20 or 32, EPIC-100 8, EPIC-55 25.",
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function


def out_option(help_text: str) -> Callable[[Function], Function]:
    """Return the option that names the cache to write."""
    return click.option("-o", "--out", type=cache_location, required=True, metavar="CACHE", help=help_text)


def teacher_options(function: Any) -> Any:
    """Add what a command needs to run the teacher over a data set: recipe, data, experts and device."""
    expert = click.option(
        "--expert",
        "experts",
        multiple=True,
        required=True,
        type=FOLDER,
        help="Folder of an expert that `teach` made; repeatable.",
    )
    own = (boxes_option, flow_options, expert, trust_option, device_option)
    for option in reversed((recipe_options, data_options, *own)):
        function = option(function)
    return function


def cache_options(function: Any) -> Any:
    """Add what says which cache to build, for the commands that build or plan one."""
    options = (
        teacher_options,
        out_option("Folder (or URL) of the cache; one that is there is continued or grows."),
        click.option("--views", type=int, help="Random views of each training clip."),
        click.option(
            "--precision",
            type=click.Choice(get_args(Precision)),
            help="How logits are stored.",
        ),
        click.option("--max-kl", type=float, help="Largest error in nats that storing may cost [default: 1e-4]."),
        click.option(
            "--replace", multiple=True, metavar="NAME", help="Compute this expert of the cache again; repeatable."
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function


def build_recipe(files: tuple[Path, ...], overrides: tuple[str, ...], options: dict[str, Any]) -> TeacherRecipe:
    """Return the recipe of `cache_options`."""
    named = named_options(options) | {f"build.{name}": options[name] for name in ("views", "precision", "max_kl")}
    return load_recipe(TeacherRecipe, files=files, overrides=overrides, named=named)


def has_experts(known: Collection[str], files: Collection[Path]) -> str:
    """Return which experts a recipe has, for the end of an error, and what to do where it has none."""
    if known:
        return f"it has: {', '.join(known)}"
    where = "the files given with -c have no `experts`" if files else "no recipe is given; give one with -c FILE"
    return f"{where}. `mmkd-cache config example something-something` prints one to start from"


def named_options(options: dict[str, Any]) -> dict[str, Any]:
    """Take the values of data, boxes and flow options out of a command's, as named recipe values."""
    boxes = [str(path) for path in options["boxes"]] or None
    flow = {
        "flow_scratch": options["flow_scratch"],
        "flow.files.path": options["flow_files"],
        "flow.files.layout": options["flow_layout"],
        "flow.files.bound_px": options["flow_bound"],
    }
    return named_data(options) | {"boxes.files": boxes} | flow
