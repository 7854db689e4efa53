"""Frames as pictures in one HDF5 file: in the two forms of Radevski et al., and in one that keeps their times.

    h5[video]                     pictures, one string of bytes each (variable or fixed length, or opaque)
    h5[video][narration][frame]   groups, in which each frame is a dataset of its bytes, named from 0
    h5[video]/frames              the first form in a group, beside `times_seconds` and `crc32` of each frame

A clip's `video` names its dataset or group, with or without the ending of a video file. Nothing leads out of the
file: external links and storage are refused.
"""

import os
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import h5py
import numpy as np

from mmkd.cache_tools.frames.records import Float64Array
from mmkd.cache_tools.frames.stills import HDF5, MAX_FRAME_BYTES, MAX_FRAMES, StillFrames
from mmkd.data_manifests.errors import VideoError
from mmkd.data_manifests.regular_file import open_regular

FRAMES_SCHEMA = "mmkd-frames-1"
PICTURES, TIMES, CHECKSUMS = "frames", "times_seconds", "crc32"
OPEN_FILES = 2
"""HDF5 files kept open in a process."""
MAX_DEPTH = 8
_OPEN: "OrderedDict[tuple[object, ...], h5py.File]" = OrderedDict()


def open_frames_file(path: Path) -> h5py.File:
    """Return the file opened for reading, kept open in this process; VideoError where it is no HDF5 file.

    The kept handle belongs to one process: after a fork the other opens its own.
    """
    stat = path.stat()
    key = (os.getpid(), path, stat.st_size, stat.st_mtime_ns, stat.st_ino)
    if key not in _OPEN:
        open_regular(path).close()  # never a pipe or a device
        try:
            _OPEN[key] = h5py.File(path, "r", locking=False)  # shared disks may have no locks, and nothing writes
        except (OSError, RuntimeError) as error:
            raise VideoError(f"{path.name} is no HDF5 file, or a damaged one") from error
        while len(_OPEN) > OPEN_FILES:
            _OPEN.popitem(last=False)
    return _OPEN[key]


@dataclass(frozen=True)
class Hdf5Frames(StillFrames):
    """The pictures of one video in an HDF5 file."""

    node: Any
    """Its dataset of pictures, or its group of frames."""
    names: tuple[str, ...]
    """(frames,) names of a group's frames, in order; empty for a dataset."""
    stored: dict[str, Any]
    """`times_seconds` and `crc32` (frames,), where they are stored."""
    kind = HDF5

    @classmethod
    def open(cls, path: Path, video: str) -> "Hdf5Frames":
        """Find a video; VideoError where it is not there, or is of another form."""
        node = find_node(open_frames_file(path), video)
        if node is None:
            raise VideoError(f"video not found: {video}")
        try:
            if isinstance(node, h5py.Group) and PICTURES in node:
                pictures = list_of_pictures(inside(node, PICTURES), video)
                stored = {
                    name: _value_for_each(node, name, pictures) for name in (TIMES, CHECKSUMS) if name in node
                }
                return cls(pictures, (), stored)
            if isinstance(node, h5py.Dataset):
                return cls(list_of_pictures(node, video), (), {})
            return cls(node, _frame_names(node), {})
        except (RuntimeError, OSError, ValueError, KeyError) as error:
            raise VideoError(f"{video!r} cannot be read: {error}") from error

    @property
    def count(self) -> int:
        """Number of frames."""
        return len(self.names) or int(self.node.shape[0])

    def read(self, frame: int) -> bytes:
        """Return a frame's bytes; VideoError where they are not what their checksum says."""
        try:
            data = own_picture(self.node, self.names[frame]) if self.names else picture_bytes(self.node[frame])
        except (RuntimeError, OSError, ValueError, KeyError, TypeError) as error:
            raise VideoError(f"frame {self.name(frame)} cannot be read: {error}") from error
        checksums = self.stored.get(CHECKSUMS)
        if checksums is not None and zlib.crc32(data) != int(checksums[frame]):
            raise VideoError(f"frame {self.name(frame)} is damaged: its checksum differs")
        return data

    def name(self, frame: int) -> str:
        """Return a frame's number, from 0, or its name."""
        return self.names[frame] if self.names else str(frame)

    def size_bytes(self, frame: int) -> int:
        """Return the size of a frame's file."""
        return len(self.read(frame))

    def times_seconds(self) -> Float64Array | None:
        """Return the stored times; VideoError where they are none."""
        if TIMES not in self.stored:
            return None
        times = np.asarray(self.stored[TIMES], np.float64)
        if not np.isfinite(times).all() or (np.diff(times) <= 0).any() or times[0] < 0:
            raise VideoError("its stored times are not ascending, one for each frame")
        return times


def find_node(file: h5py.File, video: str) -> Any:
    """Return the node of a video's path, with the ending of a video file or without; None where there is none.

    Raises VideoError for a link that leads elsewhere.
    """
    parts = [part for part in video.split("/") if part not in ("", ".")]
    for last in dict.fromkeys((parts[-1], PurePosixPath(parts[-1]).stem)):
        node: Any = file
        for part in [*parts[:-1], last]:
            if not isinstance(node, h5py.Group) or part not in node:
                node = None
                break
            node = inside(node, part)
        if isinstance(node, h5py.Group | h5py.Dataset):
            return node
    return None


def inside(group: h5py.Group, name: str) -> Any:
    """Return a group's member; VideoError for a link that leads elsewhere."""
    if not isinstance(group.get(name, getlink=True), h5py.HardLink):
        raise VideoError(f"{name} is a link; only what lies in the file itself is read")
    return group[name]


def stored_here(node: Any) -> bool:
    """Return whether a node is a dataset whose bytes lie in its own file."""
    return isinstance(node, h5py.Dataset) and not node.external and not node.is_virtual


def list_of_pictures(node: Any, name: str) -> Any:
    """Return a dataset of pictures; VideoError for anything else, and for data outside of the file."""
    if not stored_here(node) or node.ndim != 1 or not 0 < node.shape[0] <= MAX_FRAMES:
        raise VideoError(f"{name!r} is no list of pictures")
    if node.dtype.itemsize > MAX_FRAME_BYTES:
        raise VideoError(
            f"each picture of {name!r} takes {node.dtype.itemsize} bytes; the limit is {MAX_FRAME_BYTES}"
        )
    return node


def own_picture(group: h5py.Group, name: str) -> bytes:
    """Return the bytes of a picture that is a member of a group; VideoError for data outside of the file."""
    node = inside(group, name)
    if not stored_here(node):
        raise VideoError(f"{name} is no picture that lies in the file itself")
    if (size := node.dtype.itemsize * (node.size or 0)) > MAX_FRAME_BYTES:
        raise VideoError(f"{name} takes {size} bytes; the limit is {MAX_FRAME_BYTES}")
    return picture_bytes(node[()])


def _value_for_each(group: h5py.Group, name: str, pictures: Any) -> Any:
    """Return a group's member of a number for each picture; VideoError for anything else."""
    node = inside(group, name)
    if not stored_here(node) or node.shape != pictures.shape or node.dtype.kind not in "fiu":
        raise VideoError(f"{name} is no list of numbers in the file itself, one for each frame")
    return node[()]


def _frame_names(group: h5py.Group) -> tuple[str, ...]:
    """Return the names of a group's frames, which are the numbers from 0; VideoError for anything else."""
    numbers = sorted(int(name) for name in group if name.isascii() and name.isdigit())
    if len(numbers) < len(group) or numbers != list(range(len(numbers))) or not numbers:
        raise VideoError("its group holds no frames named 0, 1, 2, ...")
    names = {int(name): name for name in group}
    if not all(isinstance(group.get(name, getlink=True), h5py.HardLink) for name in group):
        raise VideoError("one of its frames is a link; only what lies in the file itself is read")
    return tuple(names[number] for number in numbers)


def picture_bytes(value: Any) -> bytes:
    """Return a picture's bytes from what h5py gives: an array of uint8, bytes, or an opaque value."""
    if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 1:
        return value.tobytes()
    if isinstance(value, bytes | np.bytes_):
        return bytes(value)
    if isinstance(value, np.void):
        return value.tobytes()
    raise ValueError(f"a picture of type {type(value).__name__}")
