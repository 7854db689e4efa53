"""The flow scratch store: every native pair of a clip, computed once for all epochs and for the build.

One file per clip, named by content (flow recipe, decoder rules, video identity, frame range), so that a changed
video or recipe never meets old fields and a moved data set still does. It is a cache of work, not a result:
delete it at will. Raw fields are large (a 45-frame clip at 427 x 256 is 19 MB in float16, half of that in
uint8); it gives up compression for random access.

    <array>      an .npy file: (pairs, 2, h, w) float16, or uint8 codes
    <checksums>  (pairs,) little-endian uint32: the CRC-32 of each field
    <seal>       SHA-256 of the file's name, the array's header and the checksums

A file without a seal, as written before there was one, is computed again; a field that is not what its checksum
says is never served.
"""

import hashlib
import io
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mmkd.cache_tools.cache.fingerprints import fingerprint
from mmkd.cache_tools.frames.clip_set import ClipVideo
from mmkd.cache_tools.frames.records import Float32Array, IntArray
from mmkd.cache_tools.frames.source import DECODER_RULES
from mmkd.data_manifests.atomic import storage_errors, write_atomically
from mmkd.data_manifests.errors import StorageError
from mmkd.data_manifests.regular_file import open_regular
from mmkd.pipeline.flow.clip_flow import (
    FlowFields,
    all_pairs,
    decode_flow,
    encode_flow,
    flow_identity,
    flow_size,
    positions_of,
)
from mmkd.pipeline.recipe import FlowRecipe
from mmkd.pipeline.tvl1.dispatch import arithmetic

CHECKSUM = np.dtype("<u4")
SEAL_BYTES = hashlib.sha256().digest_size


class DamagedFlowError(StorageError):
    """A stored field was not what its checksum says; its file is gone, so that it is computed again."""


@dataclass(frozen=True)
class StoredClip:
    """What the head and the tail of a clip's file say, its seal checked."""

    shape: tuple[int, ...]
    """(pairs, 2, h, w)."""
    dtype: np.dtype[Any]
    """float16, or uint8 for codes."""
    begin: int
    """Where the first field begins, in bytes."""
    checksums: np.ndarray[Any, Any]
    """(pairs,) CRC-32 of each field."""

    @property
    def field_bytes(self) -> int:
        """Size of a field."""
        return int(np.prod(self.shape[1:])) * self.dtype.itemsize


class FlowStore:
    """All native fields of clips, by content."""

    def __init__(self, directory: Path, recipe: FlowRecipe, device: str = "cpu") -> None:
        """Open the store below `directory` for one flow recipe and device (`cpu`, `cuda:0`).

        Devices and TV-L1's kernels on them round differently, so each has fields of its own: machines that share
        the store need not all have a compiler.
        """
        name = fingerprint(flow_identity(recipe) | {"decoder": DECODER_RULES})[:16]
        self._directory = directory / f"{name}-{arithmetic(device)}"
        self.recipe = recipe

    def path(self, item: ClipVideo) -> Path:
        """Return the file of a clip's fields."""
        name = fingerprint(
            {"video": item.video.identity, "first": item.facts.first_frame, "count": item.facts.frame_count}
        )
        return self._directory / name[:2] / f"{name[:32]}.npy"

    def has(self, item: ClipVideo) -> bool:
        """Return whether the clip's file is there, whole; its fields are checked as they are read."""
        height, width = flow_size(item.facts, self.recipe)
        shape = (len(all_pairs(item.facts, self.recipe.step)), 2, height, width)
        with suppress(OSError), open_regular(self.path(item)) as file:
            stored = read_ends(file, self.path(item).name)
            return stored is not None and stored.shape == shape and stored.dtype == self.recipe.precision
        return False

    def write(self, item: ClipVideo, flow: FlowFields) -> None:
        """Store the fields of every native pair of the clip."""
        if not np.array_equal(flow.starts, all_pairs(item.facts, self.recipe.step)):
            raise ValueError(f"clip {item.clip.clip_id!r}: the store takes every native pair, or none")
        path = self.path(item)
        write_atomically(path, sealed_parts(encode_flow(flow.fields, self.recipe), path.name))

    def read(self, item: ClipVideo, starts: IntArray) -> Float32Array:
        """Return the fields (T, 2, h, w) that begin at `starts`, which may repeat.

        Raises KeyError for a pair that is not the clip's, DamagedFlowError (the file is then gone) for a field that
        is not what was stored, and StorageError when the file cannot be read.
        """
        path = self.path(item)
        positions = positions_of(starts, all_pairs(item.facts, self.recipe.step))
        with storage_errors(path, verb="read"), open_regular(path) as file:
            stored = read_ends(file, path.name)
            fields = None if stored is None else read_fields(file, stored, positions)
        if fields is None:
            with storage_errors(path):
                path.unlink(missing_ok=True)
            raise DamagedFlowError(f"flow scratch {path} was damaged and is deleted; run again to compute it again")
        return decode_flow(fields, self.recipe)


def sealed_parts(fields: np.ndarray[Any, Any], name: str) -> Iterator[bytes]:
    """Yield a file's bytes for fields (P, 2, h, w) as they are stored."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, np.lib.format.header_data_from_array_1_0(fields))
    yield head.getvalue()
    for field in fields:
        yield field.tobytes()
    checksums = np.array([zlib.crc32(field.tobytes()) for field in fields], CHECKSUM).tobytes()
    yield checksums
    yield seal_of(name, head.getvalue(), checksums)


def seal_of(name: str, head: bytes, checksums: bytes) -> bytes:
    """Return the seal; with the file's name in it, so that another clip's file never passes for this one's."""
    return hashlib.sha256(name.encode() + b"\n" + head + checksums).digest()


def read_ends(file: BinaryIO, name: str) -> StoredClip | None:
    """Read a clip's file but for its fields; None when it is torn, damaged or was never sealed."""
    try:
        np.lib.format.read_magic(file)
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
    except (ValueError, EOFError):
        return None
    begin, size = file.tell(), file.seek(0, io.SEEK_END)
    fields = int(np.prod(shape)) * dtype.itemsize
    table_bytes = shape[0] * CHECKSUM.itemsize if shape else 0
    if is_fortran or dtype.hasobject or size != begin + fields + table_bytes + SEAL_BYTES:
        return None
    file.seek(0)
    head = file.read(begin)
    file.seek(begin + fields)
    table, seal = file.read(table_bytes), file.read(SEAL_BYTES)
    if seal != seal_of(name, head, table):
        return None
    return StoredClip(shape, dtype, begin, np.frombuffer(table, CHECKSUM))


def read_fields(file: BinaryIO, stored: StoredClip, positions: IntArray) -> np.ndarray[Any, Any] | None:
    """Read fields at positions, which may repeat; None when one is not what its checksum says.

    Read, not mapped: a page that the disk cannot give is then an error that names the file, not a killed process.
    """
    found: dict[int, np.ndarray[Any, Any]] = {}
    for position in np.unique(positions).tolist():
        file.seek(stored.begin + position * stored.field_bytes)
        data = file.read(stored.field_bytes)
        if zlib.crc32(data) != stored.checksums[position]:
            return None
        found[position] = np.frombuffer(data, stored.dtype).reshape(stored.shape[1:])
    return np.stack([found[position] for position in positions.tolist()])
