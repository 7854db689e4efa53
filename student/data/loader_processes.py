"""Batches read by processes: torch's DataLoader over the steps of a run, whose workers decode and replay views.

Workers are forked from a small server that has no threads, live for the whole run, and hold what they read from as
shared columns. A batch travels in a file in memory, so /dev/shm may be as small as containers have it, and a worker
that is killed leaves nothing behind. Which worker is fast changes nothing.
"""

import os
import pickle
import signal
import sys
import threading
import warnings
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import connection, forkserver, parent_process
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from mmkd.cache_tools.process.pool_worker import NO_MEMORY, ONE_THREAD, PARENTS_SIGNALS
from mmkd.cache_tools.process.streams import print_messages_only
from mmkd.data_manifests.errors import InputError, MmkdError, StorageError
from mmkd.student.data.batches import Batch, Item, Step, ViewDataset, clips_of, read_items
from mmkd.student.data.shared_arrays import SharedArrays

SERVER = "mmkd.student.data.fork_server"
SERVER_ENVIRONMENT = {**ONE_THREAD, "PYTHONSAFEPATH": "1"}
"""One thread, as a process with more must not be forked; no module of the current folder in a known one's place."""
NAMED_CLIPS = 4
NOTICED_SECONDS = 2.0
"""How long it may take until the end of a process is known."""
SLOW_SECONDS = 5.0
"""How long a worker may take to end before it is killed."""


def read_by_processes(
    dataset: ViewDataset, steps: Iterable[Step], *, processes: int, ahead: int, pin: bool = False
) -> Generator[Batch]:
    """Yield the batches of `steps` in order, read by `processes` processes; each has at least one more in hand.

    `ahead` batches beyond those in work are read, rounded up to the same number for each process. Raises
    InputError, naming clip, view and reason, for a clip that cannot be read, StorageError when a process died.
    """
    sent: deque[Step] = deque()
    iterator = _start(_Steps(dataset), _noted(steps, sent), processes=processes, ahead=ahead, pin=pin)
    try:
        while True:
            try:
                found = next(iterator)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:  # the last two: it died between message and answer
                _refuse_death(iterator, sent, dataset.clip_ids, error)
                raise
            if isinstance(found, MmkdError):
                raise found
            yield Batch(*sent.popleft(), found)
    finally:
        _end(iterator)


def _noted(steps: Iterable[Step], sent: deque[Step]) -> Iterator[Step]:
    for step in steps:
        sent.append(step)
        yield step


class _Steps:
    """A data set whose items are whole steps: what a worker holds."""

    def __init__(self, dataset: Any) -> None:
        pack = getattr(dataset, "for_processes", None)
        self._dataset = dataset if pack is None else pack()

    def __getitem__(self, step: Step) -> Any:
        """Return a step's inputs, or the error that ends the run."""
        try:
            items = [item for clip in clips_of(step) for item in read_items(self._dataset, *clip)]
            return TravellingBatch(items)
        except MmkdError as error:
            return error.with_traceback(None)
        except MemoryError:
            return StorageError(NO_MEMORY)


class TravellingBatch:
    """Items of one batch in a file in memory; in the process that receives them they are tensors (B, ...)."""

    def __init__(self, items: Sequence[Item]) -> None:
        """Stack items; MemoryError when there is no memory to lend."""
        try:
            shapes = {name: (first.dtype, (len(items), *first.shape)) for name, first in items[0].items()}
            self._arrays = SharedArrays(shapes)
        except OSError as error:
            raise MemoryError(str(error)) from error
        for name, stacked in self._arrays.items():
            np.stack([item[name] for item in items], out=stacked)

    def __reduce__(self) -> tuple[Any, ...]:
        """Send a handle of the file; what remains of the batch here is unmapped with it."""
        return _as_tensors, (self._arrays,)


def _as_tensors(arrays: SharedArrays) -> dict[str, Tensor]:
    return {name: torch.from_numpy(value) for name, value in arrays.items()}


def _start(dataset: _Steps, steps: Iterable[Step], *, processes: int, ahead: int, pin: bool) -> Any:
    """Return a DataLoader's iterator over `steps`, its workers at work."""
    start_server()
    try:
        # It warns of more processes than cores, which somebody asked for, and of what is an error here.
        with _without_main(), warnings.catch_warnings(action="ignore", category=UserWarning):
            loader: DataLoader[Any] = DataLoader(
                dataset,  # type: ignore[arg-type]  # asked for steps, which are no numbers
                batch_size=None,
                sampler=steps,
                num_workers=processes,
                prefetch_factor=-(-(processes + ahead) // processes),
                collate_fn=_as_it_is,
                pin_memory=pin,
                worker_init_fn=_begin,
                multiprocessing_context="forkserver",
                generator=torch.Generator(),  # its own: what is drawn here must not move torch's random numbers
            )
            return iter(loader)
    except (TypeError, AttributeError, pickle.PicklingError) as error:
        advice = "set train.loader_processes=0"
        raise InputError(f"these clips cannot be sent to processes ({error}): {advice}") from error


def start_server() -> None:
    """Start the server that workers are forked from, unless it runs; it takes seconds, for which nobody waits."""
    forkserver.set_forkserver_preload([SERVER])
    before = {name: os.environ.get(name) for name in SERVER_ENVIRONMENT}
    os.environ.update(SERVER_ENVIRONMENT)
    try:
        with _without_main():
            forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _without_main() -> Iterator[None]:
    """Hide `__main__` from multiprocessing, which would run it again in each worker: a script needs no guard."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _as_it_is(data: Any) -> Any:
    return data


def _begin(worker: int) -> None:
    """Prepare a worker: the process that trains decides when it ends."""
    for number in PARENTS_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    print_messages_only()
    os.dup2(2, 1)  # what a decoder prints must not end up in a command's result
    cv2.setNumThreads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process once the one that trains is gone: nothing else would, as the server lives while we do."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(0)


def _refuse_death(iterator: Any, sent: deque[Step], clip_ids: Sequence[str], error: Exception) -> None:
    """Raise StorageError where a worker is dead, by which DataLoader's error came about."""
    ends = connection.wait([worker.sentinel for worker in iterator._workers], NOTICED_SECONDS)
    codes = [worker.exitcode for worker in iterator._workers if worker.sentinel in ends]
    if not codes:
        return
    cause = signal.Signals(-codes[0]).name if codes[0] < 0 else f"exit code {codes[0]}"
    rows = list(dict.fromkeys(sent[0][0].tolist())) if sent else []
    names = ", ".join(repr(clip_ids[row]) for row in rows[:NAMED_CLIPS])
    raise StorageError(
        f"a loader process died ({cause}) when clips {names}{', ...' if len(rows) > NAMED_CLIPS else ''} were to "
        "be read; did memory run out? All checkpoints are whole: run the same command again to go on; fewer "
        "train.loader_processes or train.prefetch_batches need less memory"
    ) from error


def _end(iterator: Any) -> None:
    """End the workers and wait for them; torch has no public way to do so before the iterator is forgotten."""
    iterator._shutdown_workers()
    for worker in iterator._workers:
        worker.join(SLOW_SECONDS if worker.is_alive() else None)
        if worker.is_alive():
            worker.kill()
            worker.join()
