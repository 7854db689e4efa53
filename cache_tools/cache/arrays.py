"""Zarr arrays as bytes: encoded in memory and decoded from bytes whose hashes were checked.

zarr-python never touches the cache's folder itself, so that what is published is exactly what was hashed, and
what is decoded is exactly what was verified. Inner chunks carry zstd's checksum; empty chunks are written, since
an absent chunk would have none.
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mmkd.cache_tools.cache.logit_formats import StorageFormat
from mmkd.cache_tools.cache.shard_codec import encode_shard
from mmkd.cache_tools.layout import (
    RESERVED_NAMES,
    VIEW_ARRAYS,
    SplitLayout,
    label_array,
    part_array,
    status_array,
    thumbprint_arrays,
)
from mmkd.cache_tools.storage.plain_zarr import Buffer, MemoryStore, ZstdCodec, default_buffer_prototype, zarr
from mmkd.data_manifests.errors import InputError

Objects = dict[str, bytes]
"""Object key within the Zarr group -> its bytes."""

CODECS = (
    [
        "bytes",
        "bytes",
        "crc32c",
        "sharding_indexed",
        "zstd",
    ],  # bytes and zstd inside, bytes and crc32c of the index
    ["bytes", "zstd"],
    ["vlen-utf8", "zstd"],
)
"""The codecs of a cache's arrays, by name; no other is ever run over stored bytes."""
INNER_ROWS = 64
"""Rows of an inner chunk: shards of whole ones read and write best."""
STATIC_ROWS = 16384


@dataclass(frozen=True)
class ArraySpec:
    """A sharded array to which one writer at a time adds whole blocks."""

    name: str
    """Path within the group."""
    shape: tuple[int, ...]
    """Rows padded to whole shards, views, and what a view holds."""
    dtype: str
    """NumPy type name."""
    fill: float
    """Value of what is not computed; never one that could be mistaken for a result."""


def split_arrays(
    split: SplitLayout, experts: Mapping[str, StorageFormat], heads: Mapping[str, int], *, thumbnail_size: int
) -> tuple[ArraySpec, ...]:
    """Return the sharded arrays of one split: thumbprints, and logits and status of each expert.

    `experts` is name -> how its logits are stored, `heads` name -> number of classes. Raises InputError for an
    expert whose name would stand where another array is.
    """
    grid = (split.padded_rows, split.views)
    hashes, thumbnails = thumbprint_arrays(split.name)
    specs = [ArraySpec(hashes, grid, "uint64", 0), ArraySpec(thumbnails, (*grid, thumbnail_size), "uint8", 0)]
    for expert, storage in experts.items():
        if expert in RESERVED_NAMES or not expert.isidentifier():
            raise InputError(
                f"{expert!r} cannot name an expert: it must be an identifier other than "
                f"{', '.join(sorted(RESERVED_NAMES))}"
            )
        specs.append(ArraySpec(status_array(split.name, expert), grid, "uint8", 255))  # NOT_COMPUTED; 0 is OK
        for head, classes in heads.items():
            for part in storage.parts(classes):
                name = part_array(split.name, expert, part.name, head=head)
                specs.append(ArraySpec(name, (*grid, *part.shape), part.dtype, part.fill))
    return tuple(specs)


def static_arrays(split: str, values: Mapping[str, Any], labels: Mapping[str, Any]) -> dict[str, Any]:
    """Return array name -> contents for what init writes: ids, facts, views and labels of one split."""
    named = {f"{split}/{name}": value for name, value in values.items()}
    return named | {label_array(split, head): value for head, value in labels.items()}


def encode_group(
    static: Mapping[str, Any], specs: Iterable[tuple[ArraySpec, SplitLayout]], view_blocks: Mapping[str, int]
) -> Objects:
    """Return all objects of a fresh group: metadata of every array, and the contents of the static ones.

    `view_blocks` is split -> views in a block: what init writes of a view has the same blocks as the shards, so
    that more views are new objects and change no old one.
    """
    objects: dict[str, Buffer] = {}
    group = zarr.open_group(MemoryStore(objects), mode="w", zarr_format=3)
    codec = ZstdCodec(level=3, checksum=True)
    for name, value in static.items():
        texts = isinstance(value, list)
        dtype, shape = (str, (len(value),)) if texts else (value.dtype, value.shape)
        array = group.create_array(
            name,
            shape=shape,
            chunks=static_chunks(name, shape, view_blocks),
            dtype=dtype,
            compressors=codec,
            config={"write_empty_chunks": True},
        )
        for start in range(0, shape[0], STATIC_ROWS):  # a block at a time: there may be millions of rows
            block = value[start : start + STATIC_ROWS]
            array[start : start + STATIC_ROWS] = np.array(block, dtype=object) if texts else block
    for spec, split in specs:
        # A divisor: a shard holds whole inner chunks (Zarr), and its rows are what the user chose.
        inner = next(n for n in range(min(INNER_ROWS, split.shard_rows), 0, -1) if split.shard_rows % n == 0)
        group.create_array(
            spec.name,
            shape=spec.shape,
            shards=(split.shard_rows, split.shard_views, *spec.shape[2:]),
            chunks=(inner, split.shard_views, *spec.shape[2:]),
            dtype=spec.dtype,
            fill_value=spec.fill,
            compressors=codec,
            config={"write_empty_chunks": True},
        )
    return {key: buffer.to_bytes() for key, buffer in objects.items()}


def static_chunks(name: str, shape: tuple[int, ...], view_blocks: Mapping[str, int]) -> tuple[int, ...]:
    """Return the chunks of a static array: up to 16,384 rows of one block of views."""
    rows = min(shape[0], STATIC_ROWS)
    split, _, array = name.partition("/")
    if array in VIEW_ARRAYS:
        return rows, view_blocks[split], *shape[2:]
    return rows, *shape[1:]


def encode_block(name: str, metadata: bytes, *, start: tuple[int, int], block: npt.NDArray[Any]) -> Objects:
    """Encode one whole shard of the array `name`, given its metadata object; return its one object.

    `block` is (shard_rows, views, ...) and `start` its first row and view.
    """
    rows, views = start
    if rows % block.shape[0] or views % block.shape[1]:
        raise ValueError(f"{name}: a block of {block.shape} at {start} is not one whole shard")
    # What one view holds is never split, so all further chunk numbers are 0.
    trailing = "/0" * (block.ndim - 2)
    key = f"{name}/c/{rows // block.shape[0]}/{views // block.shape[1]}{trailing}"
    return {key: encode_shard(metadata, block)}


def encode_object(name: str, metadata: bytes, key: str, *, values: npt.NDArray[Any]) -> bytes:
    """Encode one object of any array from the `values` of its region, the padding left out; see `array_form`."""
    array, objects = _open(name, {f"{name}/zarr.json": metadata})
    region = array_form(name, metadata).region(key)
    shape = tuple(part.stop - part.start for part in region)
    # The recorded hash is over whole shards: the padding that was left out belongs to them.
    if values.shape != shape:
        block = np.full(shape, array.fill_value, array.dtype)
        block[tuple(slice(length) for length in values.shape)] = values
        values = block
    if array.shards:
        return encode_shard(metadata, values)
    array[region] = values
    return objects[key].to_bytes()


def array_form(name: str, metadata: bytes) -> "ArrayForm":
    """Return what an array's metadata object says; raise ValueError for one that a cache would not write."""
    with _readable():
        require_known_codecs(metadata)
        array, _ = _open(name, {f"{name}/zarr.json": metadata})
        return ArrayForm(name, array.shape, array.shards or array.chunks, array.dtype, array.fill_value)


def require_known_codecs(metadata: bytes) -> None:
    """Raise ValueError for metadata that names other codecs than a cache's arrays have."""
    names = sorted(codec_names(json.loads(metadata)["codecs"]))
    if names not in CODECS:
        raise ValueError(f"its codecs are {', '.join(names) or 'none'}, which no array of a cache has")


def codec_names(codecs: Iterable[Any]) -> Iterator[str]:
    """Yield the name of each codec of a list, and of those inside it."""
    for codec in codecs:
        yield str(codec["name"])
        for inner in codec.get("configuration", {}).values():
            if isinstance(inner, list) and any(isinstance(item, dict) for item in inner):
                yield from codec_names(inner)


@contextmanager
def _readable() -> Iterator[None]:
    """Turn whatever Zarr and its codecs raise for bytes that are not what they should be into a ValueError.

    Only calls of that library stand inside, so that no fault of ours is taken for one of a file.
    """
    try:
        yield
    except MemoryError:
        raise  # it says nothing about the bytes, which must not be called damaged
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}") from error


@dataclass(frozen=True)
class ArrayForm:
    """Shape and blocks of a stored array, static or sharded."""

    name: str
    """Path within the group."""
    shape: tuple[int, ...]
    """Its shape, rows padded where it is sharded."""
    block: tuple[int, ...]
    """What one object holds; those at the end may hold less."""
    dtype: np.dtype[Any]
    """Its type; NumPy's strings for texts."""
    fill: Any
    """Value of what is not computed."""

    def region(self, key: str) -> tuple[slice, ...]:
        """Return the part of the array that an object holds."""
        numbers = [int(part) for part in key.removeprefix(f"{self.name}/c/").split("/")]
        parts = zip(numbers, self.block, self.shape, strict=True)
        return tuple(slice(n * length, min((n + 1) * length, whole)) for n, length, whole in parts)

    def keys(self) -> Iterator[str]:
        """Yield the keys of its objects, without that of its metadata."""
        counts = (range(-(-whole // length)) for whole, length in zip(self.shape, self.block, strict=True))
        for numbers in itertools.product(*counts):
            yield f"{self.name}/c/{'/'.join(map(str, numbers))}"


def array_of(key: str) -> str:
    """Return the name of the array that an object, or a metadata object, of the group belongs to."""
    # The last `/c/` parts name and chunk: an expert may be called c, too.
    return key.removesuffix("/zarr.json") if key.endswith("/zarr.json") else key.rpartition("/c/")[0]


def decode_array(name: str, objects: Mapping[str, bytes]) -> npt.NDArray[Any]:
    """Decode a whole array from its metadata object and all its blocks; raise ValueError when they are damaged."""
    with _readable():
        array, _ = _open(name, objects)
        value: npt.NDArray[Any] = np.asarray(array[...])
    return value


def decode_block(
    name: str, metadata: bytes, key: str, *, data: bytes, region: tuple[slice, ...]
) -> npt.NDArray[Any]:
    """Decode one object of an array; `region` is its rows and views. Raises ValueError when it is damaged."""
    with _readable():
        array, _ = _open(name, {f"{name}/zarr.json": metadata, key: data})
        value: npt.NDArray[Any] = np.asarray(array[region])
    return value


def _open(name: str, objects: Mapping[str, bytes]) -> tuple[zarr.Array[Any], dict[str, Buffer]]:
    make = default_buffer_prototype().buffer.from_bytes
    buffers = {key: make(value) for key, value in objects.items() if key.startswith(f"{name}/")}
    return zarr.open_array(MemoryStore(buffers), path=name, mode="r+", zarr_format=3), buffers
