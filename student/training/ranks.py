"""The processes that train one run together: one for each GPU, under torchrun or srun, or this one alone.

Each of them computes its share of every batch; gradients are averaged by torch's DistributedDataParallel, with NCCL
on GPUs and gloo elsewhere. Process 0 alone writes and reports.
"""

import atexit
import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mmkd.cache_tools.frames.records import IntArray
from mmkd.cache_tools.tasks.folder_lock import FolderLock, folder_lock
from mmkd.data_manifests.errors import (
    EXIT_INTERRUPTED,
    InputError,
    InterruptedByUserError,
    MmkdError,
    StorageError,
)
from mmkd.student.training.launcher import Launch, launched

Value = TypeVar("Value")
PATIENCE = timedelta(hours=2)
"""How long processes wait for each other: while process 0 validates or writes, the others do."""
LOST = "another process of this run has ended; its own message says why. Run the same command again to continue"


@dataclass(frozen=True)
class Ranks:
    """This process among those of a run."""

    rank: int = 0
    """Number of this process, from 0."""
    count: int = 1
    """How many there are."""

    @property
    def is_first(self) -> bool:
        """Whether this process writes and reports."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        """Whether there are other processes."""
        return self.count > 1

    def share(self, rows: IntArray) -> slice:
        """Return which of a batch's rows are this process's: shares are contiguous, their sizes differ by one."""
        size, more = divmod(len(rows), self.count)
        start = self.rank * size + min(self.rank, more)
        return slice(start, start + size + (self.rank < more))

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over processes of a tensor that each of them has."""
        if self.several:
            with told_when_lost(self):
                dist.all_reduce(values)
        return values

    def interleaved(self, own: list[Value]) -> list[Value]:
        """Return what all processes have, by turns: of process r item i becomes number i * count + r."""
        if not self.several:
            return own
        lists: list[Any] = [None] * self.count
        with told_when_lost(self):
            dist.all_gather_object(lists, own)
        return [values[turn] for turn in range(max(map(len, lists))) for values in lists if turn < len(values)]

    def same(self, make: Callable[[], Value]) -> Value:
        """Return what process 0 makes, in every process; what it raises ends all of them."""
        if not self.several:
            return make()
        made: list[Any] = [None, None]
        if self.is_first:
            try:
                made[0] = make()
            except MmkdError as error:
                made[1] = error.exit_code
                self._from_first(made)
                raise
        made = self._from_first(made)
        if made[1] is not None:
            raise SystemExit(made[1])  # process 0 has told why
        return made[0]  # type: ignore[no-any-return]

    def in_turn(self, make: Callable[[], Value]) -> Value:
        """Return what each process makes, process 0 before the others: they find what it has left on disk."""
        if not self.several:
            return make()
        kept: list[Value] = []
        self.same(lambda: kept.append(make()))
        return kept[0] if self.is_first else make()

    def _from_first(self, value: list[Any]) -> list[Any]:
        with told_when_lost(self):
            dist.broadcast_object_list(value, src=0)
        return value

    def together(self, network: nn.Module, device: torch.device) -> nn.Module:
        """Return a network whose gradients are averaged over processes; batch norms see this one's share alone."""
        if not self.several:
            return network
        on_gpu = device.type == "cuda"
        return DistributedDataParallel(network, device_ids=[device] if on_gpu else None)


ALONE = Ranks()


@contextmanager
def told_when_lost(ranks: Ranks) -> Iterator[None]:
    """Raise InterruptedByUserError in place of torch's own when another process has gone."""
    try:
        yield
    except RuntimeError as error:  # gloo's and NCCL's errors are of this kind, or of DistError, which is one
        lost = ("connection closed", "connection reset", "broken pipe", "nccl", "socket", "timed out")
        if ranks.several and any(sign in str(error).lower() for sign in lost):
            raise InterruptedByUserError(LOST) from error
        raise


@contextmanager
def joined(device: torch.device, launch: Launch | None = None) -> Iterator[Ranks]:
    """Join the other processes of this run, if a launcher started several, for the block.

    Raises InputError where they cannot find each other.
    """
    launch = launched() if launch is None else launch
    if launch is None:
        yield ALONE
        return
    _connect(launch, device)
    ranks = Ranks(launch.rank, launch.count)
    try:
        yield ranks
        _leave_together(ranks)
    except BaseException as error:
        if not isinstance(error, InterruptedByUserError) or str(error) == LOST:
            _leave_alone(error)
            raise
        _leave_together(ranks)  # a clean stop, of all of them
        _let_go()
        raise
    _let_go()


@contextmanager
def held_by_first(folder: Path, ranks: Ranks) -> Iterator[FolderLock | None]:
    """Hold a run's folder for the block: process 0 does, for all of them, and has the lock; the others have None.

    Raises InputError where another run holds it.
    """
    with ExitStack() as held:
        locks: list[FolderLock] = []
        ranks.same(lambda: locks.append(held.enter_context(folder_lock(folder))))
        yield locks[0] if locks else None


def _let_go() -> None:
    gc.collect()  # what still holds on to the group would outlive it, and end this process with an abort
    dist.destroy_process_group()


def _leave_alone(error: BaseException) -> None:
    """See to it that this process ends once its error is told, without a farewell to the others.

    Closing a group waits for operations that the others have begun: NCCL's may do so for ever, and the launcher,
    which ends the others when this process has ended, would never know.
    """
    code = 1
    if isinstance(error, MmkdError):
        code = error.exit_code
    elif isinstance(error, SystemExit) and isinstance(error.code, int):
        code = error.code
    elif isinstance(error, KeyboardInterrupt):
        code = EXIT_INTERRUPTED
    elif isinstance(error, OSError | MemoryError):
        code = StorageError.exit_code
    atexit.register(_end_at_once, code)


def _end_at_once(code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _leave_together(ranks: Ranks) -> None:
    """Wait for the others: process 0 serves all of them, and a connection that it closes early is an error."""
    with told_when_lost(ranks):
        dist.barrier()


def _connect(launch: Launch, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=f"tcp://{launch.address}:{launch.port}" if launch.by == "srun" else "env://",
            rank=launch.rank,
            world_size=launch.count,
            timeout=PATIENCE,
        )
    except (RuntimeError, ValueError) as error:
        told = " ".join(str(error).split())[:200]
        raise InputError(
            f"the {launch.count} processes of this run cannot find each other at {launch.address}:{launch.port} "
            f"({told}); set MASTER_ADDR and MASTER_PORT to an address and a free port of the first node"
        ) from error


def own_device(name: str, launch: Launch | None = None) -> str:
    """Return the name of this process's device: of several, `auto` and `cuda` mean the GPU of its number.

    Raises InputError for one GPU that all of them are to use, and for more processes than GPUs.
    """
    launch = launched() if launch is None else launch
    if launch is None:
        return name
    if name.startswith("cuda:"):
        raise InputError(
            f"--device {name} is one GPU, and {launch.count} processes were started: leave --device out"
        )
    gpus = torch.cuda.device_count()
    if name not in ("auto", "cuda") or not gpus:
        return name
    if gpus == 1:  # Slurm may show each task its own GPU alone
        return "cuda:0"
    if launch.local_rank >= gpus:
        raise InputError(
            f"this node has {gpus} GPUs, and {launch.local_rank + 1} or more processes: start one for each GPU"
        )
    return f"cuda:{launch.local_rank}"
