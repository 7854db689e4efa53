"""Reading batches ahead, by threads of this process or by processes: the same bytes in the same order."""

import os
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from torch.profiler import record_function

from mmkd.student.data.batches import Batch, Item, Step, ViewDataset, clips_of, read_items, stack
from mmkd.student.recipes.loop import LoopRecipe

READING = "mmkd: reading"
"""What a trace shows where a thread reads a clip."""
LEAST_CORES = 4
"""Cores for each process that trains, below which threads read: the network wants them, too."""
MOST_PROCESSES = 16
LEAST_VIEWS = 2048
"""Views that are still to be read, below which starting processes takes longer than they save."""


@dataclass(frozen=True)
class Reading:
    """Who reads, and how far ahead; it changes no number."""

    threads: int = 4
    """Threads that read where no process does."""
    processes: int | None = None
    """Loader processes; 0: threads; None: `usual_processes`."""
    ahead: int = 4
    """Batches that are read ahead."""
    pin: bool = False
    """Whether batches come in page-locked memory, from which a GPU copies while the host works on."""

    @classmethod
    def of(cls, recipe: LoopRecipe, device: str) -> "Reading":
        """Return what a recipe says, for a device of that type."""
        return cls(recipe.loader_threads, recipe.loader_processes, recipe.prefetch_batches, device == "cuda")


def read_batches(dataset: ViewDataset, steps: Iterable[Step], reading: Reading, *, views: int) -> Generator[Batch]:
    """Yield the batches of `steps` in order, some read ahead; `views` is how many views they have together.

    Raises InputError, naming clip, view and reason, for a clip that cannot be read, StorageError when a process
    died.
    """
    processes = reading.processes
    if processes is None:
        processes = usual_processes(dataset, views)
    if processes:
        from mmkd.student.data.loader_processes import read_by_processes

        return read_by_processes(dataset, steps, processes=processes, ahead=reading.ahead, pin=reading.pin)
    return read_by_threads(dataset, steps, threads=reading.threads, ahead=reading.ahead, pin=reading.pin)


def usual_processes(dataset: ViewDataset, views: int) -> int:
    """Return how many processes read where nobody says: one less than cores, or none where threads do as well.

    Threads do where all clips stay decoded in memory, where little is left to read, and on a few cores.
    """
    cores = own_cores()
    if cores < LEAST_CORES or views < LEAST_VIEWS or not getattr(dataset, "worth_processes", False):
        return 0
    return min(cores - 1, MOST_PROCESSES)


def own_cores() -> int:
    """Return the processor cores of this process: those that it may use, shared with its siblings on this node."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    siblings = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun's
    return max(1, usable // max(1, siblings))


def read_by_threads(
    dataset: ViewDataset, steps: Iterable[Step], *, threads: int, ahead: int, pin: bool = False
) -> Generator[Batch]:
    """Yield the batches of `steps` in order, while `threads` threads read at most `ahead` more.

    Which thread is fast changes nothing; with `pin` batches lie in page-locked memory. Raises InputError, naming
    clip, view and reason, for a clip that cannot be read.
    """
    remaining = iter(steps)
    waiting: deque[tuple[Step, list[Future[list[Item]]]]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="read-clips")

    def read(row: int, views: Sequence[int]) -> list[Item]:
        with record_function(READING):
            return read_items(dataset, row, views)

    def submit_next() -> None:
        with suppress(StopIteration):
            step = next(remaining)
            waiting.append((step, [pool.submit(read, *clip) for clip in clips_of(step)]))

    try:
        for _ in range(ahead + 1):
            submit_next()
        while waiting:
            step, futures = waiting.popleft()
            items = [item for future in futures for item in future.result()]
            submit_next()
            yield Batch(*step, stack(items, pin=pin))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
