"""Walking and removing the folders of a cache that lies in one."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from mmkd.data_manifests.errors import StorageError


def walk(top: Path, *, follow: bool = False, above: tuple[tuple[int, int], ...] = ()) -> Iterator[Path]:
    """Yield every file below a folder (or the file `top`); one that vanishes meanwhile is skipped.

    `follow` enters linked folders, but none that lies around itself: `above` are the devices and inodes of the
    folders on the way. Raises StorageError for a folder that cannot be read: what it holds must not pass for
    missing.
    """
    if top.is_symlink() and not follow:
        return
    try:
        with os.scandir(top) as entries:
            status = top.stat()
            here = (status.st_dev, status.st_ino)
            if here in above:
                return
            for entry in entries:
                if entry.is_dir(follow_symlinks=follow):
                    yield from walk(Path(entry.path), follow=follow, above=(*above, here))
                elif follow or not entry.is_symlink():
                    yield Path(entry.path)
    except FileNotFoundError:
        return
    except NotADirectoryError:
        if not above:
            yield top
    except OSError as error:
        raise unreadable(top, error) from error


def make_folder(path: Path) -> None:
    """Make a folder and those around it; NotADirectoryError for a file, or a link to nowhere, in its place."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:  # callers take this one for the name of an object that is there already
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from error


def remove_tree(path: Path) -> bool:
    """Remove a folder, or whatever has that name, as far as that is possible; return whether nothing is left."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)
    return not os.path.lexists(path)


def unreadable(path: Path, error: OSError) -> StorageError:
    """Return the error of a path that is there and cannot be read."""
    return StorageError(f"cannot read {path}: {error.strerror or error}; fix that and run again")


def in_the_way(path: Path) -> StorageError:
    """Return the error of something that is not a file where a file of the cache belongs."""
    return StorageError(f"{path} is in the way: a file of the cache has that name; remove it and run again")
