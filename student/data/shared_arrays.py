"""Arrays in one file in memory, which other processes map and nobody copies; it is gone when the last of them is.

Such a file (memfd_create) does not count against /dev/shm, which containers limit to 64 MB, and has no name that a
killed process could leave behind. Where the system has none it is a temporary file without a name.
"""

import mmap
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np
import numpy.typing as npt

AnyArray = npt.NDArray[Any]
Place = tuple[str, tuple[int, ...], int]
"""An array's dtype, shape and first byte."""
ALIGNMENT = 64
"""Each array begins at a multiple of so many bytes: a line of the processor's cache."""


class SharedArrays(Mapping[str, AnyArray]):
    """Arrays by name. What is pickled for another process is a handle of the file: both see each other's writes."""

    def __init__(self, shapes: Mapping[str, tuple[Any, tuple[int, ...]]]) -> None:
        """Make arrays of zeros, of these dtypes and shapes by name; OSError when there is no memory to lend."""
        self._places: dict[str, Place] = {}
        size = 0
        for name, (dtype, shape) in shapes.items():
            self._places[name] = np.dtype(dtype).str, shape, size
            count = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
            size += -(-count // ALIGNMENT) * ALIGNMENT
        self._file = _file_in_memory(max(size, 1))
        self._map = mmap.mmap(self._file, max(size, 1))

    @classmethod
    def of(cls, arrays: Mapping[str, AnyArray]) -> "SharedArrays":
        """Return a copy of arrays."""
        found = cls({name: (value.dtype, value.shape) for name, value in arrays.items()})
        for name, value in arrays.items():
            found[name][...] = value
        return found

    def __getitem__(self, name: str) -> AnyArray:
        """Return an array that can be written, which keeps the file."""
        dtype, shape, start = self._places[name]
        count = int(np.prod(shape, dtype=np.int64))
        return np.frombuffer(self._map, dtype, count, start).reshape(shape)

    def __iter__(self) -> Iterator[str]:
        """Yield the names."""
        return iter(self._places)

    def __len__(self) -> int:
        """Return the number of arrays."""
        return len(self._places)

    def __getstate__(self) -> tuple[Any, dict[str, Place]]:
        """Hand the file over; once the handle is closed there is nothing to hand over."""
        return DupFd(self._file), self._places

    def __setstate__(self, state: tuple[Any, dict[str, Place]]) -> None:
        """Map the file."""
        handle, self._places = state
        self._file = handle.detach()
        self._map = mmap.mmap(self._file, 0)
        self.close()

    def close(self) -> None:
        """Close the handle: the arrays stay, and can be sent to nobody any more."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __del__(self) -> None:
        """Close the handle."""
        with suppress(AttributeError):  # never opened
            self.close()


def _file_in_memory(size: int) -> int:
    """Return the descriptor of an unnamed file of zeros."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("mmkd-arrays")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    try:
        os.truncate(descriptor, size)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


class SharedTexts(Sequence[str]):
    """Texts in two arrays: a list of a million would be copied into every process that looks at it."""

    def __init__(self, arrays: Mapping[str, AnyArray], name: str) -> None:
        """Read what `text_arrays` made, from `arrays`."""
        self._bytes, self._ends = arrays[f"{name}.bytes"], arrays[f"{name}.ends"]

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self._ends) - 1

    def __getitem__(self, index: Any) -> Any:
        """Return a text."""
        return self._bytes[self._ends[index] : self._ends[index + 1]].tobytes().decode()


def text_arrays(name: str, texts: Sequence[str]) -> dict[str, AnyArray]:
    """Return texts as arrays: their bytes one after the other, and (n + 1,) where each begins and the last ends."""
    encoded = [text.encode() for text in texts]
    ends = np.zeros(len(encoded) + 1, np.int64)
    np.cumsum([len(data) for data in encoded], out=ends[1:])
    return {f"{name}.bytes": np.frombuffer(b"".join(encoded), np.uint8), f"{name}.ends": ends}
