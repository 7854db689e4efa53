"""Who is at work on a cache: each task leaves a sign of life, so that others can tell a dead one.

A task is one process of a build. It rewrites `tasks/<id>.json` every few seconds. Its id names machine, process
and the time when that started, so that on the same machine a killed task is known for dead at once. Ages are
differences of modification times of one store: the hosts' clocks do not matter.

Who takes a task for dead buries it before going on: from then on the store lets it change nothing, not even its
sign of life, however late it wakes up (see mmkd.cache_tools.storage.store).
"""

import hashlib
import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mmkd.cache_tools.layout import TASK_ID, TASKS, own_keys
from mmkd.cache_tools.process.interrupt import StopRequest
from mmkd.cache_tools.process.progress import Progress
from mmkd.cache_tools.storage.store import Store
from mmkd.data_manifests.errors import StorageError

BEAT_SECONDS = 10.0
"""Seconds between two signs of life."""
STALE_SECONDS = 120.0
"""A task without a sign of life for so long is taken for dead."""
LOOK_SECONDS = 2.0
"""How long a look at the other tasks stays good."""


@dataclass(frozen=True)
class TaskId:
    """The parts of a task's id, `<machine>-<pid>-<started>-<random>`."""

    machine: str
    """Hash of the kernel's boot and process namespace: where it is equal, process ids mean the same."""
    pid: int
    """Process id."""
    started: str
    """When the process started, in the kernel's ticks: tells it from a later one of the same id."""

    @classmethod
    def parse(cls, text: str) -> "TaskId | None":
        """Return the parts, or None for a text that is not a task id."""
        if not re.fullmatch(TASK_ID, text):
            return None
        machine, pid, started, _ = text.split("-")
        return cls(machine, int(pid), started)


def new_task_id() -> str:
    """Return an id for this process that no other task has or had."""
    pid = os.getpid()
    # The random part: one process may be several tasks.
    return f"{_machine()}-{pid}-{_started(pid)}-{uuid.uuid4().hex[:8]}"


def surely_dead(task_id: str) -> bool:
    """Return whether the task ran on this machine and its process is gone."""
    parts = TaskId.parse(task_id)
    return parts is not None and ran_here(task_id) and _started(parts.pid) != parts.started


def ran_here(task_id: str) -> bool:
    """Return whether the task runs, or ran, on this machine since its last start."""
    parts, here = TaskId.parse(task_id), _machine()
    return parts is not None and here != "" and parts.machine == here  # "": a system that does not say


class Task:
    """This process's sign of life, from entering the block to leaving it."""

    def __init__(self, store: Store, task_id: str, *, beat_seconds: float = BEAT_SECONDS) -> None:
        """Prepare the task `task_id`, made by `new_task_id`."""
        self.id = task_id
        self.store = store
        self._beat_seconds = beat_seconds
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._live, name="mmkd-heartbeat", daemon=True)

    def __enter__(self) -> "Task":
        """Write in this task's name, and give the first sign of life."""
        self.store.begin(self.id)
        self.beat()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave nothing behind."""
        self._ended.set()
        self._thread.join()  # first: a late beat would write the card again
        with suppress(StorageError):  # the error that ended the block matters more
            self.store.delete(task_key(self.id))
        with suppress(StorageError):
            self.store.end()

    def beat(self) -> None:
        """Give a sign of life."""
        card = {"host": socket.gethostname(), "pid": os.getpid()}
        self.store.write(task_key(self.id), json.dumps(card, sort_keys=True).encode())

    def _live(self) -> None:
        while not self._ended.wait(self._beat_seconds):
            with suppress(StorageError):  # a full disk stops the build itself; others taking over is harmless
                self.beat()


class OtherTasks:
    """What a task knows of the others."""

    def __init__(self, own: Task, *, stale_seconds: float = STALE_SECONDS) -> None:
        """Judge by the clock of `own`'s store."""
        self._own, self._stale_seconds = own, stale_seconds
        self._live: set[str] = set()
        self._looked = -LOOK_SECONDS

    def alive(self, task_id: str) -> bool:
        """Return whether a task is at work, as of at most `LOOK_SECONDS` ago."""
        if task_id == self._own.id:
            return True
        if surely_dead(task_id):
            return False
        # A task that the last look did not see may have begun since: look again before calling it dead.
        if time.monotonic() - self._looked > LOOK_SECONDS or task_id not in self._live:
            self._live = self.living()
            self._looked = time.monotonic()
        return task_id in self._live

    def living(self) -> set[str]:
        """Return the ids of the other tasks at work, as of now."""
        own = self._own.id
        return live_tasks(self._own.store, own=own, stale_seconds=self._stale_seconds) - {own}

    def await_signs(self, task_ids: Collection[str], stop: StopRequest) -> None:
        """Return as soon as each task is known to live or to be dead.

        Of a task of this machine that is known at once. One of another machine gives a sign of life within
        `BEAT_SECONDS`, or is taken for dead: a job that was killed, and restarted elsewhere, waits for that.
        """
        store = self._own.store
        first = signs_of_life(store)
        waiting = {task_id for task_id in task_ids if task_id in first and not ran_here(task_id)}
        if not waiting:
            return
        with Progress("waiting for a sign of life of other tasks", total=len(waiting), unit="task") as progress:
            while waiting:
                stop.check("finished shards are kept")
                time.sleep(LOOK_SECONDS)
                now = signs_of_life(store)
                silent = {task_id for task_id in waiting & self.living() if now.get(task_id) == first[task_id]}
                progress.advance(len(waiting) - len(silent))
                waiting = silent

    def sweep(self) -> None:
        """Bury all dead tasks; their claims stay, to be taken over."""
        store = self._own.store
        writers = store.writers()
        signs = signs_of_life(store)
        now = signs.get(self._own.id, 0.0)
        for task_id in {*signs, *writers}:
            # A task makes its folder, and then its first sign of life: between the two it is not dead.
            begins = task_id not in signs and now - writers[task_id] <= self._stale_seconds
            if surely_dead(task_id) or not (self.alive(task_id) or (begins and TaskId.parse(task_id))):
                self.bury(task_id)

    def bury(self, task_id: str) -> None:
        """Make sure that a task that was found dead changes nothing any more; whoever goes on in its place must."""
        if TaskId.parse(task_id) is not None or task_id in self._own.store.writers():
            self._own.store.sweep(task_id)
            self._own.store.delete(task_key(task_id))


def signs_of_life(store: Store) -> dict[str, float]:
    """Return task -> when it last gave a sign of life, by the store's clock."""
    listed = store.list(TASKS)
    return {Path(key).stem: listed[key].modified_seconds for key in own_keys(listed, TASKS)}


def live_tasks(store: Store, *, own: str | None = None, stale_seconds: float = STALE_SECONDS) -> set[str]:
    """Return the ids of the tasks at work.

    The time is that of `own`'s latest sign of life. Without one (for who only looks) it is this host's, or the
    latest sign of life if that is later: right as long as the host's clock is not ahead by `stale_seconds`.
    """
    listed = signs_of_life(store)
    # A task without a sign of its own has no time to judge by: it takes nobody for dead by age.
    now = max([time.time(), *listed.values()]) if own is None else listed.get(own)
    return {
        task_id
        for task_id, modified in listed.items()
        if not surely_dead(task_id) and (now is None or now - modified <= stale_seconds)
    }


def task_key(task_id: str) -> str:
    """Return the key of a task's sign of life."""
    return f"{TASKS}/{task_id}.json"


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return hashlib.sha256(f"{boot} {Path('/proc/self/ns/pid').readlink()}".encode()).hexdigest()[:12]
    except OSError:
        return ""


def _started(pid: int) -> str:
    try:
        # The command's name, in parentheses, may hold anything; the start time is the 20th field after it.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]  # a zombie does no work
