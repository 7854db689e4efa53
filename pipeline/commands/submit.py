"""The commands `mmkd-cache submit …`: an array of tasks on a cluster, from the options of the command itself."""

import shlex
from pathlib import Path
from typing import Any

import click

from mmkd.cache_tools.cluster.script import Job
from mmkd.cache_tools.cluster.submit import (
    cluster_of,
    cluster_options,
    command_line,
    hand_over,
    parameters_of,
    planned_tasks,
    require_one_process,
    require_tasks,
    require_there,
    typed,
)
from mmkd.cache_tools.process.command import FILE, FOLDER, as_json, recipe_options
from mmkd.cache_tools.process.help_text import WholeHelpGroup, example
from mmkd.data_manifests.errors import InputError
from mmkd.pipeline.commands.build import build
from mmkd.pipeline.commands.flow import flow, flow_request
from mmkd.pipeline.commands.options import build_recipe
from mmkd.pipeline.commands.teach import teach, teach_recipe

PLACE = ("task", "tasks")
EVERYWHERE = ("partition", "account", "time", "memory", "gpus", "cpus")


@click.group(cls=WholeHelpGroup, epilog=example("mmkd-cache submit build -h"))
def submit() -> None:
    """Hand `build`, `teach` or `flow` to Slurm, as one readable script each.

    Options are the command's own, and what the cluster is asked for; the recipe's section `cluster` has the same
    and more. What is stopped before its time is over, or for another job, is queued again and continues.
    """


@submit.command(
    "build",
    params=parameters_of(build, without=PLACE),
    epilog=example(
        "mmkd-cache submit build -c teacher.yaml --manifest manifest.jsonl \\\n"
        "    --videos videos --expert experts/rgb -o cache --tasks 8 --time 12:00:00"
    ),
)
@cluster_options(*EVERYWHERE, "tasks", "at_once")
@click.option("--plan", type=FILE, help="File with what `mmkd-cache plan --json` printed, for the number of tasks.")
@click.option("--no-verify", is_flag=True, help="Do not finalize and verify the cache in a second job.")
@as_json
def submit_build(files: tuple[Path, ...], overrides: tuple[str, ...], **options: Any) -> None:
    """Submit an array of tasks that build one cache, and a job after it that finalizes and verifies it."""
    options["tasks"] = planned_tasks(options["plan"], options["tasks"])
    recipe = build_recipe(files, overrides, options)
    cluster = cluster_of(files, overrides, options)
    require_one_process(cluster, "build")
    tasks = require_tasks(cluster, "--tasks N, or --plan FILE with what `mmkd-cache plan --json` printed")
    experts = [("--expert", path) for path in options["experts"]]
    require_there([("--manifest", recipe.data.manifest), ("--videos", recipe.data.videos), *experts], options)
    out = shlex.quote(str(options["out"]))
    jobs = [
        Job(
            "mmkd-build",
            about="Tasks that build one cache; each computes what no other does, and any number of them will do.",
            command=command_line("mmkd-cache build", typed(build, without=PLACE)),
            tasks=tasks,
            cpus=recipe.data.workers + 1,
        )
    ]
    if not options["no_verify"]:
        about = "Ends well where the cache is complete and every byte of it is what was written."
        command = f"mmkd-cache finalize {out} && mmkd-cache verify {out}"
        jobs.append(Job("mmkd-verify", about=about, command=command, computes=False))
    hand_over(jobs, cluster, options, follow=[f"mmkd-cache status {out}"])


@submit.command(
    "teach",
    params=parameters_of(teach, without=("name", "out")),
    epilog=example(
        "mmkd-cache submit teach rgb flow -c teacher.yaml --manifest manifest.jsonl \\\n"
        "    --videos videos -o experts --partition gpu --time 1-00:00:00"
    ),
)
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("-o", "--out", required=True, type=FOLDER, help="Folder of the experts.")
@cluster_options(*EVERYWHERE, "at_once", "nodes", "processes")
@as_json
def submit_teach(
    names: tuple[str, ...],
    files: tuple[Path, ...],
    overrides: tuple[str, ...],
    **options: Any,
) -> None:
    """Submit an array that trains the recipe's experts, or those of these NAMEs, a task for each, into OUT/NAME."""
    recipe = teach_recipe(names, files, overrides, options)
    chosen = names or tuple(recipe.experts)
    if not chosen:
        raise InputError("the recipe has no experts to teach; `mmkd-cache config example demo` prints one")
    cluster = cluster_of(files, overrides, options)
    require_there([("--manifest", recipe.data.manifest), ("--videos", recipe.data.videos)], options)
    words = ['"$name"', *typed(teach, without=("name", "out"))]
    words.append(f'-o {shlex.quote(str(options["out"]))}/"$name"')
    job = Job(
        "mmkd-teach",
        about=f"One task for each expert: {', '.join(chosen)}.",
        command=command_line("mmkd-cache teach", words),
        first=(f"names=({' '.join(map(shlex.quote, chosen))})", "name=${names[$SLURM_ARRAY_TASK_ID]}"),
        tasks=len(chosen),
        trains=True,
        cpus=recipe.data.workers + 1,
    )
    hand_over([job], cluster, options, follow=[f"mmkd-student show {shlex.quote(str(options['out']))}/*"])


@submit.command(
    "flow",
    params=parameters_of(flow, without=PLACE),
    epilog=example("mmkd-cache submit flow videos -o flow --new-short 256 --tasks 16 --gpus 1"),
)
@recipe_options
@cluster_options(*EVERYWHERE, "tasks", "at_once")
@as_json
def submit_flow(
    videos: tuple[str, ...],
    files: tuple[Path, ...],
    overrides: tuple[str, ...],
    **options: Any,
) -> None:
    """Submit an array of tasks that compute the flow of one list of videos; of a recipe only `cluster` is read."""
    for text in overrides:
        if not text.startswith("cluster."):
            raise InputError(f"--set {text}: flow has options and no recipe; of one only `cluster` is read")
    cluster = cluster_of(files, overrides, options)
    require_one_process(cluster, "flow")
    tasks = require_tasks(cluster, "--tasks N")
    from mmkd.pipeline.flow_command.options import is_one_file

    request = flow_request(videos, options | {"task": 0, "tasks": 1})
    if tasks > 1 and is_one_file(request.out):
        raise InputError(f"-o {options['out']}: one HDF5 file has one writer; give a folder, or --tasks 1")
    job = Job(
        "mmkd-flow",
        about="Tasks that compute the flow of one list of videos; each takes what no other has.",
        command=command_line("mmkd-cache flow", typed(flow, without=PLACE)),
        tasks=tasks,
        cpus=None if options["workers"] is None else options["workers"] + 1,
    )
    hand_over([job], cluster, options, follow=[])
