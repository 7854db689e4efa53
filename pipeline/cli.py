"""The command `mmkd-cache`: thin; every command parses, builds its recipe, calls one function and prints."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from mmkd.cache_tools.process.command import (
    cache_location,
    data_options,
    example_argument,
    example_recipe,
    print_result,
    recipe_options,
    run_command,
)
from mmkd.cache_tools.process.help_text import WholeHelpGroup, example
from mmkd.cache_tools.process.progress import Progress
from mmkd.cache_tools.recipes.recipe import load_recipe, resolved_with_origins
from mmkd.data_manifests.counted import ARE, counted
from mmkd.data_manifests.errors import InputError, StorageError, TooManyUnusableError
from mmkd.pipeline.commands.manifest import manifest
from mmkd.pipeline.commands.options import (
    FILE,
    FOLDER,
    as_json,
    boxes_option,
    build_recipe,
    cache_argument,
    cache_options,
    device_option,
    has_experts,
    named_options,
    out_option,
    scratch_option,
    teacher_options,
)
from mmkd.pipeline.recipe import TeacherRecipe


@click.group(
    cls=WholeHelpGroup,
    epilog=example("mmkd-cache demo demo-data", "mmkd-cache build -h"),
)
@click.version_option(package_name="mmkd")
def cli() -> None:
    """Make manifests, teach experts, and cache a multimodal teacher's logits for RGB students."""


@cli.command(epilog=example("mmkd-cache demo demo-data --train-clips 100"))
@click.argument("directory", type=FOLDER)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Another seed, other videos.")
@click.option("--train-clips", type=click.IntRange(1), help="Training clips.")
@click.option("--standard-clips", type=click.IntRange(1), help="Test clips with training's verb-object pairs.")
@click.option("--compositional-clips", type=click.IntRange(1), help="Test clips with the pairs swapped.")
@click.option("--workers", type=click.IntRange(1), default=2, show_default=True, help="Encoding processes.")
def demo(directory: Path, workers: int, **options: int | None) -> None:
    """Write the demo data set and its recipes into DIRECTORY: WebM videos, labels, splits and boxes."""
    from mmkd.data_manifests.demo.plan import DemoOptions
    from mmkd.data_manifests.demo.write import write_demo, write_recipes

    chosen = DemoOptions(**{name: value for name, value in options.items() if value is not None})
    total = sum(chosen.clips_per_split().values())
    with Progress("writing the demo data set", total=total, unit="clip") as progress:
        write_demo(
            directory,
            chosen,
            workers=workers,
            progress=lambda done, _: progress.advance(done - progress.done),
        )
    write_recipes(directory)
    click.echo(f"{directory}: {counted(total, 'clip')} in {counted(len(chosen.clips_per_split()), 'split')}")


cli.add_command(manifest)


@cli.command(
    epilog=example(
        "mmkd-cache teach rgb -c teacher.yaml --manifest manifest.jsonl \\\n    --videos videos -o experts/rgb"
    )
)
@click.argument("name")
@recipe_options
@data_options
@boxes_option
@scratch_option
@click.option(
    "-o", "--out", required=True, type=FOLDER, help="Folder of the expert; unfinished training is continued."
)
@click.option("--seed", type=int, help="Seed of weights, order, views and augmentation.")
@device_option
@as_json
def teach(name: str, files: tuple[Path, ...], overrides: tuple[str, ...], **options: Any) -> None:
    """Train the recipe's expert NAME on labels: rgb, flow or boxes."""
    named = named_options(options)
    known = load_recipe(TeacherRecipe, files=files, overrides=overrides, named=named).experts
    if name not in known:  # --seed would begin a new expert, and the error be about its missing modality
        raise InputError(f"NAME: the recipe has no expert {name!r}; {has_experts(known, files)}")
    named |= {f"experts.{name}.train.seed": options["seed"]}
    recipe = load_recipe(TeacherRecipe, files=files, overrides=overrides, named=named)
    from mmkd.pipeline.experts.teach import teach as teach_expert
    from mmkd.student.training.devices import choose_device

    report = teach_expert(recipe, name, options["out"], choose_device(options["device"]))
    card = report.card
    lines = [f"{options['out']}: expert {name!r} " + ("trained" if report.trained else "was there already")]
    for head, found in card.training.get("held_out", {}).items():
        lines.append(f"held-out {head}: top-1 {100 * found['top1']:.1f} on {counted(found['clips'], 'clip')}")
    value = {"name": name, "trained": report.trained, "training": card.training}
    print_result(value, as_json=options["as_json"], lines=lines)


@cli.command(
    epilog=example(
        "mmkd-cache build -c teacher.yaml --manifest manifest.jsonl --videos videos \\\n"
        "    --expert experts/rgb --expert experts/flow -o cache"
    )
)
@cache_options
@click.option("--task", type=click.IntRange(0), default=0, show_default=True, help="Number of this task, of --of.")
@click.option(
    "--of", "tasks", type=click.IntRange(1), default=1, show_default=True, help="Tasks that share the build."
)
@click.option(
    "--max-unusable", type=click.IntRange(0), default=0, show_default=True, help="Clips that may be unusable."
)
@click.option(
    "--retry-unusable",
    is_flag=True,
    help="Compute clips again that are recorded as unusable and can be read now, with all experts of the cache.",
)
@as_json
def build(files: tuple[Path, ...], overrides: tuple[str, ...], **options: Any) -> None:
    """Run the teacher once over every clip's views and write its logits to a cache.

    Any number of tasks may work on one cache; each computes what nobody else does. The last one finishes it.
    With several GPUs start a task for each, e.g. --device cuda:1 --task 1 --of 2. A finished cache grows by more
    --views and further experts; those that are not given stay.
    Exit code 3: finished, but more clips are unusable than --max-unusable; 75: interrupted, run me again.
    """
    if options["task"] >= options["tasks"]:
        raise InputError(f"--task {options['task']} --of {options['tasks']}: tasks are counted from 0")
    recipe = build_recipe(files, overrides, options)
    from mmkd.pipeline.build.build import build as build_cache
    from mmkd.pipeline.experts.teacher import load_teacher
    from mmkd.student.training.devices import choose_device

    teacher = load_teacher(options["experts"], choose_device(options["device"]))
    task = options["task"], options["tasks"]
    chosen = {"replace": options["replace"], "retry": options["retry_unusable"]}
    report = build_cache(recipe, teacher, options["out"], task=task, **chosen)
    value = {
        "clips": report.clips,
        "shards": report.shards,
        "skipped_shards": report.skipped_shards,
        "left_shards": report.left_shards,
        "unusable": report.unusable,
        "seconds": report.seconds,
    }
    print_result(value, as_json=options["as_json"], lines=report.lines(options["out"]))
    if len(report.unusable) > options["max_unusable"]:
        clip, reason = next(iter(report.unusable.items()))
        raise TooManyUnusableError(
            f"{counted(len(report.unusable), 'clip', ARE)} unusable, more than --max-unusable "
            f"{options['max_unusable']}; the "
            f"first is {clip}: {reason}. The cache is complete without them; `mmkd-cache inspect` lists all"
        )


@cli.command(
    epilog=example(
        "mmkd-cache plan -c teacher.yaml --manifest manifest.jsonl --videos videos \\\n"
        "    --expert experts/rgb -o cache"
    )
)
@cache_options
@click.option(
    "--sample-clips", type=click.IntRange(1), default=8, show_default=True, help="Clips that are computed to time."
)
@click.option(
    "--hours-per-task",
    type=click.FloatRange(0, min_open=True),
    default=4.0,
    show_default=True,
    help="Time that a task should take.",
)
@as_json
def plan(files: tuple[Path, ...], overrides: tuple[str, ...], **options: Any) -> None:
    """Say what `build` with the same options would take: rows, bytes, hours, tasks, disk; write no cache.

    Of a cache that is there it counts what is missing. Exit code 74: the disk is too small.
    """
    recipe = build_recipe(files, overrides, options)
    from mmkd.pipeline.experts.teacher import load_teacher
    from mmkd.pipeline.forecast.forecast import plan as plan_cache
    from mmkd.student.training.devices import choose_device

    chosen = {name: options[name] for name in ("sample_clips", "hours_per_task", "replace")}
    report = plan_cache(
        recipe, load_teacher(options["experts"], choose_device(options["device"])), options["out"], **chosen
    )
    print_result(report.to_json(), as_json=options["as_json"], lines=report.lines())
    report.check()


@cli.command(epilog=example("mmkd-cache status cache"))
@cache_argument
@as_json
def status(cache: Path | str, as_json: bool) -> None:
    """Print how far the build of a CACHE is: done, running, failed, rate, time left, bytes."""
    from mmkd.cache_tools.tasks.build_status import read_status

    found = read_status(cache)
    print_result(asdict(found), as_json=as_json, lines=found.lines())


@cli.command(epilog=example("mmkd-cache finalize cache"))
@cache_argument
def finalize(cache: Path | str) -> None:
    """Finish a CACHE whose shards are all there (a build does so by itself); refuse one with holes."""
    from mmkd.cache_tools.storage.store import open_store
    from mmkd.cache_tools.tasks.finish import finalize as finalize_cache

    finalize_cache(open_store(cache))
    click.echo(f"{cache}: finished")


@cli.command(epilog=example("mmkd-cache verify cache --repair"))
@cache_argument
@click.option("--repair", is_flag=True, help="Remove what is damaged, so that the next build computes it again.")
@as_json
def verify(cache: Path | str, repair: bool, as_json: bool) -> None:
    """Read every byte of a CACHE against its stored checksums; exit code 4 when one is wrong."""
    from mmkd.cache_tools.upkeep.verify import verify as verify_cache

    report = verify_cache(cache, repair=repair)
    print_result(asdict(report), as_json=as_json, lines=report.lines(cache))
    report.check(cache)


@cli.command(
    epilog=example(
        "mmkd-cache drift cache -c teacher.yaml --manifest manifest.jsonl \\\n"
        "    --videos videos --expert experts/rgb"
    )
)
@cache_argument
@teacher_options
@click.option("--sample", type=click.IntRange(1), default=64, show_default=True, help="Views to compute again.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Another seed, other views.")
@click.option(
    "--max-kl",
    type=click.FloatRange(0),
    help="Largest KL(stored || fresh) in nats that is not drift [default: 0.002].",
)
@as_json
def drift(cache: Path | str, files: tuple[Path, ...], overrides: tuple[str, ...], **options: Any) -> None:
    """Run the teacher again on a random sample of a CACHE and compare with what is stored.

    Give the data, recipe and experts that built it (or some of the experts). Exit code 4: drift above --max-kl, or
    another picture; 5: other data or experts than the cache's.
    """
    recipe = load_recipe(TeacherRecipe, files=files, overrides=overrides, named=named_options(options))
    from mmkd.pipeline.drift.drift import MAX_KL_NATS
    from mmkd.pipeline.drift.drift import drift as measure_drift
    from mmkd.pipeline.experts.teacher import load_teacher
    from mmkd.student.training.devices import choose_device

    teacher = load_teacher(options["experts"], choose_device(options["device"]))
    max_kl_nats = MAX_KL_NATS if options["max_kl"] is None else options["max_kl"]
    report = measure_drift(
        recipe, teacher, cache, sample=options["sample"], seed=options["seed"], max_kl_nats=max_kl_nats
    )
    print_result(asdict(report), as_json=options["as_json"], lines=report.lines(cache))
    report.check(cache)


@cli.command(epilog=example("mmkd-cache export cache cache.h5"))
@cache_argument
@click.argument("file", type=FILE)
def export(cache: Path | str, file: Path) -> None:
    """Write a finished CACHE to one plain HDF5 FILE, which needs no Zarr to be read."""
    from mmkd.cache_tools.upkeep.hdf5 import export_cache

    size_bytes = export_cache(cache, file)
    click.echo(f"{file}: {size_bytes / 2**20:.1f} MiB")


@cli.command("import", epilog=example("mmkd-cache import cache.h5 -o cache"))
@click.argument("file", type=FILE)
@out_option("Folder (or URL) of the cache.")
@as_json
def import_(file: Path, out: Path | str, as_json: bool) -> None:
    """Make a cache again of a FILE that `export` wrote, every value checked."""
    from mmkd.cache_tools.upkeep.hdf5 import import_cache

    report = import_cache(file, out)
    print_result(asdict(report), as_json=as_json, lines=report.lines(out))


@cli.command(epilog=example("mmkd-cache merge part-1 part-2 --manifest manifest.jsonl -o whole"))
@click.argument("caches", type=cache_location, nargs=-1, required=True, metavar="CACHE...")
@click.option("--manifest", "manifest_file", required=True, type=FILE, help="Manifest of all their clips.")
@out_option("Folder (or URL) of the merged cache.")
@as_json
def merge(caches: tuple[Path | str, ...], manifest_file: Path, out: Path | str, as_json: bool) -> None:
    """Make one cache of several CACHEs over disjoint clips, as if it had been built over all of them.

    The caches must have been built by one recipe with the same experts. The rows of the merged one are those of the
    --manifest, with which it trains.
    """
    from mmkd.cache_tools.upkeep.merge import merge as merge_caches
    from mmkd.data_manifests.manifest_file import load_manifest

    report = merge_caches(caches, out, load_manifest(manifest_file))
    print_result(asdict(report), as_json=as_json, lines=report.lines(out))


@cli.command(epilog=example("mmkd-cache inspect cache"))
@cache_argument
@as_json
def inspect(cache: Path | str, as_json: bool) -> None:
    """Print what is in a CACHE: splits, views, experts, classes, unusable clips, sizes."""
    from mmkd.cache_tools.upkeep.inspect import describe, describe_lines

    found = describe(cache)
    print_result(found, as_json=as_json, lines=describe_lines(found))


@cli.command(epilog=example("mmkd-cache weigh cache -o weights.json"))
@cache_argument
@click.option("-o", "--out", type=FILE, help="Write all schemes' weights, for `mmkd-student train --weights`.")
@click.option("--split", help="A labelled split to fit on [default: the held-out part of the training split].")
@click.option(
    "--weights-temperature",
    type=click.FloatRange(0, 1e6, min_open=True),
    default=1.0,
    show_default=True,
    help="Temperature of softmin and per-sample; larger is more uniform.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(0, 1e6, min_open=True),
    default=1.0,
    show_default=True,
    help="Lowest T of the loss, for the bound of the storage error.",
)
@as_json
def weigh(cache: Path | str, out: Path | None, as_json: bool, **options: Any) -> None:
    """Fit the experts' weights to the logits in a CACHE, and compare the schemes: top-1, NLL, calibration."""
    from mmkd.cache_tools.cache.reader import CacheReader
    from mmkd.data_manifests.atomic import write_atomically
    from mmkd.student.teacher.mixture_file import weights_for
    from mmkd.student.weighing.weigh import weigh as weigh_cache
    from mmkd.student.weighing.weigh_report import report_lines

    reader = CacheReader(cache)
    report = weigh_cache(reader, train_split=reader.init.train_split, **options)
    if out:
        write_atomically(out, weights_for(reader, report.mixtures, report.to_json()).to_bytes())
    print_result(report.to_json(), as_json=as_json, lines=report_lines(report))


@cli.command(epilog=example("mmkd-cache flow videos -o flow --new-short 256 --bound 20"))
@click.argument("videos", nargs=-1, metavar="VIDEO...")
@click.option("--list", "lists", multiple=True, type=FILE, help="Text file with a video's path on each line.")
@click.option("--class-folder", is_flag=True, help="Call results CLASS/NAME, after the folder a video lies in.")
@click.option("--keep-ending", is_flag=True, help="Call results NAME.mp4, with the video's ending, not NAME.")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder, or one file NAME.h5.")
@click.option(
    "--layout",
    type=click.Choice(["denseflow", "epic", "mmaction", "i3d", "hdf5"]),
    help="Files, names, frame sizes [default: denseflow; hdf5 for -o NAME.h5].",
)
@click.option(
    "--method", type=click.Choice(["tvl1", "dis", "raft"]), default="tvl1", show_default=True, help="Algorithm."
)
@click.option(
    "--preset", help="tvl1: default, opencv, accurate, fast; dis: medium, fast, ultrafast [default: the first]."
)
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
@click.option("--max-unusable", type=click.IntRange(0), default=0, show_default=True, help="Videos that may fail.")
@device_option
@as_json
def flow(videos: tuple[str, ...], **options: Any) -> None:
    """Compute optical flow of videos, folders or @LIST into the files that denseflow, EPIC or I3D would write.

    What is there already is kept; several runs into one folder share the work. Exit code 3: finished, but videos
    failed; 75: interrupted, run me again.
    """
    from mmkd.pipeline.flow_command.run import run_flow

    report = run_flow(videos, options)
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


@cli.group(epilog=example("mmkd-cache config example demo > teacher.yaml"))
def config() -> None:
    """Show recipes: an example, the resolved one with each value's origin, or the schema."""


@config.command(
    "show",
    epilog=example("mmkd-cache config show -c teacher.yaml --manifest manifest.jsonl \\\n    --videos videos"),
)
@recipe_options
@data_options
@boxes_option
@scratch_option
def config_show(files: tuple[Path, ...], overrides: tuple[str, ...], **options: Any) -> None:
    """Print every value of the resolved recipe and where it comes from."""
    _, values = resolved_with_origins(TeacherRecipe, files=files, overrides=overrides, named=named_options(options))
    for value in values:
        click.echo(f"{value.path}: {json.dumps(value.value)}  # {value.origin}")


@config.command("example", epilog=example("mmkd-cache config example something-something > teacher.yaml"))
@example_argument
def config_example(data_set: str) -> None:
    """Print a commented recipe to start from: the demo's, or the authors' for Something-Something."""
    click.echo(example_recipe(data_set, "teacher"), nl=False)


@config.command("schema", epilog=example("mmkd-cache config schema > schema.json"))
def config_schema() -> None:
    """Print the JSON schema of the recipe."""
    click.echo(json.dumps(TeacherRecipe.model_json_schema(), indent=1))


def main() -> None:
    """Run the command."""
    run_command(cli)
