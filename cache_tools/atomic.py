"""Files that are either whole or absent: written beside, synced, then moved into place."""

import errno
import os
import uuid
from contextlib import suppress
from pathlib import Path

from mmkd.data_manifests.errors import StorageError


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a crash at any instant leaves the old file or the new one, synced.

    Raises StorageError, naming the path, when the disk is full or may not be written.
    """
    # Unique also among containers on several machines, whose process ids are often equal.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        hint = (
            "free some space and run again" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "nothing was lost"
        )
        raise StorageError(f"cannot write {path}: {error.strerror or error}; {hint}") from error


def sync_directory(path: Path) -> None:
    """Make a rename within `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
