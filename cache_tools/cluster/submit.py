"""The commands that submit others: the options they share, the other command's own words, and what they print."""

import json
import os
import shlex
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from mmkd.cache_tools.cluster.recipe import ClusterRecipe, WithCluster
from mmkd.cache_tools.cluster.sbatch import submit_chain
from mmkd.cache_tools.cluster.script import Job, render
from mmkd.cache_tools.process.command import Function, print_result
from mmkd.cache_tools.recipes.recipe import load_recipe
from mmkd.data_manifests.counted import counted
from mmkd.data_manifests.errors import InputError

ASKED = ("partition", "account", "time", "memory", "gpus", "cpus", "tasks", "at_once", "nodes", "processes")
"""Settings of the cluster section that have an option of their name."""
LINE = 100
"""Characters of a line of a script, about."""


def cluster_options(*names: str) -> Callable[[Function], Function]:
    """Return what adds the options of `submit` to a command: settings of these names, --sbatch and others."""
    kinds: dict[str, Any] = {"partition": str, "account": str, "time": str, "memory": str}

    def add(function: Function) -> Function:
        options = [
            click.option(f"--{name.replace('_', '-')}", type=kinds.get(name, int), help=f"{_described(name)}.")
            for name in names
        ]
        options += [
            click.option("--sbatch", multiple=True, metavar="OPTION", help="Option for sbatch; repeatable."),
            click.option(
                "--after", multiple=True, metavar="JOB", help="Begin when this job ended well; repeatable."
            ),
            click.option(
                "--print", "printed", is_flag=True, help="Print what would be submitted, and submit nothing."
            ),
        ]
        for option in reversed(options):
            function = option(function)
        return function

    return add


def _described(name: str) -> str:
    text = str(ClusterRecipe.model_fields[name].description).partition(";")[0].replace("`", "")
    return text[:1].upper() + text[1:]


def parameters_of(command: click.Command, *, without: Collection[str]) -> list[click.Parameter]:
    """Return a command's own parameters, for the command that submits it, but for those of these names."""
    return [parameter for parameter in command.params if parameter.name not in {*without, "as_json"}]


def typed(command: click.Command, *, without: Collection[str] = ()) -> list[str]:
    """Return what was typed here of a command's own parameters, quoted for a shell, an option with its value."""
    context, words = click.get_current_context(), []
    for parameter in parameters_of(command, without=without):
        name = str(parameter.name)
        if context.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            continue
        value = context.params[name]
        values = value if isinstance(value, tuple) else (value,)
        if isinstance(parameter, click.Argument):
            words += [shlex.quote(str(each)) for each in values]
        elif isinstance(parameter, click.Option) and parameter.is_flag:
            words.append(parameter.opts[0])
        else:
            words += [f"{parameter.opts[0]} {shlex.quote(str(each))}" for each in values]
    return words


def command_line(program: str, words: Sequence[str]) -> str:
    """Return a command for a script, on lines that can be read."""
    lines = [program]
    for word in words:
        if len(lines[-1]) + len(word) > LINE:
            lines.append("   ")
        lines[-1] += f" {word}"
    return " \\\n".join(lines)


def cluster_of(files: Sequence[Path], overrides: Sequence[str], options: Mapping[str, Any]) -> ClusterRecipe:
    """Return the cluster section of a recipe with what the options say; --sbatch adds to the recipe's."""
    named = {f"cluster.{name}": options[name] for name in ASKED if name in options}
    found = load_recipe(WithCluster, files=files, overrides=overrides, named=named).cluster
    if options["sbatch"]:
        named["cluster.sbatch"] = [*found.sbatch, *options["sbatch"]]
        found = load_recipe(WithCluster, files=files, overrides=overrides, named=named).cluster
    return found


def require_one_process(cluster: ClusterRecipe, what: str) -> None:
    """Raise InputError where several GPUs or nodes are asked for and a task uses one."""
    for name, value in {"gpus": cluster.gpus, "nodes": cluster.nodes, "processes": cluster.processes or 1}.items():
        if value > 1:
            raise InputError(
                f"cluster.{name} {value}: a task of {what} is one process on one GPU; ask for more tasks"
            )


def require_there(places: Iterable[tuple[str, Path | None]], options: Mapping[str, Any]) -> None:
    """Raise InputError, before anything is submitted, where a file or folder that the command reads is not there.

    Not for what is only printed, and not where jobs that run before may make it.
    """
    if options["printed"] or options["after"]:
        return
    for option, path in places:
        if path is not None and not path.exists():
            raise InputError(
                f"{option} {path}: there is no such file or folder here; with --after JOB it may come, and --print "
                "shows the script"
            )


def hand_over(
    jobs: Sequence[Job], cluster: ClusterRecipe, options: Mapping[str, Any], *, follow: Sequence[str]
) -> None:
    """Print the jobs' scripts, or submit them, each after the one before, and print how to follow them."""
    for number in options["after"]:
        if not number.replace("_", "").isdecimal():
            raise InputError(f"--after {number}: give the number of a job, as sbatch prints it")
    own = {name: value for name, value in os.environ.items() if name.startswith("MMKD_")}
    after = tuple(options["after"])

    def script(job: Job, ids: tuple[str, ...]) -> str:
        return render(job, cluster, folder=Path.cwd(), after=ids or after, environ=own)

    if options["printed"]:
        before = [(), *((f"ID_OF_{job.name}",) for job in jobs)]
        scripts = [script(job, ids) for job, ids in zip(jobs, before, strict=False)]
        print_result({"scripts": scripts}, as_json=options["as_json"], lines=["\n".join(scripts).rstrip()])
        return
    numbers = submit_chain([partial(script, job) for job in jobs])
    told = [
        f"job {number}: {job.name}" + (f", {counted(job.tasks, 'task')}" if job.tasks else "")
        for job, number in zip(jobs, numbers, strict=True)
    ]
    value = {"jobs": {job.name: number for job, number in zip(jobs, numbers, strict=True)}, "follow": list(follow)}
    watch = f"squeue --jobs {','.join(numbers)}"
    print_result(value, as_json=options["as_json"], lines=[*told, f"follow with: {'; '.join((watch, *follow))}"])


def planned_tasks(file: Path | None, tasks: int | None) -> int | None:
    """Return how many tasks --tasks says, or a file with what `mmkd-cache plan --json` printed; None without."""
    if file is None:
        return tasks
    if tasks is not None:
        raise InputError("--plan and --tasks both say how many tasks; give one of them")
    try:
        found = json.loads(file.read_bytes())["tasks"]
        if not isinstance(found, int) or found < 1:
            raise ValueError
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"--plan {file}: this is not what `mmkd-cache plan --json` printed") from error
    return found


def require_tasks(cluster: ClusterRecipe, how: str) -> int:
    """Return the size of the array; InputError where nothing says it."""
    if cluster.tasks is None:
        raise InputError(f"how many tasks? Give {how}, or cluster.tasks in a recipe")
    return cluster.tasks
