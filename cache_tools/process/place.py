"""Which task of several this one is: by --task and --of, or by the Slurm array that it is a part of."""

import os
from collections.abc import Mapping, Sequence
from typing import TypeVar

import click

from mmkd.cache_tools.process.command import Function
from mmkd.data_manifests.errors import InputError

ID, COUNT, LOWEST, STEP = (f"SLURM_ARRAY_TASK_{name}" for name in ("ID", "COUNT", "MIN", "STEP"))
Item = TypeVar("Item")


def place_options(function: Function) -> Function:
    """Add --task and --of to a command; `task_place` takes their values."""
    of = click.option("--of", "tasks", type=click.IntRange(1), help="Tasks that share the work [default: 1].")
    task = click.option(
        "--task",
        type=click.IntRange(0),
        help="Number of this task, of --of [default: 0; both by themselves in a Slurm array].",
    )
    return task(of(function))


def task_place(task: int | None, tasks: int | None, environ: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Return (i, n) for task i of n: as the options say, as the Slurm array says, or 0 of 1.

    It only says where a task begins: tasks of one place share the work, too. Raises InputError for a number that is
    not below --of, for one of the two options within an array, and for an array's variables that contradict
    each other.
    """
    array = array_place(environ) if task is None or tasks is None else None
    if array is not None:
        if task is None and tasks is None:
            return array
        given = f"--of {tasks}" if task is None else f"--task {task}"
        raise InputError(
            f"{given}: give both --task and --of, or neither: this is task {array[0]} of the {array[1]} of a Slurm "
            f"array ({ID} is {environ[ID]})"
        )
    found = task or 0, tasks or 1
    if found[0] >= found[1]:
        raise InputError(f"--task {found[0]} --of {found[1]}: tasks are counted from 0")
    return found


def array_place(environ: Mapping[str, str]) -> tuple[int, int] | None:
    """Return (i, n) of a task of a Slurm array, counted from 0 whatever its ids; None outside of arrays.

    Ids with gaps, as of a part that is submitted again, may give two tasks one place. Source: sbatch(1), "output
    environment variables".
    """
    if not environ.get(ID):
        return None
    number, count, lowest, step = (
        _number(environ, name, default) for name, default in ((ID, None), (COUNT, None), (LOWEST, 0), (STEP, 1))
    )
    if count < 1 or step < 1 or number < lowest:
        said = ", ".join(f"{name}={environ[name]}" for name in (ID, COUNT, LOWEST, STEP) if name in environ)
        raise InputError(f"{said}: no task of a Slurm array has these; unset them, or give --task and --of")
    return (number - lowest) // step % count, count


def from_place(items: Sequence[Item], place: tuple[int, int]) -> list[Item]:
    """Return all items, beginning at the place's share of them, so that tasks of one list seldom meet."""
    first = len(items) * place[0] // place[1]
    return [*items[first:], *items[:first]]


def _number(environ: Mapping[str, str], name: str, default: int | None) -> int:
    text = environ.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdecimal():
        what = "is not set" if text is None else f"is {text!r}, no number"
        raise InputError(
            f"{ID} is {environ[ID]!r} and {name} {what}: a Slurm array sets both; unset {ID}, or give "
            "--task and --of"
        )
    return int(text)
