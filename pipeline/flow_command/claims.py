"""Several runs of the flow command into one output: who is at work there, and which video is whose.

    OUT/.part/<run>/run.json              who it is: locked and touched every few seconds for as long as it works
    OUT/.part/<run>/...                   what it gathers; nobody else touches it while it lives
    OUT/.part/claims/<video>.<number>     the run that computes a video; the highest number holds

A claim of a dead run is taken over by creating the next number, which exactly one run can; nothing that another
may hold is deleted to take over. A run lives while its file is locked. Where the file system has no locks, it lives
while its process does on this machine, and on another one as long as it gives signs of life.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mmkd.cache_tools.tasks.heartbeat import (
    BEAT_SECONDS,
    STALE_SECONDS,
    TaskId,
    new_task_id,
    ran_here,
    surely_dead,
)
from mmkd.data_manifests.atomic import ABANDONED_SECONDS, TEMPORARY, storage_errors
from mmkd.data_manifests.regular_file import read_regular

CARD, CLAIMS = "run.json", "claims"
CLAIM_NAME = re.compile(r"[0-9a-f]{32}\.\d+")
WHOLE = ""
"""Name of the claim on the output as a whole, as one file has it; no video is called that."""
ATTEMPTS = 20
"""How often a folder is made again that another run, going, removed as empty."""


@dataclass(frozen=True)
class Holder:
    """A run at work, as it introduces itself."""

    host: str = "unknown"
    """Name of its machine."""
    pid: int = 0
    """Its process id there."""
    since: str = "an unknown time"
    """When it began, UTC."""

    def __str__(self) -> str:
        """Return the words for a message."""
        return f"process {self.pid} on {self.host}, since {self.since}"


class FlowClaims:
    """This run among those that write into one output; nothing is written before it claims something."""

    def __init__(self, parts: Path) -> None:
        """Work below the folder `parts`."""
        self.id = new_task_id()
        self.folder = parts / self.id
        self._parts, self._claims = parts, parts / CLAIMS
        self._held: set[str] = set()
        self._lock: int | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._live, name="mmkd-flow-heartbeat", daemon=True)

    def take(self, name: str) -> Holder | None:
        """Claim a video; return None when it is ours, else the run at work that holds it.

        Raises StorageError when nothing can be written there.
        """
        self._begin()
        with storage_errors(self._claims):
            for _ in range(ATTEMPTS):
                newest = self._newest(name)
                if newest is not None and newest[1] == self.id:
                    return None
                if newest is not None and self._at_work(newest, name):
                    return self._holder(newest[1])
                if self._create(name, 0 if newest is None else newest[0] + 1):
                    self._held.add(name)
                    return None
        return Holder()

    def holds(self, name: str) -> bool:
        """Return whether a claim is (still) this run's: one that slept for long may have lost it."""
        newest = self._newest(name)
        return newest is not None and newest[1] == self.id

    def release(self, name: str) -> None:
        """Give up a claim of this run, and the dead ones below it."""
        self._held.discard(name)
        newest = self._newest(name)
        if newest is not None and newest[1] == self.id:
            for number in range(newest[0] + 1):  # the holding one last
                with suppress(OSError):
                    self._path(name, number).unlink(missing_ok=True)

    def part(self, suffix: str = "") -> Path:
        """Return a new name below this run's folder, short whatever the video is called."""
        return self.folder / f"{uuid.uuid4().hex[:12]}{suffix}"

    def end(self) -> None:
        """Leave: give everything up and remove what this run gathered."""
        if self._lock is None:
            return
        for name in list(self._held):
            self.release(name)
        self._ended.set()
        self._thread.join()
        os.close(self._lock)
        self._lock = None
        shutil.rmtree(self.folder, ignore_errors=True)
        self._sweep()

    def _begin(self) -> None:
        if self._lock is not None:
            return
        with storage_errors(self.folder):
            lock = self._open_card()
            _try_lock(lock, fcntl.LOCK_EX)
            since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
            card = {"host": socket.gethostname(), "pid": os.getpid(), "since": since}
            os.write(lock, json.dumps(card).encode() + b"\n")
        self._lock = lock
        self._thread.start()
        self._sweep()

    def _open_card(self) -> int:
        for _ in range(ATTEMPTS):
            with suppress(FileNotFoundError):  # another run, going, removed the folder above as empty
                self.folder.mkdir(parents=True, exist_ok=True)
                return os.open(self.folder / CARD, os.O_RDWR | os.O_CREAT, 0o644)
        return os.open(self.folder / CARD, os.O_RDWR | os.O_CREAT, 0o644)

    def _live(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with suppress(OSError):
                os.utime(self.folder / CARD)

    def _sweep(self) -> None:
        """Remove what dead runs left, and folders that are empty; what has other names is not ours."""
        with suppress(OSError):
            for path in self._parts.iterdir():
                if TaskId.parse(path.name) and path != self.folder and not self._alive(path.name):
                    shutil.rmtree(path, ignore_errors=True)
        with suppress(OSError):
            for path in self._claims.iterdir():
                if CLAIM_NAME.fullmatch(path.name) and (owner := _owner(path)) and not self._alive(owner):
                    path.unlink(missing_ok=True)
        for folder in (self._claims, self._parts):
            with suppress(OSError):  # not empty, or gone
                folder.rmdir()

    def _path(self, name: str, number: int) -> Path:
        key = hashlib.sha256(os.fsencode(name)).hexdigest()[:32]
        return self._claims / f"{key}.{number}"

    def _newest(self, name: str) -> tuple[int, str] | None:
        """Return the number and the owner of the claim that holds, or None."""
        stem = self._path(name, 0).stem
        numbers = [int(path.suffix[1:]) for path in self._claims.glob(f"{stem}.*") if path.suffix[1:].isdigit()]
        return (max(numbers), _owner(self._path(name, max(numbers)))) if numbers else None

    def _create(self, name: str, number: int) -> bool:
        """Create a claim with its content, in one step; False when another run was first."""
        try:
            self._claims.mkdir(exist_ok=True)
            return create_once(self._path(name, number), self.id.encode(), draft=self.part())
        except FileNotFoundError:  # another run, going, removed the folder as empty
            return False

    def _alive(self, run: str) -> bool:
        """Return whether a run is at work."""
        if run == self.id:
            return True
        folder = self._parts / run
        card = folder / CARD
        try:
            known = card if card.exists() else folder
            if known == card and _is_locked(card):
                return True
            if ran_here(run):
                return not surely_dead(run)
            return self._age_seconds(known) <= (STALE_SECONDS if known == card else ABANDONED_SECONDS)
        except FileNotFoundError:
            return False

    def _at_work(self, claim: tuple[int, str], name: str) -> bool:
        """Return whether a claim's run is at work; a claim without a name in it is one just being written."""
        number, run = claim
        try:
            return self._alive(run) if run else self._age_seconds(self._path(name, number)) <= STALE_SECONDS
        except FileNotFoundError:
            return False

    def _age_seconds(self, path: Path) -> float:
        """Return how long ago a file was touched, by the file system's own clock, whatever this host's says."""
        own = self.folder / CARD
        os.utime(own)
        return own.stat().st_mtime - path.stat().st_mtime

    def _holder(self, run: str) -> Holder:
        try:
            return Holder(**json.loads(read_regular(self._parts / run / CARD)))
        except (OSError, ValueError, TypeError):
            return Holder()


def create_once(path: Path, data: bytes, *, draft: Path | None = None) -> bool:
    """Create a file with its content in one step; False when it is there. `draft` is a name nobody else uses.

    On a file system without links who looks may see it empty for an instant.
    """
    draft = draft or path.with_name(TEMPORARY.replace("*", uuid.uuid4().hex[:16]))
    try:
        draft.write_bytes(data)
        try:
            os.link(draft, path)
        except (FileExistsError, FileNotFoundError):
            raise
        except OSError:
            with path.open("xb") as file:
                file.write(data)
    except FileExistsError:
        return False
    finally:
        draft.unlink(missing_ok=True)
    return True


def _owner(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, ValueError):
        return ""


def _is_locked(path: Path) -> bool:
    """Return whether a run holds the lock of its card; False where that cannot be told."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        return False
    try:
        return not _try_lock(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, kind: int) -> bool:
    """Lock a file if nobody else has; return False only when somebody has."""
    for _ in range(ATTEMPTS if kind == fcntl.LOCK_EX else 1):
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:  # for the owner: somebody is just looking
            time.sleep(0.01 if kind == fcntl.LOCK_EX else 0)
            continue
        except OSError:  # no locks here
            return True
        return True
    return False
