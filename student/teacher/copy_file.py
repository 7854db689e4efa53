"""A file of arrays that is read in full against its checksums before it is mapped.

    arrays, each at a multiple of 4 KiB | footer (JSON) | trailer: footer's length and SHA-256, format

The footer has the key that the arrays belong to, their names, types, shapes and offsets, and a SHA-256 for every
4 MiB of all that lies before it. Whatever byte is lost or changed, opening says so.
"""

import fcntl
import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from mmkd.cache_tools.cache.fingerprints import canonical_json

Maps = dict[str, np.memmap[Any, np.dtype[Any]]]
"""Name -> read-only map."""

FORMAT = b"mmkd-node-copy-1"
BLOCK_BYTES = 4 << 20
"""Bytes under one checksum: hashed on writing, and read and checked in one piece."""
ALIGNMENT = 4096
TRAILER = struct.Struct("<Q32s16s")


class DamagedCopyError(Exception):
    """The file is not what its writer wrote; the text says how it was noticed."""


@dataclass(frozen=True)
class ArrayPlan:
    """An array to be written, in pieces, so that it never lies in memory whole."""

    name: str
    """Its name in the file."""
    shape: tuple[int, ...]
    """Shape; no side is 0."""
    dtype: str
    """NumPy type name, of fixed size."""
    blocks: Iterable[npt.NDArray[Any]]
    """Consecutive blocks of rows, which together have the shape."""


def write_arrays(file: BinaryIO, key: Mapping[str, Any], plans: Iterable[ArrayPlan]) -> None:
    """Write arrays, footer and trailer to an unbuffered file at position 0.

    Raises OSError where the system refuses, ValueError for blocks that are not what their plan says.
    """
    hashed = _HashedFile(file)
    arrays = {plan.name: _write_array(hashed, plan) for plan in plans}
    hashed.close_block()
    footer = {"key": key, "arrays": arrays, "bytes": hashed.bytes, "sha256": hashed.sha256}
    data = canonical_json(footer).encode()
    _write_all(file, data + TRAILER.pack(len(data), hashlib.sha256(data).digest(), FORMAT))


def map_arrays(file: BinaryIO, key: Mapping[str, Any]) -> Maps:
    """Return the arrays of a whole, unchanged file of this key; raise DamagedCopyError for any other.

    It is read here once, not through the map, where a failing disk would be a SIGBUS.
    """
    footer = _read_footer(file)
    if canonical_json(footer["key"]) != canonical_json(key):
        raise DamagedCopyError("its contents are of another key")
    _check_blocks(file, footer)
    return {
        name: np.memmap(file, dtype=item["dtype"], mode="r", offset=item["offset"], shape=tuple(item["shape"]))
        for name, item in footer["arrays"].items()
    }


def _read_footer(file: BinaryIO) -> dict[str, Any]:
    end = os.fstat(file.fileno()).st_size - TRAILER.size
    if end < 0:
        raise DamagedCopyError("truncated")
    file.seek(end)
    length, sha256, name = TRAILER.unpack(file.read(TRAILER.size))
    if name != FORMAT or length > end:  # checked before the length is believed: it says how much is read
        raise DamagedCopyError("truncated, or its last bytes differ")
    file.seek(end - length)
    data = file.read(length)
    if hashlib.sha256(data).digest() != sha256:
        raise DamagedCopyError("the hash of its footer differs")
    footer: dict[str, Any] = json.loads(data)
    if end - length != footer["bytes"]:
        raise DamagedCopyError("its length differs")
    return footer


def _check_blocks(file: BinaryIO, footer: Mapping[str, Any]) -> None:
    file.seek(0)
    left = footer["bytes"]
    for number, sha256 in enumerate(footer["sha256"]):
        data = file.read(min(BLOCK_BYTES, left))
        if hashlib.sha256(data).hexdigest() != sha256:
            raise DamagedCopyError(f"the hash of its block {number} differs")
        left -= len(data)
    if left:
        raise DamagedCopyError("hashes are missing")


def _write_array(hashed: "_HashedFile", plan: ArrayPlan) -> dict[str, Any]:
    """Write an array's blocks; return its entry of the footer."""
    dtype, rows = np.dtype(plan.dtype), 0
    if dtype.hasobject or 0 in plan.shape or not plan.shape:
        raise ValueError(f"{plan.name}: {dtype} {plan.shape} cannot be mapped")
    hashed.write(bytes(-hashed.bytes % ALIGNMENT))  # each array begins at a page of its own
    offset = hashed.bytes
    for block in plan.blocks:
        if block.dtype != dtype or block.shape[1:] != plan.shape[1:]:
            raise ValueError(f"{plan.name}: a block of {block.dtype} {block.shape} in {dtype} {plan.shape}")
        rows += len(block)
        hashed.write(np.ascontiguousarray(block).data.cast("B") if len(block) else b"")
    if rows != plan.shape[0]:
        raise ValueError(f"{plan.name}: {rows} rows were made in place of {plan.shape[0]}")
    if hashed.bytes - offset != dtype.itemsize * math.prod(plan.shape):
        raise AssertionError(f"{plan.name}: rows and bytes disagree")
    return {"dtype": dtype.str, "shape": list(plan.shape), "offset": offset}


class _HashedFile:
    """A file being written, with a SHA-256 for each of its blocks."""

    def __init__(self, file: BinaryIO) -> None:
        """Nothing is written yet."""
        self._file, self._hash = file, hashlib.sha256()
        self.bytes = 0
        self.sha256: list[str] = []

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        rest = memoryview(data)
        while len(rest):
            room = BLOCK_BYTES - self.bytes % BLOCK_BYTES  # checksums follow the file, not the arrays or the writes
            part, rest = rest[:room], rest[room:]
            _write_all(self._file, part)
            self._hash.update(part)
            self.bytes += len(part)
            if len(part) == room:
                self.close_block()

    def close_block(self) -> None:
        """End the block in hand, if there is anything in it."""
        if len(self.sha256) * BLOCK_BYTES < self.bytes:
            self.sha256.append(self._hash.hexdigest())
            self._hash = hashlib.sha256()


def _write_all(file: BinaryIO, data: bytes | memoryview) -> None:
    # An unbuffered file takes what fits; a buffered one would fail once more when it is closed on a full disk.
    rest = memoryview(data)
    while len(rest):
        rest = rest[file.write(rest) :]


def share_lock(file: BinaryIO) -> bool:
    """Keep `file` from being deleted while it, or a map of it, lives; return False when it was deleted already."""
    fcntl.flock(file, fcntl.LOCK_SH)  # a map holds the open file, and with it the lock
    return os.fstat(file.fileno()).st_nlink > 0
