"""How this process was started: alone, or by torchrun or srun as one of several that train one run together."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from mmkd.data_manifests.errors import InputError

OTHER_LAUNCHERS = {"OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpiexec"}
"""Variable with the number of processes -> what sets it."""
FIRST_PORT, PORTS = 20_000, 20_000
"""Range of ports from which a Slurm job takes one by its number, so that jobs on one node do not collide."""


@dataclass(frozen=True)
class Launch:
    """This process among those of a run."""

    rank: int
    """Number of this process, from 0."""
    count: int
    """How many there are, at least 2."""
    local_rank: int
    """Number among those of this node."""
    address: str
    """Host name or address of process 0."""
    port: int
    """A free port there."""
    by: str
    """What started it, for messages."""


def launched(environ: Mapping[str, str] = os.environ) -> Launch | None:
    """Return how this process was started as one of several; None where it is alone.

    `WORLD_SIZE=1` says that it is. The variables of a Slurm job are not enough: a batch script, or a task of an
    array, sees the job's number of tasks and still runs once. Only a step of `srun` runs its command once for each
    task. Raises InputError for other launchers, and for variables that contradict each other.
    """
    world = _number(environ.get("WORLD_SIZE"))
    if world == 1:
        return None
    if world > 1:
        return _of_torchrun(environ, world)
    for variable, launcher in OTHER_LAUNCHERS.items():
        if _number(environ.get(variable)) > 1:
            raise InputError(
                f"this is one of {environ[variable]} processes that were started by {launcher} ({variable} is "
                "set): start several processes of a run with torchrun or srun; for different runs side by side set "
                "WORLD_SIZE=1"
            )
    rank = _number(environ.get("SLURM_PROCID"))
    tasks = max(_number(environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS")), rank + 1)
    in_step = rank > 0 or _number(environ.get("SLURM_STEP_ID"), default=-1) >= 0
    return _of_srun(environ, rank, tasks) if in_step and tasks > 1 else None


def refuse_several_processes(command: str, environ: Mapping[str, str] = os.environ) -> None:
    """Raise InputError, for a command that is one process, when a launcher started this one as one of several."""
    launch = launched(environ)
    if launch is not None:
        raise InputError(
            f"this is one of {launch.count} processes that were started by {launch.by}, and `{command}` is one "
            "process: each would do the same. Start it once; for different ones side by side set WORLD_SIZE=1"
        )


def _of_torchrun(environ: Mapping[str, str], count: int) -> Launch:
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not environ.get(name)]
    rank = _number(environ.get("RANK"))
    if missing or rank >= count:
        what = f"{', '.join(missing)} is not set" if missing else f"RANK is {rank}"
        raise InputError(
            f"WORLD_SIZE is {count}, and {what}: torchrun sets all of them; for one process set WORLD_SIZE=1"
        )
    local = _number(environ.get("LOCAL_RANK"), default=rank)
    return Launch(rank, count, local, environ["MASTER_ADDR"], _number(environ["MASTER_PORT"]), "torchrun")


def _of_srun(environ: Mapping[str, str], rank: int, count: int) -> Launch:
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or "localhost"
    job = _number(environ.get("SLURM_JOB_ID")) + 97 * _number(environ.get("SLURM_STEP_ID"))
    port = _number(environ.get("MASTER_PORT")) or FIRST_PORT + job % PORTS
    address = environ.get("MASTER_ADDR") or first_host(nodes)
    return Launch(rank, count, _number(environ.get("SLURM_LOCALID")), address, port, "srun")


def first_host(nodes: str) -> str:
    """Return the first host of a Slurm node list, such as `gpu01` of `gpu[01-04,07],cpu3` (see `scontrol`)."""
    found = re.match(r"([^\[,]*)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?", nodes)
    if found is None or not found[0]:
        raise InputError(f"the node list {nodes!r} names no host; set MASTER_ADDR to the first node")
    prefix, number, suffix = found.groups()
    return f"{prefix}{number or ''}{suffix or ''}"


def _number(text: str | None, default: int = 0) -> int:
    return int(text) if text is not None and text.isdecimal() else default
