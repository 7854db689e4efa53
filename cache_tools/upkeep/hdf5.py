"""A cache as one plain HDF5 file, for people without Zarr, and back.

    <split>/clip_id, video_identity   (rows,) UTF-8 of fixed length
    <split>/label/<head>              (rows,) int64, -1 where absent; class names in the attribute `classes`
    <split>/facts, frame_index, crop_xywh, flip, thumbprint/...     as mmkd.cache_tools.layout has them
    <split>/<expert>/status           (rows, views) uint8: 0 has logits; names in the attribute `names`
    <split>/<expert>/<part>/<head>    (rows, views, ...) the parts that hold the logits, as they are stored; the
                                      attribute `decode` of the group <expert> says how to make logits of them
    mmkd-cache/init.json, index.jsonl, objects.json    bytes: what was asked for, the commit records, and what else
                                      an import needs

Every chunk has HDF5's own checksum (fletcher32), and its metadata too. Rows are not padded. An import encodes the
values again and finds each object's recorded hash, so it gives back the bytes that were exported; where another
version of the Zarr or Zstandard library writes other bytes for the same values, it checks the values' own hashes,
writes records for the bytes of its own, and says so. The journal stays behind.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from mmkd.cache_tools.cache.fingerprints import canonical_json
from mmkd.cache_tools.cache.reader import CacheReader
from mmkd.cache_tools.layout import INDEX, INIT, Status, label_array, status_array
from mmkd.cache_tools.process.progress import Progress
from mmkd.cache_tools.storage.hdf5_file import Hdf5Output, writing_hdf5
from mmkd.cache_tools.storage.store import Store
from mmkd.data_manifests.atomic import atomic_path
from mmkd.data_manifests.errors import InputError

EXPORT_SCHEMA = "mmkd-cache-hdf5-1"
ABOUT = "mmkd-cache"
"""Group of what an import needs; no identifier, so that no split can have its name."""
OBJECTS = "objects.json"
CHUNK_BYTES = 1 << 20
DECODE = {
    "fp16-minus-row-maximum": "float32(logits) + maximum[..., None]; a row whose status is not 0 is NaN",
    "square-companded": (
        "with b bits and C classes, logits holds C low bytes and then the b - 8 high bits of each class, packed "
        "big-endian: q = low + 256 high; maximum[..., None] - range[..., None] (q / (2^b - 1))^2; a row whose "
        "status is not 0 is NaN"
    ),
}
"""Start of a format's name -> how to make logits of its parts."""


def export_cache(location: Path | str | Store, path: Path) -> int:
    """Write a finished cache to the HDF5 file `path`, replacing it in one step; return its size in bytes.

    A shard of one array is all that lies in memory. Raises InputError for a `path` that is another file,
    VerificationError for a damaged cache, StorageError when the file cannot be written.
    """
    reader = CacheReader(location)
    if path.exists() and not is_export(path):
        raise InputError(
            f"{path} is there and not an export of `mmkd-cache export`; name another file, or delete it"
        )
    # Files from HDF5 1.10 on have checksums over their metadata, too.
    with atomic_path(path) as temporary, writing_hdf5(temporary, libver=("v110", "v110")) as output:
        _write_file(reader, output)
    return path.stat().st_size


def is_export(path: Path) -> bool:
    """Return whether a file is one that `export_cache` wrote, as far as its first attribute says."""
    if not path.is_file():  # HDF5 would wait for what a pipe gives
        return False
    try:
        with h5py.File(path, "r") as file:
            return str(file.attrs.get("schema")).startswith(EXPORT_SCHEMA.rstrip("0123456789"))
    except (OSError, RuntimeError, ValueError):
        return False


def _write_file(reader: CacheReader, output: Hdf5Output) -> None:
    file = output.file
    file.attrs["schema"] = EXPORT_SCHEMA
    file.attrs["dataset"] = reader.dataset
    file.attrs["fingerprint"] = reader.fingerprint
    about = {"environment": reader.init.environment, "base": reader.init.manifest}
    file.attrs["about"] = f"logits of a multimodal teacher; `mmkd-cache import` reads it. {json.dumps(about)}"
    hashes: dict[str, str] = {}
    with Progress(
        "exporting", total=sum(not key.endswith("zarr.json") for key in reader.objects), unit="object"
    ) as progress:
        for name in reader.arrays:
            hashes |= _write_array(reader, output, name)
            progress.advance(len(hashes) - progress.done)
    _explain(reader, file)
    records = {INIT: reader.store.read(INIT), INDEX: reader.store.read(INDEX)}
    metadata = {key: reader.object(key).decode() for key in reader.objects if key.endswith("zarr.json")}
    records[OBJECTS] = canonical_json({"metadata": metadata, "values": hashes}).encode()
    for key, data in records.items():
        file.create_dataset(
            f"{ABOUT}/{key}", data=np.frombuffer(data, np.uint8), **_filters((CHUNK_BYTES,), len(data))
        )


def _write_array(reader: CacheReader, output: Hdf5Output, name: str) -> dict[str, str]:
    """Write one array without its padding, an object at a time; return object key -> hash of its values."""
    form = reader.form(name)
    rows = reader.layout(name.partition("/")[0]).rows
    shape = (rows, *form.shape[1:])
    dtype: Any = form.dtype
    if is_text(form.dtype):
        # Texts of variable length lie in a heap of HDF5's, which the checksums of chunks do not cover.
        longest = max(len(str(value).encode()) for value in reader.array(name))
        dtype = h5py.string_dtype("utf-8", max(longest, 1))  # HDF5 has no texts of length 0
    chunk = _chunk(tuple(min(pair) for pair in zip(form.block, shape, strict=True)), np.dtype(dtype).itemsize)
    dataset = output.file.create_dataset(name, shape, dtype, **_filters(chunk, rows))
    hashes = {}
    for key, region, padded in reader.objects_of(name):
        output.check()
        values = padded[: rows - region[0].start]
        dataset[clipped(region, rows)] = _as_bytes(values, dataset.dtype) if is_text(form.dtype) else values
        hashes[key] = value_hash(values)
    return hashes


def _explain(reader: CacheReader, file: h5py.File) -> None:
    """Add the attributes that tell people what they read."""
    text = h5py.string_dtype("utf-8")
    names = np.array([f"{status.value} {status.name.lower()}" for status in Status], dtype=object)
    for split in reader.layouts:
        for head in reader.heads:
            dataset = file[label_array(split, head.name)]
            dataset.attrs.create("classes", np.array(head.classes, dtype=object), dtype=text)
        for expert in reader.experts:
            stored = reader.storage(expert).name
            group = file[f"{split}/{expert}"]
            group.attrs["format"] = stored
            group.attrs["decode"] = next(how for start, how in DECODE.items() if stored.startswith(start))
            file[status_array(split, expert)].attrs.create("names", names, dtype=text)


def is_text(dtype: np.dtype[Any]) -> bool:
    """Return whether an array holds texts, by whatever name this NumPy calls them."""
    return dtype.kind in "OTU"


def value_hash(values: npt.NDArray[Any]) -> str:
    """Return the SHA-256 of values, without padding, in C order and little-endian; texts end with a zero byte."""
    if is_text(values.dtype):
        return hashlib.sha256(b"".join(str(value).encode() + b"\0" for value in values)).hexdigest()
    return hashlib.sha256(np.ascontiguousarray(values, values.dtype.newbyteorder("<")).tobytes()).hexdigest()


def _as_bytes(values: npt.NDArray[Any], dtype: np.dtype[Any]) -> npt.NDArray[np.bytes_]:
    return np.array([str(value).encode() for value in values], dtype=dtype)


def clipped(region: tuple[slice, ...], rows: int) -> tuple[slice, ...]:
    """Return a region without the rows that pad it."""
    return (slice(region[0].start, min(region[0].stop, rows)), *region[1:])


def _chunk(block: tuple[int, ...], item_bytes: int) -> tuple[int, ...]:
    """Return a block, its rows halved until a chunk fits HDF5's cache."""
    rows, *rest = (max(length, 1) for length in block)
    while rows > 1 and rows * int(np.prod(rest)) * item_bytes > CHUNK_BYTES:
        rows = -(-rows // 2)
    return rows, *rest


def _filters(chunk: tuple[int, ...], rows: int) -> dict[str, Any]:
    chunks = (max(min(chunk[0], rows), 1), *chunk[1:])  # none may be larger than its data set
    # Filters that come with HDF5 itself: for zstd every reader would have to install a plug-in.
    return {"chunks": chunks, "compression": "gzip", "compression_opts": 1, "shuffle": True, "fletcher32": True}
