"""A cache in a folder, local or of a network: objects are files, whole or absent at any instant."""

import errno
import os
import stat
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path, PurePosixPath

from mmkd.cache_tools.layout import CLAIMS, COMMITS, GROUP, TASKS, TEMPORARY, WRITER, is_own_name
from mmkd.cache_tools.storage.folders import in_the_way, make_folder, remove_tree, unreadable, walk
from mmkd.cache_tools.storage.store import MissingObjectError, Stored, TakenOverError
from mmkd.data_manifests.atomic import storage_errors, sync_directory, write_synced
from mmkd.data_manifests.errors import InputError, VerificationError
from mmkd.data_manifests.regular_file import read_regular

ATTEMPTS = 5
"""How often a write is begun again when a folder that got empty is tidied away meanwhile."""


class LocalStore:
    """A folder.

    A writer's temporary files lie in a folder of its own, `.tmp/<writer>`, which is made once. Whatever it changes
    it renames or links out of that folder, or (to delete) into it: whoever moves the folder away stops it at once.
    """

    def __init__(self, root: Path) -> None:
        """Use the folder `root`."""
        self.root = root
        self._own: Path | None = None
        """The writer's folder."""

    def locate(self, key: str = "") -> str:
        """Return the object's path."""
        return str(self.root / key) if key else str(self.root)

    def read(self, key: str) -> bytes:
        """Return a file's bytes; raise VerificationError for a device or pipe in its place."""
        path = self._path(key)
        try:
            return read_regular(path)
        except (FileNotFoundError, NotADirectoryError):
            raise MissingObjectError(key) from None
        except OSError as error:
            if error.errno == errno.EINVAL:
                raise VerificationError(f"{path} is damaged: {error.strerror}") from error
            raise unreadable(path, error) from error

    def write(self, key: str, data: bytes) -> None:
        """Write beside, sync, rename, sync the folder."""
        self._place(key, data, lambda temporary, path: temporary.replace(path))

    def create(self, key: str, data: bytes) -> bool:
        """Write beside, sync, and link: the name appears with its whole content, or not at all.

        Raises StorageError when something that is not a file has the name.
        """
        try:
            self._place(key, data, link_or_move)
        except FileExistsError:
            path = self._path(key)
            if os.path.lexists(path) and not self.exists(key):
                raise in_the_way(path) from None
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
        """Rename a file into this writer's folder, which a writer that was swept cannot, and unlink it there."""
        path, own = self._path(key), self._folder()
        if path.is_dir():
            raise in_the_way(path)
        doomed = own / uuid.uuid4().hex[:16]
        with storage_errors(path, verb="delete"):
            try:
                path.rename(doomed)
            except OSError as error:
                self._refuse(path, own, error)
                if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
                    raise
            doomed.unlink(missing_ok=True)

    def list(self, prefix: str = "") -> dict[str, Stored]:
        """Return key -> size and time of every file below `prefix`, but for temporary ones.

        Parts of the cache that were moved elsewhere and linked back count; other people's links are not followed.
        """
        tops = [prefix] if prefix else sorted(self.top() - {TEMPORARY})
        found = {}
        for top in tops:
            for path in walk(self.root / top, follow=is_own_name(top.partition("/")[0])):
                try:
                    status = path.stat()
                except (FileNotFoundError, NotADirectoryError):  # gone, or the cache would lie below a file
                    continue
                except OSError as error:
                    raise unreadable(path, error) from error
                found[path.relative_to(self.root).as_posix()] = Stored(status.st_size, status.st_mtime)
        return dict(sorted(found.items()))

    def top(self) -> set[str]:
        """Return the names in the folder; raise InputError when it is none."""
        try:
            return {path.name for path in self.root.iterdir()}
        except FileNotFoundError:
            return set()
        except NotADirectoryError:
            raise InputError(f"{self.root} is a file, not a folder; name another place") from None
        except OSError as error:
            raise unreadable(self.root, error) from error

    def begin(self, writer: str) -> None:
        """Make the writer's folder."""
        own = self.root / TEMPORARY / writer
        with storage_errors(own):
            for attempt in range(ATTEMPTS):
                try:
                    make_folder(own.parent)
                    own.mkdir(exist_ok=True)
                    break
                except FileNotFoundError:  # `.tmp` was tidied away between the two
                    if attempt == ATTEMPTS - 1:
                        raise
        self._own = own

    def end(self) -> None:
        """Remove the writer's folder."""
        if self._own is not None:
            remove_tree(self._own)
            self._own = None

    def writers(self) -> dict[str, float]:
        """Return the names of the writers' folders, and when each was last changed."""
        found = {}
        with suppress(FileNotFoundError, NotADirectoryError), os.scandir(self.root / TEMPORARY) as entries:
            for entry in entries:
                if WRITER.fullmatch(entry.name):
                    with suppress(FileNotFoundError):
                        found[entry.name] = entry.stat(follow_symlinks=False).st_mtime
        return found

    def sweep(self, writer: str) -> None:
        """Move the folder of `writer` into this writer's own, in one step, and remove it there.

        The second matters to network file systems, where a client that knows the folder finds it wherever it is.
        """
        folder, own = self.root / TEMPORARY / writer, self._folder()
        if not WRITER.fullmatch(writer) or folder == own:
            return
        doomed = own / uuid.uuid4().hex[:16]
        with storage_errors(folder, verb="remove"):
            try:
                folder.rename(doomed)
            except FileNotFoundError as error:
                self._refuse(folder, own, error)
                return
        for _ in range(ATTEMPTS):  # who wakes up now may add a file until the folder is gone
            if remove_tree(doomed):
                break

    def tidy(self) -> None:
        """Remove empty folders of the cache's own, deepest first; those of writers are theirs."""
        for top in (GROUP, COMMITS, CLAIMS, TASKS):
            for folder, _, _ in os.walk(self.root / top, topdown=False):
                with suppress(OSError):  # not empty
                    Path(folder).rmdir()
        with suppress(OSError):
            (self.root / TEMPORARY).rmdir()

    def _path(self, key: str) -> Path:
        parts = PurePosixPath(key).parts
        if not parts or ".." in parts or parts[0] == "/" or "\0" in key:
            raise VerificationError(f"{self.root}: an object named {key!r} lies outside of it")
        return self.root / key

    def _folder(self) -> Path:
        if self._own is None:
            self.begin(uuid.uuid4().hex[:16])
        assert self._own is not None
        return self._own

    def _refuse(self, path: Path, own: Path, error: OSError) -> None:
        """Raise what an error of a rename means, if it means more than it says."""
        # NFS says ESTALE of a folder that another machine moved away or removed.
        if error.errno in (errno.ENOENT, errno.ESTALE) and not own.is_dir():
            raise TakenOverError(self.locate()) from error
        if error.errno == errno.EXDEV:
            raise InputError(
                f"{path} lies on another disk than {self.root / TEMPORARY}, and nothing can be moved there in one "
                "step; link the cache's whole folder instead of its parts"
            ) from error

    def _place(self, key: str, data: bytes, move: Callable[[Path, Path], object]) -> None:
        path, own = self._path(key), self._folder()
        temporary = own / uuid.uuid4().hex[:16]
        with storage_errors(path):
            try:
                for attempt in range(ATTEMPTS):
                    try:
                        place_once(temporary, path, data=data, move=move)
                        return
                    except OSError as error:
                        self._refuse(path, own, error)
                        if not isinstance(error, FileNotFoundError) or attempt == ATTEMPTS - 1:
                            raise
            finally:
                with suppress(OSError):
                    temporary.unlink(missing_ok=True)


def place_once(temporary: Path, path: Path, *, data: bytes, move: Callable[[Path, Path], object]) -> None:
    """Write a temporary file and move it to `path`.

    Raises FileNotFoundError when a folder is tidied away meanwhile, or the writer is swept.
    """
    make_folder(path.parent)
    write_synced(temporary, data)
    move(temporary, path)
    sync_directory(path.parent)  # fsync of a file does not make its name durable


def link_or_move(source: Path, target: Path) -> None:
    """Give `source` the second name `target`; raise FileExistsError when it is taken.

    Where the file system has no links the name is made first, exclusively, and then the file moved there: still one
    winner, but a reader may see an empty file for an instant.
    """
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        target.touch(exist_ok=False)
        source.replace(target)
