"""Files that are opened for reading only when they are files: never a pipe, a device or a socket in their place.

Opening a named pipe waits for a writer that may never come, and reading a device may never end. What is refused is
an OSError like every other fault of a file, so that whoever reads adds the path and what to do.
"""

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path

AT_MOST_BYTES = 4 << 30
"""Files to be read whole are never as large as this (4 GiB), unless the caller says otherwise."""
GROWTH_BYTES = 1 << 20
"""Read at once of a file that grows while it is read."""
KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading in binary; links are followed.

    Raises OSError: as `open` does, or with EINVAL for what is there and is not a regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # non-blocking: a pipe opens at once
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            kind = KINDS.get(stat.S_IFMT(mode), "something else")
            raise OSError(errno.EINVAL, f"it is {kind}, not a regular file", str(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: Path, *, at_most_bytes: int = AT_MOST_BYTES) -> bytes:
    """Return a regular file's bytes; raise OSError as `open_regular`, or with EINVAL for one that is larger."""
    with open_regular(path) as file:
        size_bytes = os.fstat(file.fileno()).st_size
        if size_bytes <= at_most_bytes:
            data = file.read(size_bytes + 1)  # `read` takes the memory that it is told at once
            while size_bytes < len(data) <= at_most_bytes and (more := file.read(GROWTH_BYTES)):
                data += more
            if len(data) <= at_most_bytes:
                return data
        raise OSError(
            errno.EINVAL, f"it is larger than the {at_most_bytes} bytes that such a file may have", str(path)
        )
