"""Files that are either whole or absent: written beside, synced, then moved into place.

Everything in the project that replaces a file goes through this module, so there is one rule for temporary names
(unique, so that two processes never write into the same one; short, so that any name that fits for the file fits
for it) and one translation of what the system refuses. It gives up protection against two writers of one path:
the last one to finish wins, whole.
"""

import os
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mmkd.data_manifests.errors import StorageError
from mmkd.data_manifests.system_errors import FORBIDDEN, FULL

TEMPORARY = ".mmkd-*.tmp"
"""Pattern of the temporary names; a file of such a name that nobody writes any more is a killed process's."""
ABANDONED_SECONDS = 3600.0
"""A temporary file that was not written to for so long belongs to nobody."""


@contextmanager
def atomic_path(path: Path, *, sync: bool = True, advice: str = "") -> Iterator[Path]:
    """Yield a temporary name beside `path` to write a file to; on leaving the block the file is moved to `path`.

    A crash at any instant leaves the old file or the new one; when the block raises, the old one stays. `sync`
    waits until the new one is on the disk; without it a power failure may leave a torn file, which is for files
    that carry their own hash. Raises StorageError naming `path`, with `advice` in place of the usual one.
    """
    temporary = path.with_name(TEMPORARY.replace("*", uuid.uuid4().hex[:16]))
    with storage_errors(path, advice=advice):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            if sync:
                sync_file(temporary)
            temporary.replace(path)
            if sync:
                sync_directory(path.parent)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes | Iterable[bytes], *, sync: bool = True, advice: str = "") -> None:
    """Write `data` (or its parts, one after the other) to `path` in one step, as `atomic_path` does."""
    with atomic_path(path, sync=sync, advice=advice) as temporary, temporary.open("wb") as file:
        file.writelines([data] if isinstance(data, bytes) else data)


def write_synced(path: Path, data: bytes) -> None:
    """Write a file in place and wait until it is on the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_file(path: Path) -> None:
    """Wait until what was written to a file is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    """Make a rename within the folder `path` durable."""
    sync_file(path)


def sweep_abandoned(folder: Path) -> None:
    """Delete the temporary files in `folder` that killed processes left there; one still written to stays."""
    for path in folder.glob(TEMPORARY):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                path.unlink()


@contextmanager
def storage_errors(path: Path, *, verb: str = "write", advice: str = "") -> Iterator[None]:
    """Turn an OSError of the block, but for an occupied name, into a StorageError that names the path.

    The text is `cannot <verb> <path>: <what the system says>; <advice>`; the usual advice follows from the error.
    """
    try:
        yield
    except FileExistsError:
        raise
    except OSError as error:
        what = error.strerror or str(error).splitlines()[0]
        raise StorageError(f"cannot {verb} {path}: {what}; {advice or _advice(error)}") from error


def _advice(error: OSError) -> str:
    if error.errno in FULL:
        return "free some space and run again"
    if error.errno in FORBIDDEN:
        return "nothing was lost; allow it there and run again, or name another place"
    return "nothing was lost; fix that and run again"
