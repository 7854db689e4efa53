"""The command `mmkd-cache import-expert`: an expert from somebody's checkpoint."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from mmkd.cache_tools.process.command import FILE, FOLDER, as_json, data_options, print_result, recipe_options
from mmkd.cache_tools.process.help_text import WholeHelp, example
from mmkd.cache_tools.recipes.recipe import load_recipe
from mmkd.data_manifests.counted import counted
from mmkd.data_manifests.errors import InputError
from mmkd.pipeline.commands.options import boxes_option, flow_options, named_options
from mmkd.pipeline.recipe import ModalityName, TeacherRecipe

if TYPE_CHECKING:
    from mmkd.pipeline.imports.import_expert import ImportReport


def source_options(function: Any) -> Any:
    """Add what says which parameters of the file are the expert's, and for which classes."""
    options = (
        click.option(
            "--modality", required=True, type=click.Choice(get_args(ModalityName)), help="What the network sees."
        ),
        click.option("--network", help="The network of the file; rgb and flow only [default: the recipe's]."),
        click.option(
            "--classes",
            "classes",
            multiple=True,
            required=True,
            metavar="[HEAD=]FILE",
            help="Class names in the checkpoint's order; one for each head of the manifest.",
        ),
        click.option(
            "--head",
            "heads",
            multiple=True,
            metavar="HEAD=NAME[FIRST:LAST]",
            help="Classifier of a head, or rows of one [default: of the same name, or the only one].",
        ),
        click.option("--map", "key_map", default="auto", show_default=True, help="Whose names the file has."),
        click.option("--weights-key", help="Which weights, e.g. model_ema [default: those that are not averaged]."),
        click.option(
            "--trained-on",
            type=FILE,
            help="What it was trained on, so that leaks show: manifest, split file, or an id in each line.",
        ),
        click.option("--licence", help="What the expert's card should say of the weights' licence."),
    )
    for option in reversed(options):
        function = option(function)
    return function


@click.command(
    "import-expert",
    cls=WholeHelp,
    epilog=example(
        "mmkd-cache import-expert swin.pth --modality rgb --network swin3d_t \\\n"
        "    --classes label_map.txt -c teacher.yaml --manifest manifest.jsonl \\\n"
        "    --videos videos -o experts/rgb"
    ),
)
@click.argument("file", type=FILE)
@source_options
@recipe_options
@data_options
@boxes_option
@flow_options
@click.option("-o", "--out", required=True, type=FOLDER, help="Folder of the expert.")
@click.option("--name", help="Name of the expert [default: that of its folder].")
@click.option("--dry-run", is_flag=True, help="Report what fits, and write nothing.")
@as_json
def import_expert(
    file: Path, files: tuple[Path, ...], overrides: tuple[str, ...], *, out: Path, name: str | None, **options: Any
) -> None:
    """Make an expert of the checkpoint FILE: keys accounted for, classes matched by name."""
    name = name or out.resolve().name
    if not name.isidentifier():
        raise InputError(f"{name!r} cannot be an expert's name; give one with --name, e.g. --name rgb")
    named = named_options(options) | {
        f"experts.{name}.modality": options["modality"],
        f"experts.{name}.train.network": options["network"],
    }
    recipe = load_recipe(TeacherRecipe, files=files, overrides=overrides, named=named)
    from mmkd.pipeline.imports.import_expert import ImportRequest
    from mmkd.pipeline.imports.import_expert import import_expert as run

    fields = {key: options[key] for key in ("classes", "heads", "key_map", "weights_key", "licence", "trained_on")}
    report = run(recipe, name, ImportRequest(file=file, **fields), None if options["dry_run"] else out)
    value = {**asdict(report), "heads": {head: asdict(found) for head, found in report.heads.items()}}
    print_result(value, as_json=options["as_json"], lines=list(report_lines(report, out, options["dry_run"])))


def report_lines(report: "ImportReport", out: Path, dry_run: bool) -> list[str]:
    """Return the report for people."""
    done = "would be imported" if dry_run else "imported" if report.written else "was there already"
    source = report.imported
    lines = [
        f"{out}: expert {report.name!r} {done}",
        f"{source['file']}: {counted(report.used, 'key')} used, names of {source['map']!r}"
        + (f", weights at {source['key']!r}" if source["key"] else ""),
    ]
    lines += [
        f"head {head}: {counted(found.classes, 'class')} matched by name among {found.rows} of {found.source!r}"
        for head, found in report.heads.items()
    ]
    left = {
        "classifiers left over": report.left_over,
        "buffers that the network computes itself": report.computed,
        "other weights in the file": report.other_weights,
    }
    lines += [f"{what}: {', '.join(names)}" for what, names in left.items() if names]
    return lines
