"""Training is one process: a launcher that starts several would train the same run several times."""

import os
from collections.abc import Mapping

from mmkd.data_manifests.errors import InputError

LAUNCHERS = {"WORLD_SIZE": "torchrun", "OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpiexec"}
"""Variable with the number of processes -> what sets it."""


def refuse_several_processes(command: str, environ: Mapping[str, str] = os.environ) -> None:
    """Raise InputError when a launcher started this process as one of several; `WORLD_SIZE=1` says that it did not.

    The variables of a Slurm job are not enough: a batch script, or a task of an array, sees the job's number of
    tasks and still runs once. Only a step of `srun` runs its command once for each task.
    """
    if environ.get("WORLD_SIZE") == "1":
        return
    for variable, launcher in LAUNCHERS.items():
        if _number(environ.get(variable)) > 1:
            raise InputError(_refusal(command, _number(environ[variable]), f"{launcher} ({variable} is set)"))
    task = _number(environ.get("SLURM_PROCID"))
    tasks = max(_number(environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS")), task + 1)
    in_step = task > 0 or _number(environ.get("SLURM_STEP_ID"), default=-1) >= 0
    if in_step and tasks > 1:
        raise InputError(_refusal(command, tasks, "srun (give it -n 1)"))


def _refusal(command: str, processes: int, launcher: str) -> str:
    return (
        f"this is one of {processes} processes that were started by {launcher}, and training uses one process: "
        f"each would train the same run. Start `{command}` once; for different runs side by side set WORLD_SIZE=1"
    )


def _number(text: str | None, default: int = 0) -> int:
    return int(text) if text is not None and text.isdecimal() else default
