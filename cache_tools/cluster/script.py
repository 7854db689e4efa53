"""One job as a script for sbatch that a person can read, change and submit by hand."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmkd.cache_tools.cluster.recipe import ClusterRecipe

STOPPED_AND_RUN_AGAIN = """\
child=$!
# Time is nearly over, or the node is wanted: the command stops at a clean point, with exit code 75.
trap 'kill -USR1 $child' USR1 TERM
while wait $child; [ $? -gt 128 ] && kill -0 $child 2> /dev/null; do :; done
wait $child; code=$?
# Stopped, and not cancelled: run it again. An array's last task has the array's own number, so its place is named.
job=$SLURM_JOB_ID
[ "$SLURM_ARRAY_JOB_ID" ] && job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
if [ $code -eq 75 ] && scontrol -o show job "$job" | grep -q JobState=RUNNING; then
    scontrol requeue "$job"
fi
exit $code"""


@dataclass(frozen=True)
class Job:
    """One job: a command, or several tasks of it, or several processes that train one network."""

    name: str
    """What it is called in the queue."""
    about: str
    """A sentence for who reads the script."""
    command: str
    """Shell words, quoted; several commands joined by && where nothing stops at a signal."""
    first: tuple[str, ...] = ()
    """Shell lines before it."""
    tasks: int | None = None
    """Size of the array; None: one job."""
    trains: bool = False
    """Whether its processes train one network together, on all nodes."""
    computes: bool = True
    """Whether it wants the GPUs, and stops at a clean point at a signal."""
    cpus: int | None = None
    """Processors of each process, where the recipe does not say."""


def render(
    job: Job,
    cluster: ClusterRecipe,
    *,
    folder: Path,
    after: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
) -> str:
    """Return the script of a job that runs in `folder`, after the jobs with these ids have ended well.

    `environ` are variables that recipes are read from (`MMKD_*`), stated so that the script is whole.
    """
    options = [f"#SBATCH {line}" for line in (*_options(job, cluster, after), *cluster.sbatch)]
    program = job.command.split()[0]
    missing = f"{program} is not found on $(hostname); say in the recipe's cluster.setup how it is"
    lines = [
        "#!/bin/bash",
        f"# {job.about}",
        *options,
        "",
        f"cd {shlex.quote(str(folder))} || exit 2",
        *(f"export {name}={shlex.quote(value)}" for name, value in sorted((environ or {}).items())),
        *cluster.setup.splitlines(),
        f'command -v {program} > /dev/null || {{ echo "error: {missing}" >&2; exit 2; }}',
        *job.first,
        "",
    ]
    if not job.computes:
        return "\n".join([*lines, job.command, ""])
    return "\n".join([*lines, f"{_launch(job, cluster)}{job.command} &", STOPPED_AND_RUN_AGAIN, ""])


def _options(job: Job, cluster: ClusterRecipe, after: Sequence[str]) -> list[str]:
    several = job.trains and (cluster.nodes > 1 or cluster.processes_per_node > 1)
    array = None if job.tasks is None else f"0-{job.tasks - 1}" + (f"%{cluster.at_once}" if cluster.at_once else "")
    cpus = (cluster.cpus or job.cpus) if job.computes else None
    asked = {
        "job-name": job.name,
        "partition": cluster.partition,
        "account": cluster.account,
        "time": cluster.time,
        "nodes": cluster.nodes if job.trains else 1,
        "ntasks-per-node": cluster.processes_per_node if several else 1,
        "gpus-per-node": cluster.gpus if job.computes and cluster.gpus else None,
        "cpus-per-task": cpus,
        "mem": cluster.memory,
        "array": array,
        "output": "%x-%A_%a.log" if array else "%x-%j.log",
        "open-mode": "append",
        "signal": f"B:USR1@{cluster.stop_seconds}" if job.computes else None,
        "dependency": f"afterok:{':'.join(after)}" if after else None,
        "kill-on-invalid-dep": "yes" if after else None,
    }
    return [f"--{name}={value}" for name, value in asked.items() if value is not None] + ["--requeue"]


def _launch(job: Job, cluster: ClusterRecipe) -> str:
    """Return what stands before the command: srun, where several processes train one network.

    srun passes signals on and returns the processes' own exit code, both of which torchrun does not; the processes
    find each other by Slurm's variables.
    """
    if not job.trains or cluster.nodes * cluster.processes_per_node == 1:
        return ""
    cpus = cluster.cpus or job.cpus  # srun does not take it from sbatch since Slurm 22.05
    return "srun --kill-on-bad-exit=0 " + (f"--cpus-per-task={cpus} " if cpus else "")
