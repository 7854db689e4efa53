"""The commands that run the teacher: `build`, `plan` and `drift`."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from mmkd.cache_tools.process.command import as_json, print_result
from mmkd.cache_tools.process.help_text import WholeHelp, example
from mmkd.cache_tools.process.place import place_options, task_place
from mmkd.cache_tools.recipes.recipe import load_recipe
from mmkd.data_manifests.counted import ARE, counted
from mmkd.data_manifests.errors import TooManyUnusableError
from mmkd.pipeline.commands.options import (
    build_recipe,
    cache_argument,
    cache_options,
    named_options,
    teacher_options,
)
from mmkd.pipeline.recipe import TeacherRecipe


@click.command(
    cls=WholeHelp,
    epilog=example(
        "mmkd-cache build -c teacher.yaml --manifest manifest.jsonl --videos videos \\\n"
        "    --expert experts/rgb --expert experts/flow -o cache"
    ),
)
@cache_options
@place_options
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
    With several GPUs start a task for each, e.g. --device cuda:1 --task 1 --of 2; in a Slurm array without the two.
    A finished cache grows by more --views and further experts; those that are not given stay.
    Exit code 3: finished, but more clips are unusable than --max-unusable; 75: interrupted, run me again.
    """
    task = task_place(options["task"], options["tasks"])
    recipe = build_recipe(files, overrides, options)
    from mmkd.pipeline.build.build import build_cache
    from mmkd.pipeline.experts.teacher import load_teacher
    from mmkd.student.training.devices import choose_device

    teacher = load_teacher(options["experts"], choose_device(options["device"]), options["trusted"])
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


@click.command(
    cls=WholeHelp,
    epilog=example(
        "mmkd-cache plan -c teacher.yaml --manifest manifest.jsonl --videos videos \\\n"
        "    --expert experts/rgb -o cache"
    ),
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
    from mmkd.pipeline.forecast.forecast import plan_cache
    from mmkd.student.training.devices import choose_device

    chosen = {name: options[name] for name in ("sample_clips", "hours_per_task", "replace")}
    report = plan_cache(
        recipe,
        load_teacher(options["experts"], choose_device(options["device"]), options["trusted"]),
        options["out"],
        **chosen,
    )
    print_result(report.to_json(), as_json=options["as_json"], lines=report.lines())
    report.check()


@click.command(
    cls=WholeHelp,
    epilog=example(
        "mmkd-cache drift cache -c teacher.yaml --manifest manifest.jsonl \\\n"
        "    --videos videos --expert experts/rgb"
    ),
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
    from mmkd.pipeline.drift.drift import MAX_KL_NATS, measure_drift
    from mmkd.pipeline.experts.teacher import load_teacher
    from mmkd.student.training.devices import choose_device

    teacher = load_teacher(options["experts"], choose_device(options["device"]), options["trusted"])
    max_kl_nats = MAX_KL_NATS if options["max_kl"] is None else options["max_kl"]
    report = measure_drift(
        recipe, teacher, cache, sample=options["sample"], seed=options["seed"], max_kl_nats=max_kl_nats
    )
    print_result(asdict(report), as_json=options["as_json"], lines=report.lines(cache))
    report.check(cache)
