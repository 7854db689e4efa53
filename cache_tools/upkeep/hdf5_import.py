"""A cache made again of the HDF5 file that it was exported to, which is believed in nothing.

Everything that can be checked without decoding is checked before the first byte is written; each block of values
when its turn comes.
"""

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from mmkd.cache_tools.cache.array_forms import require_form
from mmkd.cache_tools.cache.arrays import array_form, array_of, encode_object
from mmkd.cache_tools.cache.commits import CommitRecord, hash_objects, publish
from mmkd.cache_tools.cache.init_record import CacheInit
from mmkd.cache_tools.cache.root_record import RootRecord
from mmkd.cache_tools.layout import INDEX, INIT, ROOT, Shard, group_key
from mmkd.cache_tools.process.progress import Progress
from mmkd.cache_tools.storage.open import open_store
from mmkd.cache_tools.storage.store import MissingObjectError, Store
from mmkd.cache_tools.upkeep.free_place import writing_whole
from mmkd.cache_tools.upkeep.hdf5 import ABOUT, EXPORT_SCHEMA, OBJECTS, clipped, is_text, value_hash
from mmkd.data_manifests.counted import counted
from mmkd.data_manifests.errors import InputError, MmkdError, StorageError, VerificationError
from mmkd.data_manifests.system_errors import MACHINE_FAULTS
from mmkd.data_manifests.typed_json import STRICT, typed

HEADER_SECONDS = 60.0
"""HDF5 reads what a file says of itself within milliseconds, or never."""
READ_HEADER = "import sys, h5py; f = h5py.File(sys.argv[1]); f.attrs.get('schema'); f.attrs.get('fingerprint')"
DEFLATE_RATIO = 1032
"""Deflate makes nothing smaller than by this."""


@dataclass(frozen=True)
class ImportReport:
    """What an import did."""

    clips: int
    """Rows of all splits."""
    objects: int
    """Objects written into the group."""
    reencoded: int
    """Those whose bytes are not the exported ones, since another library version wrote them."""

    def lines(self, cache: Path | str) -> list[str]:
        """Return the report for people."""
        same = "byte for byte the exported cache"
        if self.reencoded:
            same = (
                f"the exported values; {counted(self.reencoded, 'object', ('has', 'have'))} "
                f"other bytes, by another Zarr or Zstandard"
            )
        return [f"{cache}: {counted(self.clips, 'clip')}, {counted(self.objects, 'object')}: {same}"]


def import_cache(path: Path, out: Path | str | Store) -> ImportReport:
    """Make the cache `out` of what `export_cache` wrote, every value checked against its hash before it counts.

    Raises InputError for a file that is no export, or an `out` that holds another cache; VerificationError for a
    damaged file. Stopped half-way it leaves an unfinished cache: run it again.
    """
    store = open_store(out) if isinstance(out, (Path, str)) else out
    require_hdf5(path)
    require_ending_header(path)
    with reading(path):
        file = h5py.File(path, "r")
    with file:
        with reading(path):
            importer = Importer(path, file, store)
        return importer.run()


@dataclass(frozen=True)
class _Objects:
    """What `objects.json` says."""

    __pydantic_config__ = STRICT
    metadata: dict[str, str]
    """Key of each metadata object -> its text."""
    values: dict[str, str]
    """Key of each other object -> hash of its values."""


class Importer:
    """One import."""

    def __init__(self, path: Path, file: h5py.File, store: Store) -> None:
        """Read and check what the file says of itself."""
        self._path, self._file, self._store = path, file, store
        schema = file.attrs.get("schema")
        if not isinstance(schema, str) or schema != EXPORT_SCHEMA:  # it may be an array
            raise InputError(
                f"{path} is not an export of `mmkd-cache export` (its schema is {schema!r}, not {EXPORT_SCHEMA!r})"
            )
        init, index, objects = (self._bytes(f"{ABOUT}/{key}") for key in (INIT, INDEX, OBJECTS))
        self._init_bytes, self._init = init, CacheInit.from_bytes(init, f"{path}: {INIT}")
        hashes = {INIT: hashlib.sha256(init).hexdigest(), INDEX: hashlib.sha256(index).hexdigest()}
        self._root = RootRecord(hashes)
        if self._root.fingerprint != file.attrs["fingerprint"]:
            raise damaged(path, "its fingerprint is not that of its records")
        self._records = [CommitRecord.from_bytes(line, f"{path}: {INDEX}") for line in index.splitlines()]
        about = typed(_Objects, json.loads(objects))
        self._metadata = {key: text.encode() for key, text in about.metadata.items()}
        self._values = about.values
        self._layouts = self._init.layouts()
        self._shards = {shard.name: shard for layout in self._layouts.values() for shard in layout.shards()}
        self._reencoded = 0
        self._require_all()

    def _require_all(self) -> None:
        """Raise VerificationError, before anything is written, for what a later step would miss."""
        nodes = self._init.fingerprints()
        for record in self._records:
            if nodes.get(record.node) != record.fingerprint or record.shard not in self._shards:
                raise damaged(self._path, f"its record of {record.node} of {record.shard} belongs elsewhere")
        for key, text in self._metadata.items():
            if hashlib.sha256(text).hexdigest() != self._init.objects.get(key):
                raise damaged(self._path, f"{key} is not what its hash says")
        for name, expected in self._init.forms().items():
            require_form(array_form(name, self._metadata[f"{name}/zarr.json"]), expected)
            shape, dataset = (self._layouts[name.partition("/")[0]].rows, *expected.shape[1:]), self._dataset(name)
            if dataset.shape != shape:
                raise damaged(self._path, f"{name} has the shape {dataset.shape}")
            if dataset.dtype.kind != "S" if is_text(expected.dtype) else dataset.dtype != expected.dtype:
                raise damaged(self._path, f"{name} has the type {dataset.dtype}")

    def _dataset(self, name: str) -> h5py.Dataset:
        """Return a dataset that lies in this very file; others may be pipes or devices, or anybody's."""
        found: Any = self._file
        for part in name.split("/"):
            if not isinstance(found.get(part, getlink=True), h5py.HardLink):
                raise damaged(self._path, f"{name} is not there, or a link")
            found = found[part]
        if not isinstance(found, h5py.Dataset) or found.external or found.is_virtual:
            raise damaged(self._path, f"{name} holds no values of its own")
        return found

    def _bytes(self, name: str) -> bytes:
        dataset = self._dataset(name)
        # Deflate packs at most 1032 to 1: a larger claim would fill the memory with nothing.
        if dataset.dtype != np.uint8 or dataset.size > DEFLATE_RATIO * self._path.stat().st_size:
            raise damaged(self._path, f"{name} has the type {dataset.dtype} or the size {dataset.size}")
        return bytes(dataset[()].tobytes())

    def run(self) -> ImportReport:
        """Write static objects, init.json, then each node of each shard; finish the cache."""
        total = len(self._values) + len(self._metadata)
        report = ImportReport(sum(layout.rows for layout in self._layouts.values()), total, 0)
        if self._is_there():
            return report
        with (
            writing_whole(self._store, self._init, what=f"{self._path} is an export of another one"),
            Progress("importing", total=total, unit="object") as progress,
        ):
            self._write_init()
            progress.advance(len(self._init.objects))
            for record in self._records:
                self._publish(self._shards[record.shard], record)
                progress.advance(len(record.objects))
        return replace(report, reencoded=self._reencoded)

    def _is_there(self) -> bool:
        """Return whether this very cache was imported before."""
        try:
            root = RootRecord.from_bytes(self._store.read(ROOT), self._store.locate(ROOT))
        except MissingObjectError:
            return False
        return root == self._root

    def _write_init(self) -> None:
        """Write metadata and static arrays, then init.json, as an interrupted build would leave them."""
        hashes = {}
        for key, sha256 in self._init.objects.items():
            data = self._metadata[key] if key in self._metadata else self._object(key, sha256)
            hashes[key] = hashlib.sha256(data).hexdigest()
            self._store.write(group_key(key), data)
        init = self._init_bytes
        if hashes != self._init.objects:
            init = replace(self._init, objects=hashes).to_bytes()
        self._store.write(INIT, init)

    def _publish(self, shard: Shard, record: CommitRecord) -> None:
        objects = {key: self._object(key, sha256) for key, sha256 in record.objects.items()}
        publish(self._store, shard, replace(record, objects=hash_objects(objects)), objects)

    def _object(self, key: str, sha256: str) -> bytes:
        """Encode one object again; raise VerificationError unless its values are those that were exported."""
        with reading(self._path):
            name = array_of(key)
            metadata = self._metadata[f"{name}/zarr.json"]
            form, rows = array_form(name, metadata), self._layouts[name.partition("/")[0]].rows
            region = clipped(form.region(key), rows)
            values, expected = self._dataset(name)[region], self._values[key]
            if is_text(form.dtype):
                values = np.array([value.decode() for value in values], dtype=form.dtype)
        data = encode_object(name, metadata, key, values=values)
        if hashlib.sha256(data).hexdigest() != sha256:
            if value_hash(values) != expected:
                what = ", ".join(f"{part.start}..{part.stop - 1}" for part in region[:2])
                raise damaged(self._path, f"the values of {name} [{what}] are not what their hash says")
            self._reencoded += 1
        return data


def require_hdf5(path: Path) -> None:
    """Raise InputError for what is not an HDF5 file; a pipe or device is not opened to find out."""
    if not path.exists():
        raise InputError(f"{path} is not there; name a file of `mmkd-cache export`")
    if not path.is_file() or not h5py.is_hdf5(path):
        raise InputError(f"{path} is not an HDF5 file; name a file of `mmkd-cache export`")


def require_ending_header(path: Path) -> None:
    """Raise VerificationError for a file whose text HDF5 never ends reading, or dies of.

    Text lies in a heap that has no checksum: one flipped bit in its sizes sends HDF5 round for ever, and nothing
    stops it within its process. So another process, which can be stopped, reads that text first.
    """
    command = [sys.executable, "-P", "-c", READ_HEADER, str(path.resolve())]
    try:
        done = subprocess.run(command, capture_output=True, timeout=HEADER_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise damaged(path, "HDF5 does not come to an end of its text") from None
    if done.returncode < 0:  # by a signal; what h5py raises is raised here again, and has its reason there
        raise damaged(path, "HDF5's library dies of it")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what h5py, or a parser, raises for a file that it cannot read into an error that says what to do.

    Only reading stands inside, so that no fault of ours is taken for one of the file. The machine's faults stay so.
    """
    try:
        yield
    except MmkdError:
        raise
    except (OSError, RuntimeError, LookupError, ValueError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, OSError) and error.errno in MACHINE_FAULTS:
            raise StorageError(f"cannot read {path}: {_one_line(error)}; fix that and run again") from error
        raise damaged(path, _one_line(error)) from error


def damaged(path: Path, what: str) -> VerificationError:
    """Return the error for a damaged file."""
    return VerificationError(f"{path} is damaged ({what}); export the cache again")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
