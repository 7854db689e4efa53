"""Arrays made once per node and shared by all its processes as one read-only memory map, keyed by content.

The first process that needs them makes them; the others wait and map the same file, so the page cache holds one
copy however many ranks there are. A copy is one file, `<hash of its key>.node-copy`, written beside, synced and
moved into place; each process reads it all against its checksums when it opens it, so a torn, changed or foreign
copy is made again and never served. Copies are work saved, not results: delete them at will.

Correctness never rests on locks, they only spare work: `flock` elects the maker and dies with it, however it
dies; a shared one keeps a copy from being swept while a map of it lives. Where locks do not reach other nodes (a
folder on NFS), at worst several processes make the same copy, and one whole file stays. What it gives up: it
needs the disk space, and a file system that can lock (else StorageError says so).
"""

import fcntl
import logging
import os
import re
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from mmkd.cache_tools.cache.fingerprints import fingerprint
from mmkd.data_manifests.atomic import TEMPORARY, atomic_path, storage_errors
from mmkd.data_manifests.errors import InputError, StorageError
from mmkd.student.teacher.copy_file import ArrayPlan, DamagedCopyError, Maps, map_arrays, share_lock, write_arrays

log = logging.getLogger("mmkd")

SUFFIX = ".node-copy"
KEPT = 4
"""Copies that stay in a folder when one is made there, itself included; those in use stay besides."""
POLL_SECONDS = 0.05
COPY_NAME = re.compile(rf"[0-9a-f]{{32}}{re.escape(SUFFIX)}")
ADVICE = "name another folder with --node-copies"


def default_copies_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the node's own folder for copies.

    It lies in SLURM_TMPDIR or TMPDIR, where one is set, else in XDG_CACHE_HOME or ~/.cache, and for a user without
    a home in the system's temporary folder. Raises InputError when the one in a temporary folder, where anybody
    may write, belongs to somebody else.
    """
    for name in ("SLURM_TMPDIR", "TMPDIR"):
        if environ.get(name):
            return own_folder(Path(environ[name]))
    if environ.get("XDG_CACHE_HOME"):
        return Path(environ["XDG_CACHE_HOME"]) / "mmkd"
    home = home_folder()
    return own_folder(Path(tempfile.gettempdir())) if home is None else home / ".cache" / "mmkd"


def home_folder() -> Path | None:
    """Return the user's home, None for a user id without an entry in the system's list and without HOME.

    Containers and batch systems run jobs under such ids.
    """
    try:
        return Path.home()
    except RuntimeError:
        return None


def own_folder(temporary: Path) -> Path:
    """Return this user's folder in a folder where anybody may write; InputError when somebody else made it."""
    folder = temporary / f"mmkd-{os.getuid()}"
    with suppress(FileNotFoundError):
        if folder.lstat().st_uid != os.getuid():
            raise InputError(f"{folder} belongs to another user; name a folder with --node-copies")
    return folder


def open_or_make(directory: Path, key: Mapping[str, Any], plans: Iterable[ArrayPlan]) -> Maps:
    """Return name -> read-only map of the arrays of `key`, made by one of the node's processes.

    `key` (JSON values) must hold all that could change a number. `plans` may be a generator: it is asked only where
    no sound copy of that key is there; what it raises passes through and leaves nothing. Raises StorageError naming
    the folder when that is full, may not be written, or cannot lock.
    """
    path = directory / f"{fingerprint(key)[:32]}{SUFFIX}"
    made = told = False
    while True:
        try:
            arrays = open_copy(path, key)
        except DamagedCopyError as error:
            if made:
                raise StorageError(
                    f"{path} was written just now and is damaged ({error}): its disk loses data; "
                    "name another folder with --node-copies"
                ) from error
            arrays = None
        if arrays is not None:
            return arrays
        with claim(path.with_suffix(".lock")) as ours:
            if ours:
                made = _make_unless_there(path, key, plans)
                continue
        if not told:
            log.info("waiting for another process, which copies the cached targets to %s", directory)
            told = True
        time.sleep(POLL_SECONDS)


def open_copy(path: Path, key: Mapping[str, Any]) -> Maps | None:
    """Return the maps of the copy at `path`, None where there is none; raise DamagedCopyError for another key's."""
    with _storage_errors(path.parent):
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return None
        with file:
            arrays = map_arrays(file, key) if share_lock(file) else None
        with suppress(OSError):
            os.utime(path)  # when it was last used, for `_sweep`
    return arrays


def _make_unless_there(path: Path, key: Mapping[str, Any], plans: Iterable[ArrayPlan]) -> bool:
    """Make the copy, this process having the claim; return False when another one finished it just before."""
    try:
        if open_copy(path, key) is not None:
            return False
    except DamagedCopyError as error:
        log.warning("%s is damaged (%s) and is made again", path, error)
    with _storage_errors(path.parent):
        path.unlink(missing_ok=True)  # maps of it live on: only the name goes
        _sweep(path.parent)  # before writing, since the new copy may need the room
    _write_copy(path, key, plans)
    return True


def _write_copy(path: Path, key: Mapping[str, Any], plans: Iterable[ArrayPlan]) -> None:
    with atomic_path(path, advice=ADVICE) as temporary, temporary.open("xb", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # a sweeper deletes what nobody holds
        write_arrays(file, key, plans)


@contextmanager
def claim(path: Path) -> Iterator[bool]:
    """Hold the lock file `path`, or yield False at once when another process does; it is gone afterwards.

    The system frees it when its holder dies. (A child that the holder forks meanwhile would hold it on.)
    """
    with _storage_errors(path.parent):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    held = False
    try:
        with _storage_errors(path.parent), suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The last holder may have deleted it between our opening and locking it: then it locks nothing.
            held = os.fstat(descriptor).st_nlink > 0
        yield held
    finally:
        if held:
            with suppress(OSError):
                path.unlink()
        os.close(descriptor)


def _sweep(directory: Path) -> None:
    """Delete what makers that died left behind, and all but the copies last used; never one that is in use."""
    copies = [path for path in directory.iterdir() if COPY_NAME.fullmatch(path.name)]
    leftovers = list(directory.glob(TEMPORARY))
    # One place is left for the copy that is about to be made.
    for path in leftovers + sorted(copies, key=_last_use, reverse=True)[KEPT - 1 :]:
        with suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def _last_use(path: Path) -> float:
    with suppress(OSError):
        return path.stat().st_mtime
    return 0.0


def _storage_errors(directory: Path) -> AbstractContextManager[None]:
    """Turn what the system refuses into a StorageError that names the folder and the option."""
    return storage_errors(directory, verb="keep a copy of the targets in", advice=ADVICE)
