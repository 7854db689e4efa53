"""The command `mmkd-student`: thin; every command parses, builds its recipe, calls one function and prints."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import click

from mmkd.cache_tools.process.command import (
    FILE,
    FOLDER,
    Function,
    as_json,
    cache_location,
    data_options,
    device_option,
    example_argument,
    example_recipe,
    named_data,
    print_result,
    recipe_options,
    run_command,
    trust_option,
)
from mmkd.cache_tools.process.help_text import WholeHelpGroup, example
from mmkd.cache_tools.recipes.recipe import load_recipe, resolved_with_origins
from mmkd.data_manifests.atomic import write_atomically
from mmkd.data_manifests.counted import counted
from mmkd.data_manifests.errors import InputError
from mmkd.data_manifests.kinds import CURVE_NUMBERS, PER_CLASS, SUBMISSION, TABLE, refuse_another
from mmkd.data_manifests.manifest_file import load_manifest
from mmkd.student.evaluation.run_files import EVALUATION_FILE, RUN_FILE, read_run
from mmkd.student.looking.options import looking_of, watch_options
from mmkd.student.prediction.command import asked_look, look_options, predict
from mmkd.student.recipes.student import Missing, Mode, StudentRecipe
from mmkd.student.submit import submit_of
from mmkd.student.training.launcher import refuse_several_processes

cache_option = click.option(
    "--cache",
    required=True,
    type=cache_location,
    metavar="CACHE",
    help="Folder or URL that `mmkd-cache build` made.",
)


def optional_cache(without: str) -> Callable[[Function], Function]:
    """Return --cache, whose help says what happens without."""
    return click.option(
        "--cache", type=cache_location, metavar="CACHE", help=f"What `mmkd-cache build` made; without: {without}"
    )


@click.group(cls=WholeHelpGroup, epilog=example("mmkd-student train -h"))
@click.version_option(package_name="mmkd")
def cli() -> None:
    """Train and evaluate RGB students on cached teacher logits; flow, boxes and teacher never load."""


@cli.command(
    epilog=example(
        "mmkd-student train -c student.yaml --manifest manifest.jsonl \\\n"
        "    --videos videos --cache cache -o runs/student"
    )
)
@recipe_options
@data_options
@optional_cache("labels alone, fresh views.")
@click.option("-o", "--out", required=True, type=FOLDER, help="Folder of the run; an unfinished run is continued.")
@click.option("--labels-only", is_flag=True, help="Train the baseline: the same run without a teacher.")
@click.option("--fresh-views", is_flag=True, help="With --labels-only: new views every epoch.")
@click.option("--weights", help="uniform, heldout, per-sample, e.g. rgb=1,flow=2, or FILE.json[:SCHEME] of weigh.")
@click.option("--temperature", type=float, help="T of the distillation loss [default: 1].")
@click.option("--label-weight", type=float, help="Weight of the label term, 0 to 1 [default: 0].")
@click.option(
    "--missing",
    type=click.Choice(get_args(Missing)),
    help="Views without an expert [default: renormalise].",
)
@click.option("--seed", type=int, help="Seed of weights, order, views and augmentation.")
@click.option(
    "--node-copies",
    type=FOLDER,
    help="Folder on a local disk for mixed targets [default: below $SLURM_TMPDIR, $TMPDIR or ~/.cache].",
)
@watch_options
@device_option
@as_json
def train(files: tuple[Path, ...], overrides: tuple[str, ...], **options: Any) -> None:
    """Train a student against a cache, then evaluate it on the cache's evaluation splits.

    Without --cache it learns from the labels of --manifest alone, under views that the recipe's `views` describes.
    """
    recipe, mode = _asked(files, overrides, options)
    from mmkd.student.distil import train_student
    from mmkd.student.evaluation.table_text import metric_lines
    from mmkd.student.training.devices import choose_device
    from mmkd.student.training.launcher import launched
    from mmkd.student.training.ranks import own_device

    launch = launched()
    device = choose_device(own_device(options["device"], launch))
    report = train_student(
        recipe, options["cache"], options["out"], mode=mode, device=device, looking=looking_of(options)
    )
    if launch is not None and launch.rank > 0:
        return
    metrics = json.loads((options["out"] / EVALUATION_FILE).read_bytes())["metrics"]
    value = {"run": str(options["out"]), "steps": report.steps, "metrics": metrics}
    print_result(value, as_json=options["as_json"], lines=metric_lines(metrics))


def _asked(
    files: tuple[Path, ...], overrides: tuple[str, ...], options: dict[str, Any]
) -> tuple[StudentRecipe, Mode]:
    """Return what `train` is asked for; InputError for what does not fit together."""
    flags = {
        "teacher.weights": "weights",
        "loss.temperature": "temperature",
        "loss.label_weight": "label_weight",
        "teacher.missing": "missing",
        "node_copies": "node_copies",
    }
    named = named_data(options) | {path: options[name] for path, name in flags.items()}
    named["train.seed"] = options["seed"]
    recipe = load_recipe(StudentRecipe, files=files, overrides=overrides, named=named)
    if options["cache"] is not None:
        return recipe, Mode(options["labels_only"], options["fresh_views"])
    recipe.refuse_teacher(
        {path: f"--{name.replace('_', '-')}" for path, name in flags.items() if options[name] is not None},
        labels_only=options["labels_only"],
    )
    return recipe, Mode(labels_only=True, fresh_views=True)


cli.add_command(submit_of(train, _asked))


@cli.command(epilog=example("mmkd-student evaluate runs/student --cache cache"))
@recipe_options
@data_options
@optional_cache("the manifest's clips, as the student sees them.")
@click.argument("run", type=FOLDER)
@click.option("--per-class", type=FILE, help="Write how each class fared, as CSV.")
@look_options
@trust_option
@device_option
@as_json
def evaluate(files: tuple[Path, ...], overrides: tuple[str, ...], **options: Any) -> None:
    """Evaluate a finished RUN on every evaluation split and group of a cache, or of its manifest.

    The recipe is the run's own; for other clips than the run's give --manifest and --videos, too. A clip counts by
    the mean of its logits over its views: a cache's, the run's, or those that --views and --crops ask for.
    """
    if options["per_class"]:
        refuse_another(options["per_class"], PER_CLASS, "--per-class")
    recipe = _recipe_of_run(files, overrides, options)
    from mmkd.student.evaluation.run_evaluation import evaluate_run
    from mmkd.student.evaluation.table_text import metric_lines
    from mmkd.student.training.devices import choose_device
    from mmkd.student.training.launcher import launched
    from mmkd.student.training.ranks import joined, own_device

    launch = launched()
    device = choose_device(own_device(options["device"], launch))
    chosen = {name: options[name] for name in ("per_class", "trusted")} | {"look": asked_look(options)}
    with joined(device, launch) as ranks:
        metrics = evaluate_run(recipe, options["cache"], options["run"], device=device, ranks=ranks, **chosen)
    if not ranks.is_first:
        return
    print_result(metrics, as_json=options["as_json"], lines=metric_lines(metrics))


def _recipe_of_run(files: tuple[Path, ...], overrides: tuple[str, ...], options: dict[str, Any]) -> StudentRecipe:
    base = str(options["run"] / RUN_FILE), read_run(options["run"]).recipe
    return load_recipe(StudentRecipe, files=files, overrides=overrides, named=named_data(options), base=base)


@cli.command(
    epilog=example("mmkd-student submission runs/student --cache cache --split test \\\n    -o submission.zip")
)
@recipe_options
@data_options
@cache_option
@click.argument("run", type=FOLDER)
@click.option("--split", default="test", show_default=True, help="The split of the cache to submit.")
@click.option("-o", "--out", required=True, type=FILE, help="ZIP file to write.")
@click.option(
    "--supervision",
    nargs=3,
    type=click.IntRange(0, 5),
    default=(2, 3, 3),
    show_default=True,
    metavar="PT TL TD",
    help="The challenge's levels of pretraining, training labels and training data.",
)
@trust_option
@device_option
@as_json
def submission(files: tuple[Path, ...], overrides: tuple[str, ...], **options: Any) -> None:
    """Write a finished RUN's scores as EPIC-KITCHENS-100's action recognition challenge takes them.

    The default levels say: public image and video data, full temporal supervision, the training set.
    """
    refuse_several_processes("mmkd-student submission")
    refuse_another(options["out"], SUBMISSION)
    recipe = _recipe_of_run(files, overrides, options)
    from mmkd.student.evaluation.run_evaluation import submit_run
    from mmkd.student.training.devices import choose_device

    chosen = {name: options[name] for name in ("split", "out", "trusted")} | {"levels": options["supervision"]}
    device = choose_device(options["device"])
    clips, unread = submit_run(recipe, options["cache"], options["run"], device=device, **chosen)
    line = f"{options['out']}: {counted(clips, 'clip')}" + (f", {unread} of them unreadable" if unread else "")
    print_result({"clips": clips, "unreadable": unread}, as_json=options["as_json"], lines=[line])


@cli.command(epilog=example("mmkd-student export runs/student --check clip.webm -o exported"))
@data_options
@click.argument("run", type=FOLDER)
@click.option("-o", "--out", required=True, type=FOLDER, help="Folder to write; an earlier export is replaced.")
@click.option(
    "--format", type=click.Choice(["onnx", "pt2", "both"]), default="onnx", show_default=True, help="Files."
)
@click.option("--check", multiple=True, type=FILE, metavar="VIDEO", help="Compare on this video; repeatable.")
@click.option("--int8", is_flag=True, help="Also in 8 bits, and what they cost on clips of --manifest.")
@click.option("--no-latency", is_flag=True, help="Do not measure time and memory on this machine.")
@click.option("--license", default="unknown", show_default=True, help="Licence for the card, such as apache-2.0.")
@trust_option
@as_json
def export(**options: Any) -> None:
    """Write a finished RUN's student as files for other programs, each checked against it, with a model card.

    Input: views uint8 (B, T, S, S, 3) in RGB; output: logits by head. Class names and views are in every file.
    Both are compared on the videos of --check, on the evaluation clips of --manifest, or on noise.
    """
    refuse_several_processes("mmkd-student export")
    from mmkd.student.export.card_text import number
    from mmkd.student.export.export_run import export_run
    from mmkd.student.export.options import ExportOptions

    data, as_data = named_data(options), None
    if any(value is not None for value in data.values()):
        as_data = load_recipe(StudentRecipe, files=(), overrides=(), named=data).data
    chosen = {name: options[name] for name in ("format", "check", "int8", "license", "trusted")}
    chosen |= {"data": as_data, "latency": not options["no_latency"]}
    card = export_run(options["run"], options["out"], ExportOptions(**chosen))
    found = card["check"]
    lines = [
        f"{options['out']}/{name}: logits differ by at most {own['largest']:.2g}, on {found['frames']}"
        for name, own in found["files"].items()
    ]
    lines += [
        f"in 8 bits: {head} top-1 {100 * own['top1_int8']:.1f} %, in 32 bits {100 * own['top1']:.1f} %"
        for head, own in (card["int8"] or {"heads": {}})["heads"].items()
    ]
    lines += [
        f"{row['form']}, batch {row['batch']}: {number(row['median_ms'])} ms, "
        f"clips/s: {number(row['clips_per_second'])}"
        for row in (card["cost"] or {"rows": []})["rows"]
    ]
    value = {"folder": str(options["out"]), "check": found, "int8": card["int8"], "cost": card["cost"]}
    print_result(value, as_json=options["as_json"], lines=lines)


@cli.command(
    epilog=example(
        "mmkd-student compare --cache cache --manifest manifest.jsonl \\\n    --run student=runs/student"
    )
)
@click.option(
    "--cache",
    type=cache_location,
    metavar="CACHE",
    help="Cache that the runs were evaluated with; else runs alone.",
)
@click.option("--manifest", type=FILE, help="Manifest of that cache, or of the evaluations without one.")
@click.option(
    "--run", "runs", multiple=True, metavar="NAME=DIR", help="A run and its name in the table; repeatable."
)
@click.option(
    "--weights", help="Weights of the teacher's row [default: those that the first student learned from]."
)
@click.option(
    "--weights-temperature",
    default=1.0,
    show_default=True,
    help="Temperature of the softmin for --weights heldout.",
)
@click.option("--train-split", help="A split that the table leaves out [default: the cache's training split].")
@click.option("--common", is_flag=True, help="Compare over those clips alone that every row has.")
@click.option(
    "--baseline",
    metavar="NAME",
    help="The row that each run is set beside, with an interval [default: the first run on labels alone].",
)
@click.option("--tables", multiple=True, type=FILE, help="Merge tables of several seeds instead; repeatable.")
@click.option("--out", type=FILE, help="Write the table as JSON, for --tables.")
@as_json
def compare(**options: Any) -> None:
    """Print one table: each expert and the teacher (from cached logits), then the runs.

    Below stands how much oftener each run is right than the baseline, with a bootstrap interval over the clips.
    With --tables, merge the tables of several seeds into means and standard deviations.
    """
    refuse_several_processes("mmkd-student compare")
    from mmkd.student.evaluation.table import load_table, merge_tables
    from mmkd.student.evaluation.table_text import render

    if options["tables"] and options["common"]:
        raise click.UsageError(
            "--common needs the clips: give it when each seed's table is made, not with --tables"
        )
    if options["tables"] and options["baseline"]:
        raise click.UsageError("--baseline is for the table of one seed; tables that --tables merges have theirs")
    if options["out"]:
        refuse_another(options["out"], TABLE, "--out")
    table = merge_tables([load_table(path) for path in options["tables"]]) if options["tables"] else _table(options)
    if options["out"]:
        write_atomically(options["out"], f"{json.dumps(table.to_json(), indent=1)}\n".encode())
    lines = [render(table, width=shutil.get_terminal_size().columns)]
    print_result(table.to_json(single_clips=False), as_json=options["as_json"], lines=lines)


def _table(options: dict[str, Any]) -> Any:
    from mmkd.cache_tools.cache.reader import CacheReader
    from mmkd.student.data.split_data import check_manifest
    from mmkd.student.data.splits import SplitNames
    from mmkd.student.evaluation.evaluate import left_out_splits
    from mmkd.student.evaluation.table import compare_alone, compare_runs, mixtures_of_runs, usual_baseline
    from mmkd.student.teacher.cached_teacher import choose_mixtures

    if options["manifest"] is None:
        raise click.UsageError("give --manifest and, for teacher and experts, --cache; or --tables to merge tables")
    runs = {}
    for text in options["runs"]:
        name, _, directory = text.partition("=")
        if not directory or name in runs:
            raise InputError(f"--run {text!r}: expected NAME=DIR, each name once")
        runs[name] = Path(directory)
    chosen = {name: options[name] for name in ("train_split", "common")}
    chosen["baseline"] = options["baseline"] or usual_baseline(runs)
    if options["cache"] is None:
        if options["weights"]:
            raise click.UsageError("--weights is for the teacher's row, which needs --cache")
        return compare_alone(load_manifest(options["manifest"]), runs, **chosen)
    reader = CacheReader(options["cache"])
    manifest = load_manifest(options["manifest"])
    check_manifest(reader, manifest)
    mixtures, absent = (None, None) if options["weights"] else mixtures_of_runs(runs, reader)
    if absent:
        click.echo(f"{absent}: the teacher's row has uniform weights over {', '.join(reader.experts)}", err=True)
    if mixtures is None:
        mixtures, warning = choose_mixtures(
            reader,
            options["weights"] or "uniform",
            weights_temperature=options["weights_temperature"],
            train_split=options["train_split"] or reader.init.train_split,
        )
        if warning:
            click.echo(warning, err=True)
    for line in left_out_splits(SplitNames.cached(reader), manifest, options["train_split"]):
        click.echo(line, err=True)
    return compare_runs(reader, manifest, runs, mixtures=mixtures, missing="renormalise", **chosen)


@cli.command(epilog=example("mmkd-student show runs/baseline runs/student -o curves.png"))
@click.argument("runs", nargs=-1, required=True, type=FOLDER, metavar="RUN...")
@click.option("-o", "--out", type=FILE, help="PNG file to draw their curves into.")
@click.option("--csv", "csv_file", type=FILE, help="Write the numbers of every epoch as CSV.")
@as_json
def show(runs: tuple[Path, ...], out: Path | None, csv_file: Path | None, as_json: bool) -> None:
    """Show what each RUN did: how far it came, its loss, its accuracies, and its curves as a picture.

    RUN is a folder of `mmkd-student train`, or an expert of `mmkd-cache teach`; unfinished ones are shown as they
    are now.
    """
    from mmkd.student.looking.curves import check_picture, write_curves
    from mmkd.student.looking.history import read_histories
    from mmkd.student.looking.history_text import history_csv, history_lines

    if out is not None:
        check_picture(out)
    if csv_file is not None:
        refuse_another(csv_file, CURVE_NUMBERS, "--csv")
    histories = read_histories(runs)
    if out is not None:
        write_curves(out, histories)
    if csv_file is not None:
        write_atomically(csv_file, history_csv(histories).encode())
    lines = history_lines(histories, shutil.get_terminal_size().columns)
    print_result({"runs": [history.to_json() for history in histories]}, as_json=as_json, lines=lines)


cli.add_command(predict)


@cli.group(epilog=example("mmkd-student config example demo > student.yaml"))
def config() -> None:
    """Show recipes: an example, the resolved one with each value's origin, or the schema."""


@config.command(
    "show",
    epilog=example("mmkd-student config show -c student.yaml --manifest manifest.jsonl \\\n    --videos videos"),
)
@recipe_options
@data_options
def config_show(files: tuple[Path, ...], overrides: tuple[str, ...], **options: Any) -> None:
    """Print every value of the resolved recipe and where it comes from."""
    _, values = resolved_with_origins(StudentRecipe, files=files, overrides=overrides, named=named_data(options))
    for value in values:
        click.echo(f"{value.path}: {json.dumps(value.value)}  # {value.origin}")


@config.command("example", epilog=example("mmkd-student config example something-something > student.yaml"))
@example_argument
def config_example(data_set: str) -> None:
    """Print a commented recipe to start from: the demo's, or the authors' for a data set."""
    click.echo(example_recipe(data_set, "student"), nl=False)


@config.command("schema", epilog=example("mmkd-student config schema > schema.json"))
def config_schema() -> None:
    """Print the JSON schema of the recipe."""
    click.echo(json.dumps(StudentRecipe.model_json_schema(), indent=1))


def main() -> None:
    """Run the command."""
    run_command(cli)
