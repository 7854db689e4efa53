"""HDF5 files written so that a full disk is an error and not the end of the process.

When the system refuses a write below h5py's own driver, HDF5 keeps what it could not write, tries again when the
process ends, and takes it down with a segmentation fault. Here HDF5 writes through a file that never fails in its
eyes: it keeps the first refusal, writes nothing more, and who writes asks for it. The bytes are those of HDF5's own
driver. It gives up a little time for each write, which is small beside encoding what is written.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import h5py


class PatientFile:
    """A file as h5py wants one, which keeps what the system refuses in place of raising it."""

    def __init__(self, path: Path, mode: str) -> None:
        """Open the file; raise OSError as `open` does."""
        # Unbuffered: a buffer would meet the full disk in a later call, or when it is closed.
        self._file: Any = path.open(mode, buffering=0)
        self.refusal: OSError | None = None

    def read(self, size: int = -1) -> bytes:
        """Read as a file does; h5py looks for this name to know a file, and calls `readinto`."""
        data: bytes = self._file.read(size)
        return data

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer; beyond the end with zeros, which are there when a refused write was to come before."""
        view = memoryview(buffer).cast("B")
        filled = 0
        with self._kept():
            while filled < len(view) and (count := self._file.readinto(view[filled:])):
                filled += count
        view[filled:] = bytes(len(view) - filled)
        return len(view)

    def write(self, data: Any) -> int:
        """Write all of it, or keep why not."""
        left = memoryview(data).cast("B")
        size = len(left)
        with self._kept():
            while left and self.refusal is None:
                left = left[self._file.write(left) :]  # a raw file may take less than all
        return size

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move to a place."""
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        """Return the place."""
        return int(self._file.tell())

    def truncate(self, size: int) -> None:
        """Cut or extend the file, or keep why not."""
        with self._kept():
            if self.refusal is None:
                self._file.truncate(size)

    def flush(self) -> None:
        """Do nothing: nothing is buffered."""

    def close(self) -> None:
        """Close the file."""
        with self._kept():
            self._file.close()

    @contextmanager
    def _kept(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.refusal = self.refusal or error


class Hdf5Output:
    """An HDF5 file that is being written."""

    def __init__(self, path: Path, mode: str = "w", **options: Any) -> None:
        """Open `path` to write a new file (`w`) or to change one (`r+`); `options` are those of `h5py.File`."""
        self._raw = PatientFile(path, {"w": "wb+", "r+": "rb+"}[mode])
        try:
            self.file = h5py.File(self._raw, mode, **options)
        except BaseException:
            self._raw.close()
            raise

    def check(self) -> None:
        """Raise the OSError that the system met a write with, if it did."""
        if self._raw.refusal is not None:
            raise self._raw.refusal

    def close(self) -> None:
        """Write what is left and close; raise the OSError when any of it was refused."""
        try:
            with self.refusals():
                self.file.close()
        finally:
            self._raw.close()
        self.check()

    def abandon(self) -> None:
        """Close without a word: the file is not wanted any more."""
        with suppress(Exception):  # HDF5's own, about what it reads of a file that was not written
            self.file.close()
        self._raw.close()

    @contextmanager
    def refusals(self) -> Iterator[None]:
        """Raise the system's refusal, if there was one, in place of what HDF5 says of its consequences."""
        try:
            yield
        except Exception:
            self.check()
            raise
        self.check()


@contextmanager
def writing_hdf5(path: Path, mode: str = "w", **options: Any) -> Iterator[Hdf5Output]:
    """Yield an HDF5 file to write; raise OSError when the system refused any of it."""
    output = Hdf5Output(path, mode, **options)
    try:
        with output.refusals():
            yield output
        output.close()
    finally:
        output.abandon()
