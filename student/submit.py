"""The command `mmkd-student submit`: a training on one or more nodes of a cluster, from the options of `train`."""

import shlex
from collections.abc import Callable
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
    require_there,
    typed,
)
from mmkd.cache_tools.process.command import as_json
from mmkd.cache_tools.process.help_text import WholeHelp, example
from mmkd.student.recipes.student import Mode, StudentRecipe

Asked = Callable[[tuple[Path, ...], tuple[str, ...], dict[str, Any]], tuple[StudentRecipe, Mode]]
"""What makes recipe and mode of files, overrides and options, and refuses what does not fit together."""


def submit_of(train: click.Command, asked: Asked) -> click.Command:
    """Return the command that submits `train`."""

    @click.command(
        "submit",
        cls=WholeHelp,
        params=parameters_of(train, without=()),
        epilog=example(
            "mmkd-student submit -c student.yaml --manifest manifest.jsonl \\\n"
            "    --videos videos --cache cache -o runs/student --nodes 2 --gpus 8"
        ),
    )
    @cluster_options("partition", "account", "time", "memory", "gpus", "cpus", "nodes", "processes")
    @as_json
    def submit(files: tuple[Path, ...], overrides: tuple[str, ...], **options: Any) -> None:
        """Hand `train` to Slurm as one readable script: a process for each GPU of each node trains one student.

        Options are those of `train`, and what the cluster is asked for; the recipe's section `cluster` has the same
        and more. Stopped before its time is over, or for another job, it is queued again and continues.
        """
        recipe, _ = asked(files, overrides, options)
        cluster = cluster_of(files, overrides, options)
        cache = options["cache"] if isinstance(options["cache"], Path) else None
        places = [("--manifest", recipe.data.manifest), ("--videos", recipe.data.videos), ("--cache", cache)]
        require_there(places, options)
        processes = cluster.nodes * cluster.processes_per_node
        job = Job(
            "mmkd-train",
            about=f"One student, trained by {processes} process{'es' if processes > 1 else ''}.",
            command=command_line("mmkd-student train", typed(train)),
            trains=True,
            cpus=recipe.data.workers + 1,
        )
        hand_over([job], cluster, options, follow=[f"mmkd-student show {shlex.quote(str(options['out']))}"])

    return submit
