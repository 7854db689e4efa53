"""One writer for a folder: the first one holds it, a second one is told who does, and a dead one is followed.

    with folder_lock(out) as lock:      # InputError naming host, process and time when another one is at work there
        ...
        lock.check()                    # before each write: this process may have slept and been followed

The holder keeps a small file `.mmkd-lock-<generation>.json` in the folder and touches it every few seconds; whoever
follows a dead holder creates the next number, which exactly one process can. No `flock` is used: many network
file systems have none that reaches other machines. On the same machine a killed holder is known for dead at once;
one of another machine is watched until its file has been left alone for `STALE_SECONDS`, by the file's own times,
so the machines' clocks do not matter.
"""

import json
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from mmkd.cache_tools.tasks.heartbeat import BEAT_SECONDS, STALE_SECONDS, new_task_id, ran_here, surely_dead
from mmkd.data_manifests.atomic import storage_errors
from mmkd.data_manifests.errors import InputError
from mmkd.data_manifests.regular_file import read_regular

log = logging.getLogger("mmkd")

LOCK_FORM = ".mmkd-lock-{:06d}.json"
LOCK_NAME = re.compile(r"\.mmkd-lock-(\d+)\.json")
LOOK_SECONDS = 0.5
"""Between two looks at the file of a holder on another machine."""


@dataclass(frozen=True)
class Holder:
    """Who a lock file says holds a folder."""

    path: Path
    """The lock file."""
    generation: int
    """Its number; the highest one holds."""
    id: str
    """Machine, process and start of the holder (see mmkd.cache_tools.tasks.heartbeat); empty if not said."""
    who: str
    """The same for people: `process 12 on host a, since 2026-01-01 12:00 UTC`."""


class FolderLock:
    """A folder that this process holds."""

    def __init__(self, folder: Path, *, beat_seconds: float, stale_seconds: float) -> None:
        """Prepare; `folder_lock` takes and gives it back."""
        self.folder, self._beat_seconds, self._stale_seconds = folder, beat_seconds, stale_seconds
        self._id = new_task_id()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._live, name="mmkd-folder-lock", daemon=True)

    def take(self) -> None:
        """Hold the folder; InputError when another process is at work there, StorageError if not writable."""
        with storage_errors(self.folder):
            while not self._take_once():
                time.sleep(LOOK_SECONDS)
        self._thread.start()

    def check(self) -> None:
        """Raise InputError unless this process still holds the folder; call it before each write."""
        with storage_errors(self.folder):
            newest = newest_holder(self.folder)
            if newest is None:  # somebody tidied up: nobody else is here
                self._create(0)
            elif newest.id != self._id:
                raise InputError(
                    f"{self.folder} was taken over by {newest.who}, while this process gave no sign of life; it "
                    "stops here and writes nothing more"
                )

    def give_back(self) -> None:
        """Leave no lock file of this process, or of the dead ones before it."""
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join()
        with suppress(OSError):
            newest = newest_holder(self.folder)
            if newest is not None and newest.id == self._id:
                for path in lock_files(self.folder):  # the highest number last: it holds until all are gone
                    path.unlink()

    def _take_once(self) -> bool:
        newest = newest_holder(self.folder)
        if newest is None:
            return self._create(0)
        if newest.id == self._id:
            return True
        if not surely_dead(newest.id):
            if ran_here(newest.id):
                raise InputError(in_use(self.folder, newest))
            self._watch(newest)
        if not self._create(newest.generation + 1):
            return False
        followed = read_holder(newest.path)
        if followed is not None and followed.id == newest.id:
            log.warning("%s was held by %s, which is gone; continuing in its place", self.folder, newest.who)
            return True
        # Others followed it, finished and went away since we looked; somebody new may hold a lower number.
        (self.folder / LOCK_FORM.format(newest.generation + 1)).unlink(missing_ok=True)
        return False

    def _watch(self, holder: Holder) -> None:
        """Return when a holder on another machine gives no sign of life; raise InputError as soon as it does."""
        log.info("looking whether %s, which holds %s, is still at work", holder.who, self.folder)
        first, deadline = _touched(holder.path), time.monotonic() + self._stale_seconds
        while time.monotonic() < deadline:
            time.sleep(min(LOOK_SECONDS, self._beat_seconds))
            touched = _touched(holder.path)
            if touched is None:  # it finished just now
                return
            # Any change is a sign of life: this machine's clock is never compared with the other's.
            if touched != first:
                raise InputError(in_use(self.folder, newest_holder(self.folder) or holder))

    def _create(self, generation: int) -> bool:
        card = {
            "id": self._id,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        }
        path = self.folder / LOCK_FORM.format(generation)
        try:
            # O_EXCL holds on network file systems, too (NFS from version 3 on).
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "w") as file:
            json.dump(card, file)
        newest = newest_holder(self.folder)  # another one may have followed a holder that went away meanwhile
        return newest is not None and newest.id == self._id

    def _live(self) -> None:
        while not self._ended.wait(self._beat_seconds):
            with suppress(OSError):  # a folder that cannot be written stops the work itself
                newest = newest_holder(self.folder)
                if newest is not None and newest.id == self._id:
                    os.utime(newest.path)


@contextmanager
def folder_lock(
    folder: Path, *, beat_seconds: float = BEAT_SECONDS, stale_seconds: float = STALE_SECONDS
) -> Iterator[FolderLock]:
    """Make `folder` if it is not there, and hold it for the block.

    Raises InputError, naming the holder, when another process is at work in it. A folder that was made here and
    in which the block left nothing is removed again.
    """
    with storage_errors(folder):
        is_new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(folder, beat_seconds=beat_seconds, stale_seconds=stale_seconds)
    try:
        lock.take()
        yield lock
    finally:
        lock.give_back()
        if is_new:
            with suppress(OSError):  # it holds something, as it should
                folder.rmdir()


def lock_files(folder: Path) -> list[Path]:
    """Return the lock files of a folder, the holding one last."""
    return sorted((path for path in folder.iterdir() if LOCK_NAME.fullmatch(path.name)), key=_generation)


def newest_holder(folder: Path) -> Holder | None:
    """Return who holds a folder, at work or dead, or None."""
    for path in reversed(lock_files(folder)):
        holder = read_holder(path)
        if holder is not None:
            return holder
    return None


def read_holder(path: Path) -> Holder | None:
    """Return whom a lock file names, None where the file is gone."""
    try:
        card = json.loads(read_regular(path))
        who = f"process {card['pid']} on host {card['host']}, since {card['since']}"
        return Holder(path, _generation(path), str(card["id"]), who)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):  # being written just now, or torn by a power failure
        return Holder(path, _generation(path), "", f"a process that {path.name} does not name")


def in_use(folder: Path, holder: Holder) -> str:
    """Return the text for a folder in which another process is at work."""
    return (
        f"{folder} is in use by {holder.who}; wait until it has finished, stop it, or name another folder with -o"
    )


def _generation(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])


def _touched(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None
