"""Flow of one video on disk, in the layouts that others write and read: writers that end whole, and readers.

    denseflow  NAME/flow_x_00000.jpg, NAME/flow_y_00000.jpg, from 0
    epic       NAME/u/frame_0000000001.jpg, NAME/v/..., from 1
    mmaction   NAME/x_00001.jpg, NAME/y_00001.jpg, from 1
    i3d        NAME.npy, float32 (pairs, H, W, 2), clipped to ±20 px and divided by 20
    hdf5       NAME.h5, group NAME with `flow_x` and `flow_y`, each (pairs,) of JPEG bytes: one file, not thousands

A writer gathers beside its target and moves it into place at the end, so that a killed run leaves nothing that
looks whole. JPEG files are not synced one by one: after a power failure delete the `.done` marker of the videos
of the last seconds.
"""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import h5py
import numpy as np
import torch
from torch import Tensor

from mmkd.cache_tools.records import Float32Array, IntArray, UInt8Array
from mmkd.data_manifests.errors import InputError, StorageError
from mmkd.pipeline.flow_conventions import (
    NAMES,
    FlowName,
    codes_of_flow,
    codes_of_jpeg,
    flow_of_codes,
    flow_of_i3d,
    i3d_of_flow,
    jpeg_of_codes,
    pair_number,
    pair_of_number,
)

LAYOUTS = (*NAMES, "i3d", "hdf5")
CODED_AT_ONCE = 4_000_000
"""Values turned into codes at once: their double precision takes 8 bytes each."""
PARTS = ".part"
"""Folder, beside the results, of what is not whole yet."""


@dataclass(frozen=True)
class EncodedFlow:
    """Consecutive pairs of one video as a layout stores them."""

    jpegs: Sequence[tuple[bytes, bytes]] = ()
    """(P,) grey JPEGs of x and y; empty for I3D."""
    floats: Float32Array | None = None
    """(P, H, W, 2) of I3D."""

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.jpegs) if self.floats is None else len(self.floats)


def stored_values(flow: Tensor, *, layout: str, bound_px: int) -> UInt8Array | Float32Array:
    """Return flow (P, 2, H, W) in pixels as codes (P, 2, H, W), for I3D as floats (P, H, W, 2)."""
    if layout == "i3d":
        return i3d_of_flow(flow).permute(0, 2, 3, 1).contiguous().cpu().numpy()
    count = max(1, CODED_AT_ONCE // flow[0].numel())
    parts = (flow[start : start + count] for start in range(0, len(flow), count))
    return np.concatenate([codes_of_flow(part, bound_px=bound_px).cpu().numpy() for part in parts])


def encode_values(values: UInt8Array | Float32Array, *, layout: str) -> EncodedFlow:
    """Encode what `stored_values` made; threads may share this work, since OpenCV lets others run meanwhile."""
    if layout == "i3d":
        return EncodedFlow(floats=values.astype(np.float32, copy=False))
    codes = values.astype(np.uint8, copy=False)
    return EncodedFlow([(jpeg_of_codes(x), jpeg_of_codes(y)) for x, y in codes])


class FlowWriter(Protocol):
    """Takes a video's pairs in order and makes its result appear at the end, or not at all."""

    def add(self, encoded: EncodedFlow) -> None:
        """Take the next pairs."""
        ...

    def finish(self) -> None:
        """Move the whole result into place."""
        ...

    def abandon(self) -> None:
        """Remove what was gathered."""
        ...


class JpegFolderWriter:
    """Writes a folder of JPEG files; files of other names that lie in it stay."""

    def __init__(self, out: Path, name: str, *, layout: str, step: int) -> None:
        """Gather the video `name` of the folder `out`."""
        self._target = out / name
        self._part = _fresh_part(out, name)
        self._layout, self._step = layout, step
        self._pairs = 0
        with storage_errors(self._part):
            self._part.mkdir(parents=True)
            if layout == "epic":
                for axis in ("u", "v"):
                    (self._part / axis).mkdir()

    def add(self, encoded: EncodedFlow) -> None:
        """Write the next pairs, two files each."""
        make, _ = NAMES[self._layout]
        with storage_errors(self._part):
            for planes in encoded.jpegs:
                number = pair_number(self._layout, self._pairs, self._step)
                for axis, data in zip(("x", "y"), planes, strict=True):
                    name = make(FlowName("x" if axis == "x" else "y", number, self._step))
                    (self._part / name).write_bytes(data)
                self._pairs += 1

    def finish(self) -> None:
        """Move the folder into place, or its files into the folder that is there, in place of its flow."""
        with storage_errors(self._target):
            self._target.parent.mkdir(parents=True, exist_ok=True)
            if not self._target.exists():
                self._part.rename(self._target)
                return
            _remove_flow(self._target, layout=self._layout, step=self._step)
            for path in sorted(path for path in self._part.rglob("*") if path.is_file()):
                place = self._target / path.relative_to(self._part)
                place.parent.mkdir(exist_ok=True)
                path.replace(place)
        self.abandon()

    def abandon(self) -> None:
        """Remove what was gathered."""
        shutil.rmtree(self._part, ignore_errors=True)


def _remove_flow(folder: Path, *, layout: str, step: int) -> None:
    """Delete a folder's flow of this step: that of a video that has changed, or that may have been longer."""
    _, parse = NAMES[layout]
    for path in list(folder.rglob("*.jpg")):
        name = parse(path.relative_to(folder).as_posix())
        if name is not None and (name.step == step or layout != "denseflow"):
            path.unlink()


class NpyWriter:
    """Writes one .npy file of floats."""

    def __init__(self, out: Path, name: str, *, pairs: int) -> None:
        """Gather the video `name` of the folder `out`, of which the number of pairs is known."""
        self._target = out / f"{name}.npy"
        self._part = _fresh_part(out, f"{name}.npy")
        self._count, self._pairs = pairs, 0
        self._array: Any = None

    def add(self, encoded: EncodedFlow) -> None:
        """Write the next pairs into the file, which is a memory map."""
        if encoded.floats is None:
            raise ValueError("an .npy file takes floats")
        with storage_errors(self._part):
            if self._array is None:
                self._part.parent.mkdir(parents=True, exist_ok=True)
                shape = (self._count, *encoded.floats.shape[1:])
                self._array = np.lib.format.open_memmap(self._part, mode="w+", dtype=np.float32, shape=shape)
            self._array[self._pairs : self._pairs + len(encoded)] = encoded.floats
            self._pairs += len(encoded)

    def finish(self) -> None:
        """Move the file into place."""
        if self._pairs != self._count:
            raise ValueError(f"{self._pairs} of {self._count} pairs were written")
        with storage_errors(self._target):
            self._array.flush()
            self._array = None
            self._target.parent.mkdir(parents=True, exist_ok=True)
            self._part.replace(self._target)

    def abandon(self) -> None:
        """Remove what was gathered."""
        self._array = None
        self._part.unlink(missing_ok=True)


class Hdf5Writer:
    """Writes one HDF5 file whose group NAME holds encoded JPEGs, or the floats of I3D."""

    def __init__(self, out: Path, name: str, *, attributes: dict[str, Any]) -> None:
        """Gather the video `name` of the folder `out`; `attributes` are stored with its group."""
        self._target = out / f"{name}.h5"
        self._part = _fresh_part(out, f"{name}.h5")
        with storage_errors(self._part):
            self._part.parent.mkdir(parents=True, exist_ok=True)
            self._file = h5py.File(self._part, "w")
            self._group = self._file.create_group(name)
            self._group.attrs.update(attributes)

    def add(self, encoded: EncodedFlow) -> None:
        """Append the next pairs."""
        with storage_errors(self._part):
            if encoded.floats is not None:
                self._append("flow", encoded.floats, np.float32)
                return
            for axis, planes in zip(("flow_x", "flow_y"), zip(*encoded.jpegs, strict=True), strict=True):
                rows = np.empty(len(planes), dtype=object)
                rows[:] = [np.frombuffer(plane, np.uint8) for plane in planes]
                self._append(axis, rows, h5py.vlen_dtype(np.uint8))

    def _append(self, name: str, rows: Any, dtype: Any) -> None:
        if name not in self._group:
            shape = (0, *rows.shape[1:])
            chunk = (1, *rows.shape[1:]) if rows.ndim > 1 else (256,)
            self._group.create_dataset(name, shape=shape, maxshape=(None, *shape[1:]), dtype=dtype, chunks=chunk)
        data = self._group[name]
        data.resize(len(data) + len(rows), axis=0)
        data[-len(rows) :] = rows

    def finish(self) -> None:
        """Move the file into place."""
        with storage_errors(self._target):
            self._file.close()
            self._target.parent.mkdir(parents=True, exist_ok=True)
            self._part.replace(self._target)

    def abandon(self) -> None:
        """Remove what was gathered."""
        with suppress(OSError, RuntimeError):  # closing writes, and the disk may be full
            self._file.close()
        self._part.unlink(missing_ok=True)


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an OSError while writing `path` into a StorageError that names it."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}; free it and run again") from error


def _fresh_part(out: Path, name: str) -> Path:
    path = out / PARTS / name
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    return path


# ---- readers: flow float32 (P, 2, H, W) in pixels


def jpeg_pairs(folder: Path, *, layout: str, step: int = 1) -> IntArray:
    """Return the ascending pairs (from 0) of which a folder of JPEG files holds both planes."""
    _, parse = NAMES[layout]
    found: dict[str, set[int]] = {"x": set(), "y": set()}
    for path in folder.rglob("*.jpg"):
        name = parse(path.relative_to(folder).as_posix())
        if name is not None and (name.step == step or layout != "denseflow"):
            found[name.axis].add(pair_of_number(layout, name.number, step))
    return np.array(sorted(found["x"] & found["y"]), dtype=np.int64)


def read_jpeg_folder(folder: Path, pairs: IntArray, *, layout: str, bound_px: int, step: int = 1) -> Float32Array:
    """Return the flow of `pairs` (from 0) out of a folder of JPEG files; InputError names one that is missing."""
    make, _ = NAMES[layout]
    numbers = [pair_number(layout, int(pair), step) for pair in pairs]
    paths = [(folder / make(FlowName("x", n, step)), folder / make(FlowName("y", n, step))) for n in numbers]
    return np.stack(
        [_decode(tuple(_bytes(path) for path in both), paths=both, bound_px=bound_px) for both in paths]
    )


def read_hdf5(path: Path, name: str, pairs: IntArray, *, bound_px: int) -> Float32Array:
    """Return the flow of `pairs` (from 0) of the video `name` out of an HDF5 file of JPEGs or of I3D's floats."""
    try:
        with h5py.File(path, "r") as file:
            group = file[name]
            if "flow" in group:
                return np.stack([_from_i3d(group["flow"][pair]) for pair in pairs])
            planes = [(group["flow_x"][pair].tobytes(), group["flow_y"][pair].tobytes()) for pair in pairs]
    except (OSError, KeyError, ValueError, IndexError) as error:
        raise InputError(f"{path}: no flow of {name!r} that can be read ({str(error).splitlines()[0]})") from error
    return np.stack([_decode(both, paths=(path, path), bound_px=bound_px) for both in planes])


def read_i3d(path: Path, pairs: IntArray) -> Float32Array:
    """Return the flow of `pairs` (from 0) out of an .npy file of I3D's floats, a memory map."""
    try:
        stored = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise InputError(f"{path}: not a whole .npy file ({error})") from error
    if stored.ndim != 4 or stored.shape[-1] != 2:
        raise InputError(f"{path}: I3D's flow is (pairs, H, W, 2), not {stored.shape}")
    return np.stack([_from_i3d(stored[pair]) for pair in pairs])


def _from_i3d(values: Any) -> Float32Array:
    flow: Float32Array = flow_of_i3d(torch.from_numpy(np.array(values, np.float32).transpose(2, 0, 1))).numpy()
    return flow


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"flow file {path} cannot be read: {error.strerror}") from error


def _decode(planes: tuple[bytes, ...], *, paths: tuple[Path, ...], bound_px: int) -> Float32Array:
    codes = []
    for data, path in zip(planes, paths, strict=True):
        try:
            codes.append(codes_of_jpeg(data))
        except ValueError as error:
            raise InputError(f"{path}: {error}") from error
    flow: Float32Array = flow_of_codes(torch.from_numpy(np.stack(codes)), bound_px=bound_px).numpy()
    return flow
