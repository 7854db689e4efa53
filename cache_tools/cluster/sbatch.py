"""Handing scripts to Slurm: each after the one before it, all of them or none."""

import shutil
import subprocess
from collections.abc import Callable, Sequence

from mmkd.data_manifests.errors import InputError, StorageError

ANSWER_SECONDS = 120
"""How long Slurm may take to answer."""


def submit_chain(scripts: Sequence[Callable[[tuple[str, ...]], str]]) -> list[str]:
    """Submit jobs, each after all of the one before it have ended well; return their ids.

    A script is made of the ids that it waits for. Raises InputError where there is no Slurm, and with sbatch's own
    words where it refuses a script; the jobs before are then cancelled again. StorageError where Slurm is silent.
    """
    if shutil.which("sbatch") is None:
        raise InputError(
            "there is no Slurm on this machine (no sbatch): submit from a machine of the cluster, or --print the "
            "script"
        )
    numbers: list[str] = []
    for script in scripts:
        try:
            numbers.append(_sbatch(script(tuple(numbers[-1:]))))
        except (InputError, StorageError) as error:
            raise type(error)(f"{error}{_cancel(numbers)}") from error
    return numbers


def _sbatch(script: str) -> str:
    done = _run(("sbatch", "--parsable"), script)
    if done.returncode != 0:
        lines = [line.removeprefix("sbatch: ").removeprefix("error: ").strip() for line in done.stderr.splitlines()]
        said = "; ".join(filter(None, lines))
        raise InputError(f"Slurm refused it: {said or f'sbatch ended with exit code {done.returncode}'}")
    return done.stdout.strip().partition(";")[0]  # ID, or ID;CLUSTER


def _cancel(numbers: Sequence[str]) -> str:
    """Cancel jobs; return what to add to the error."""
    if not numbers:
        return ""
    done = _run(("scancel", *numbers), "")
    jobs = ", ".join(numbers)
    if done.returncode != 0:
        return f"; cancel what was submitted before it: scancel {jobs}"
    return f"; what was submitted before it was cancelled again (job {jobs})"


def _run(command: tuple[str, ...], text: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, input=text, capture_output=True, text=True, timeout=ANSWER_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise StorageError(
            f"{command[0]} has not answered for {ANSWER_SECONDS} s: look with squeue whether a job was submitted"
        ) from error
