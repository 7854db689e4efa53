"""The `cluster:` section of a recipe: what a batch system is asked for; no number of any result depends on it."""

import re
from typing import Self

from pydantic import ConfigDict, Field, field_validator, model_validator

from mmkd.cache_tools.recipes.recipe import Recipe

WORD = r"^[\w.,:+@/-]+$"
TIME = r"^\d+(-\d+(:\d+){0,2}|(:\d+){0,2})$"
OURS = ("array", "dependency", "requeue", "no-requeue", "parsable", "test-only", "wrap", "nodes", "ntasks-per-node")
"""Options of sbatch that the script's own lines depend on."""
SHORT = {"-a": "array", "-d": "dependency", "-N": "nodes"}


class ClusterRecipe(Recipe):
    """What Slurm is asked for; see sbatch(1)."""

    partition: str | None = Field(None, pattern=WORD, description="partition, or several with commas")
    account: str | None = Field(None, pattern=WORD, description="account that pays")
    time: str | None = Field(
        None, pattern=TIME, description="limit of each task, such as 12:00:00 or 2-00:00:00; null: the partition's"
    )
    memory: str | None = Field(
        None, pattern=r"^[1-9]\d*[KMGT]$", description="memory on each node, such as 64G; null: the cluster's"
    )
    gpus: int = Field(1, ge=0, le=64, description="GPUs on each node; a task of build or flow uses one at most")
    cpus: int | None = Field(
        None, ge=1, le=4096, description="processors of each process; null: one more than data.workers"
    )
    nodes: int = Field(1, ge=1, le=4096, description="nodes of one training; for build and flow say tasks")
    processes: int | None = Field(
        None, ge=1, le=256, description="processes of one training on each node; null: one for each GPU"
    )
    tasks: int | None = Field(
        None, ge=1, le=100_000, description="tasks of the array of build or flow; `mmkd-cache plan` knows how many"
    )
    at_once: int | None = Field(None, ge=1, description="tasks that run at once, at most; null: all")
    stop_seconds: int = Field(
        120, ge=10, le=65535, description="before its time is over a task is told to stop and is queued again"
    )
    sbatch: tuple[str, ...] = Field(
        (), description="further options of sbatch, one a line, such as --constraint=a100; they win over the others"
    )
    setup: str = Field(
        "", description="shell lines before the command, such as `module load cuda` or `source env/bin/activate`"
    )

    @field_validator("sbatch")
    @classmethod
    def _options(cls, lines: tuple[str, ...]) -> tuple[str, ...]:
        for line in lines:
            found = re.fullmatch(r"(--?[A-Za-z][\w-]*)(?:[= ].*|\d.*)?", line)
            if found is None:
                raise ValueError(f"{line!r} is no option of sbatch on one line, such as --constraint=a100")
            name = SHORT.get(line[:2], found[1].removeprefix("--"))
            if name in OURS:
                raise ValueError(f"{line!r}: the script has its own --{name}; see the other keys of `cluster`")
        return lines

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.processes is not None and self.gpus and self.processes > self.gpus:
            raise ValueError(
                f"processes {self.processes} on {self.gpus} GPUs: each needs its own; to train without GPUs say "
                "gpus: 0"
            )
        if self.time is not None and _seconds(self.time) < 2 * self.stop_seconds:
            raise ValueError(
                f"time {self.time}: with stop_seconds {self.stop_seconds} a task is told to stop before it has "
                "done much; give at least twice that"
            )
        return self

    @property
    def processes_per_node(self) -> int:
        """How many processes train on each node."""
        return self.processes or max(1, self.gpus)


def _seconds(text: str) -> int:
    """Return the seconds of a time as sbatch takes it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S."""
    days, dash, rest = text.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash or len(parts) == 3:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    else:
        hours, (minutes, seconds) = 0, (*parts, 0)[:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


class WithCluster(Recipe):
    """Any recipe, of which only the cluster section is read."""

    model_config = ConfigDict(extra="ignore")

    cluster: ClusterRecipe = Field(default_factory=ClusterRecipe)
