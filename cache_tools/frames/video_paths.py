"""From the name of a video in a manifest to its file: within the root, whichever links lead out of it, and there.

What is missing is told from what the machine cannot show just now: a folder that lost its disk is empty or gone,
and its videos are not "not found".
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import Literal

from mmkd.data_manifests.errors import StorageError, VideoError
from mmkd.data_manifests.system_errors import ABSENT

Links = Literal["own", "allow", "refuse"]
"""Which links may lead out of the root: those made by this user, by root or by the file's owner; all; or none."""
READ_BYTES = 2**20
NOT_FOUND = "video not found"
ADVICE = "nothing was lost; fix that and run the same command again"


def video_path(root: Path, video: str, links: Links, *, folders: bool = False) -> Path:
    """Return the resolved path of a video below the root.

    Raises VideoError when it is outside the root or no regular file is there (nor, where asked for, a folder),
    StorageError when the system cannot tell.
    """
    if "\0" in video:
        raise VideoError("the video's name holds a zero byte")
    real_root = os.path.realpath(root)
    named = os.path.normpath(os.path.join(real_root, video))  # noqa: PTH118 - pathlib resolves 5 times slower
    path = os.path.realpath(named)
    if not _is_below(real_root, named):
        raise VideoError("the video's path leads out of the video root")
    try:
        status = os.stat(path)  # noqa: PTH116 - as above
        if not _is_below(real_root, path) and not _may_follow(real_root, named, links, status.st_uid):
            raise VideoError(
                "a link leads out of the video root, to a file of somebody else; data.links=allow follows it"
                if links == "own"
                else "a link leads out of the video root; data.links=allow follows it"
            )
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno not in ABSENT:
            raise StorageError(f"cannot look at {path}: {error.strerror}; {ADVICE}") from error
        raise VideoError(f"{NOT_FOUND}: {video}") from error
    if not S_ISREG(status.st_mode) and not (folders and S_ISDIR(status.st_mode)):
        raise VideoError(f"{NOT_FOUND}: {video}")
    return Path(path)


def _is_below(root: str, path: str) -> bool:
    return os.path.commonpath((root, path)) == root


def _may_follow(root: str, path: str, links: Links, owner: int) -> bool:
    """Return whether the links between the root and the path may be followed to a file of that owner.

    With "own", as web servers do it: who can write into the folder cannot show us files that only we can read.
    """
    if links != "own":
        return links == "allow"
    trusted = {os.geteuid(), 0, owner}
    while path != root:
        if os.path.islink(path) and os.lstat(path).st_uid not in trusted:  # noqa: PTH114
            return False
        path = os.path.dirname(path)  # noqa: PTH120
    return True


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Tell the machine's faults from the video's while a video is read.

    Any OSError of the block is the machine's. A VideoError is believed only when the file's bytes can be read,
    since decoders take a read that failed for the end of the file.
    """
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}; {ADVICE}") from error
    except VideoError:
        require_readable(path)
        raise


def require_readable(path: Path) -> None:
    """Read a file to its end; raise StorageError when that fails."""
    buffer = bytearray(READ_BYTES)
    try:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}; {ADVICE}") from error


def is_lost(folder: Path) -> bool:
    """Return whether a folder is empty or gone, as one is whose disk is not mounted; StorageError if unreadable."""
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is None
    except OSError as error:
        if error.errno in ABSENT:
            return True
        raise StorageError(f"cannot read {folder}: {error.strerror}; {ADVICE}") from error
