"""Where a cache lies: objects by key, each of them whole or absent.

The cache needs few promises of its store, and these are all of them: a write replaces an object whole and is
durable when it returns, `create` lets exactly one of several writers win, and modification times of one store come
from one clock. A local (or network) folder keeps them through temporary files, links, renames and fsync; an object
store (mmkd.cache_tools.object_store) by its nature.
"""

import errno
import os
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mmkd.data_manifests.atomic import sync_directory
from mmkd.data_manifests.errors import StorageError, VerificationError

TEMPORARY = ".tmp"
"""Folder of a local store for files that are being written; below it, one folder for each writer."""
ATTEMPTS = 5
"""How often a write is begun anew when its folder or temporary file is swept away meanwhile."""


class MissingObjectError(KeyError):
    """There is no object of that key."""


@dataclass(frozen=True)
class Stored:
    """What a listing says of an object."""

    size_bytes: int
    """Its size."""
    modified_seconds: float
    """When it was written, by the store's own clock."""


class Store(Protocol):
    """Objects by key; keys are relative paths with `/`."""

    def locate(self, key: str = "") -> str:
        """Return the object's path or URL, for messages."""

    def read(self, key: str) -> bytes:
        """Return an object; raise MissingObjectError, or StorageError when it cannot be read."""

    def write(self, key: str, data: bytes) -> None:
        """Put an object in place whole and durable; raise StorageError when that fails."""

    def create(self, key: str, data: bytes) -> bool:
        """Put an object where none is; return False when there is one. Of several callers one gets True."""

    def exists(self, key: str) -> bool:
        """Return whether there is an object."""

    def delete(self, key: str) -> None:
        """Remove an object, if it is there."""

    def list(self, prefix: str = "") -> dict[str, Stored]:
        """Return every object below the folder `prefix` (all of them without one), in the order of their keys."""

    def writers(self) -> set[str]:
        """Return the names of those that have something half written."""

    def sweep(self, writer: str) -> None:
        """Remove what a writer that is gone left half written."""

    def tidy(self) -> None:
        """Remove empty folders, where a store has folders."""


class LocalStore:
    """A folder."""

    def __init__(self, root: Path, *, writer: str = "") -> None:
        """Use the folder `root`; `writer` names this process among those that write there."""
        self.root = root
        self._writer = writer or uuid.uuid4().hex[:16]

    def locate(self, key: str = "") -> str:
        """Return the object's path."""
        return str(self.root / key) if key else str(self.root)

    def read(self, key: str) -> bytes:
        """Return a file's bytes."""
        path = self._path(key)
        try:
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise MissingObjectError(key) from None
        except OSError as error:
            raise unreadable(path, error) from error

    def write(self, key: str, data: bytes) -> None:
        """Write beside, sync, rename, sync the folder."""
        self._place(key, data, lambda temporary, path: temporary.replace(path))

    def create(self, key: str, data: bytes) -> bool:
        """Write beside, sync, and link: the name appears with its whole content, or not at all."""
        try:
            self._place(key, data, link_or_copy)
        except FileExistsError:
            return False
        return True

    def exists(self, key: str) -> bool:
        """Return whether there is a file."""
        path = self._path(key)
        try:
            return stat.S_ISREG(path.stat().st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise unreadable(path, error) from error

    def delete(self, key: str) -> None:
        """Unlink a file."""
        path = self._path(key)
        with storage_errors(path):
            path.unlink(missing_ok=True)

    def list(self, prefix: str = "") -> dict[str, Stored]:
        """Return key -> size and time of every file below `prefix`, but for temporary ones."""
        found = {}
        for path in walk(self.root / prefix):
            key = path.relative_to(self.root).as_posix()
            if not key.startswith(f"{TEMPORARY}/"):
                try:
                    status = path.stat()
                except FileNotFoundError:
                    continue
                except OSError as error:
                    raise unreadable(path, error) from error
                found[key] = Stored(status.st_size, status.st_mtime)
        return dict(sorted(found.items()))

    def writers(self) -> set[str]:
        """Return the names of the folders that hold temporary files."""
        folder = self.root / TEMPORARY
        return {path.relative_to(folder).parts[0] for path in walk(folder)}

    def sweep(self, writer: str) -> None:
        """Remove the temporary files of `writer`."""
        folder = self.root / TEMPORARY / writer
        with storage_errors(folder):
            for path in walk(folder):
                path.unlink(missing_ok=True)
        with suppress(OSError):
            folder.rmdir()

    def tidy(self) -> None:
        """Remove empty folders below the root, deepest first."""
        for folder, _, _ in os.walk(self.root, topdown=False):
            if Path(folder) != self.root:
                with suppress(OSError):  # not empty
                    Path(folder).rmdir()

    def _path(self, key: str) -> Path:
        path = self.root / key
        if ".." in path.parts or self.root not in path.parents:
            raise VerificationError(f"{self.root}: an object named {key!r} lies outside of it")
        return path

    def _place(self, key: str, data: bytes, move: Callable[[Path, Path], object]) -> None:
        path = self._path(key)
        temporary = self.root / TEMPORARY / self._writer / uuid.uuid4().hex[:16]
        with storage_errors(path):
            try:
                for attempt in range(ATTEMPTS):
                    with suppress(*[FileNotFoundError] * (attempt < ATTEMPTS - 1)):
                        place_once(temporary, path, data=data, move=move)
                        break
            finally:
                with suppress(OSError):
                    temporary.unlink(missing_ok=True)


def place_once(temporary: Path, path: Path, *, data: bytes, move: Callable[[Path, Path], object]) -> None:
    """Write a temporary file and move it to `path`.

    Raises FileNotFoundError when a task that takes this one for dead sweeps the file or tidies a folder meanwhile.
    """
    for folder in (temporary.parent, path.parent):
        folder.mkdir(parents=True, exist_ok=True)
    write_synced(temporary, data)
    move(temporary, path)
    sync_directory(path.parent)


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of the block, but for an occupied name, into a StorageError that names the path."""
    try:
        yield
    except FileExistsError:
        raise
    except OSError as error:
        hint = "nothing was lost; mend that and run again"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            hint = "free some space and run again"
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            hint = "nothing was lost; allow writing there and run again, or name another place"
        raise StorageError(f"cannot write {path}: {error.strerror or error}; {hint}") from error


def unreadable(path: Path, error: OSError) -> StorageError:
    """Return the error of a path that is there and cannot be read."""
    return StorageError(f"cannot read {path}: {error.strerror or error}; mend that and run again")


def link_or_copy(source: Path, target: Path) -> None:
    """Give `source` the second name `target`; raise FileExistsError when it is taken.

    Where the file system has no links the content is written after an exclusive creation: still one winner, but a
    reader may see an empty file for an instant.
    """
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        target.touch(exist_ok=False)
        write_synced(target, source.read_bytes())


def walk(top: Path) -> Iterator[Path]:
    """Yield every file below a folder; a folder that vanishes meanwhile is skipped.

    Raises StorageError for a folder that cannot be read: what it holds must not pass for missing.
    """

    def refuse(error: OSError) -> None:
        if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise unreadable(Path(error.filename), error) from error

    for folder, _, names in os.walk(top, onerror=refuse):
        yield from (Path(folder) / name for name in names)


def open_store(location: Path | str, *, writer: str = "") -> Store:
    """Return the store of a cache: a folder, or what an fsspec URL such as `s3://bucket/cache` names."""
    if isinstance(location, str) and "://" in location and not location.startswith("file://"):
        from mmkd.cache_tools.object_store import ObjectStore

        return ObjectStore(location)
    text = str(location).removeprefix("file://")
    return LocalStore(Path(text), writer=writer)
