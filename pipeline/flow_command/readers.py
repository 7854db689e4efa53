"""Stored flow read back, of each layout that `writers` writes: float32 (P, 2, H, W) in pixels."""

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from mmkd.cache_tools.frames.records import Float32Array, IntArray
from mmkd.data_manifests.errors import InputError
from mmkd.data_manifests.regular_file import read_regular
from mmkd.pipeline.flow.conventions import codes_of_jpeg, flow_of_codes, flow_of_i3d
from mmkd.pipeline.flow.file_names import NAMES, FlowName, pair_number, pair_of_number


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
        return read_regular(path)
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
