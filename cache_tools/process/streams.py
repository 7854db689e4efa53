"""Standard streams that are closed or full: a message that nobody can read never ends the work, a lost result does.

A closed descriptor is dangerous, too: the next file that is opened gets its number, and what a library prints goes
into it.
"""

import errno
import io
import os
import sys
from typing import Any, TextIO

STDOUT = "standard output"


class _Messages(io.FileIO):
    """Where messages go: to a full disk, or a terminal that is gone, they may get lost."""

    def write(self, data: Any) -> int:
        """Write; where that fails, behave as if it had not."""
        try:
            return super().write(data) or 0
        except OSError:
            return memoryview(data).nbytes


class _Results(io.FileIO):
    """Where results go: a failure is an OSError that names it, unless the reader has seen enough (`| head`)."""

    def write(self, data: Any) -> int:
        """Write all, or raise."""
        try:
            return super().write(data) or 0
        except OSError as error:
            if error.errno == errno.EPIPE:
                return memoryview(data).nbytes
            error.filename = STDOUT
            raise


def guard_streams() -> None:
    """Open closed standard descriptors, and let streams fail as this module says.

    Streams that were redirected inside the process are left alone.
    """
    for number in range(3):
        if _is_closed(number):
            # A write to a descriptor that is open for reading fails, as it does to one that is closed.
            _open_as(number, os.O_RDONLY if number == 1 else os.O_RDWR)
    if sys.stdout is sys.__stdout__:
        sys.stdout = _text(_Results(1, "w", closefd=False), sys.__stdout__)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _text(_Messages(2, "w", closefd=False), sys.__stderr__)


def print_messages_only() -> None:
    """Take what a worker process prints as messages, which may get lost."""
    sys.stdout = sys.stderr = _text(_Messages(2, "w", closefd=False), sys.__stderr__)


def drop_output() -> None:
    """Forget what is still to be written to stdout, so that the end of the process does not try it again."""
    if isinstance(getattr(sys.stdout, "buffer", None), io.BufferedWriter):
        _open_as(1, os.O_WRONLY)


def _text(file: io.FileIO, old: TextIO | None) -> TextIO:
    encoding = "utf-8" if old is None else old.encoding
    # Names of files need not be UTF-8.
    return io.TextIOWrapper(io.BufferedWriter(file), encoding, errors="backslashreplace", line_buffering=True)


def _is_closed(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return True
    return False


def _open_as(number: int, flags: int) -> None:
    opened = os.open(os.devnull, flags)
    if opened != number:
        os.dup2(opened, number)
        os.close(opened)
    os.set_inheritable(number, True)  # worker processes have it, too
