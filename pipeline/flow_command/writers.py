"""Flow of one video on disk, in the layouts that others write and read: writers that end whole.

    denseflow  NAME/flow_x_00000.jpg, NAME/flow_y_00000.jpg, from 0
    epic       NAME/u/frame_0000000001.jpg, NAME/v/..., from 1
    mmaction   NAME/x_00001.jpg, NAME/y_00001.jpg, from 1
    i3d        NAME.npy, float32 (pairs, H, W, 2), clipped to ±20 px and divided by 20
    hdf5       NAME.h5, group NAME with `flow_x` and `flow_y`, each (pairs,) of JPEG bytes: one file, not thousands

A writer gathers beside its target, in a place that is its run's alone, counts what it gathered, and moves it into
place at the end, so that a killed run leaves nothing that looks whole. JPEG files are not synced one by one: after
a power failure delete the `.done` marker of the videos of the last seconds.
"""

import errno
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import h5py
import numpy as np

from mmkd.cache_tools.storage.hdf5_file import Hdf5Output
from mmkd.data_manifests.atomic import TEMPORARY, storage_errors, sync_directory, sync_file
from mmkd.data_manifests.errors import StorageError, VideoError
from mmkd.pipeline.flow.file_names import NAMES, FlowName, pair_number
from mmkd.pipeline.flow_command.encoding import EncodedFlow


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

    def __init__(self, target: Path, part: Path, *, layout: str, step: int) -> None:
        """Gather in the folder `part`, which is made, what becomes the folder `target`."""
        self._target, self._part = target, part
        self._layout, self._step = layout, step
        self._pairs = 0
        with storage_errors(self._part):
            self._part.mkdir(parents=True)
            if layout == "epic":
                for axis in ("u", "v"):
                    (self._part / axis).mkdir()

    def add(self, encoded: EncodedFlow) -> None:
        """Write the next pairs, two files each."""
        with storage_errors(self._part):
            for planes in encoded.jpegs:
                for name, data in zip(self._names([self._pairs]), planes, strict=True):
                    (self._part / name).write_bytes(data)
                self._pairs += 1

    def finish(self) -> None:
        """Move the folder into place, or its files into the folder that is there, in place of its flow."""
        with storage_errors(self._target):
            names = sorted(self._names(range(self._pairs)))
            # A cleaner of temporary files may have been here: a folder that lacks some must not look whole.
            if lacks_any(self._part, names):
                raise StorageError(f"cannot write {self._target}: another program deletes its parts; run again")
            self._target.parent.mkdir(parents=True, exist_ok=True)
            if not self._target.exists():
                _move(self._part, self._target)
                return
            _remove_flow(self._target, layout=self._layout, step=self._step)
            for name in names:
                place = self._target / name
                place.parent.mkdir(exist_ok=True)
                _move(self._part / name, place)
        self.abandon()

    def abandon(self) -> None:
        """Remove what was gathered."""
        shutil.rmtree(self._part, ignore_errors=True)

    def _names(self, pairs: Iterable[int]) -> list[str]:
        return jpeg_names(pairs, layout=self._layout, step=self._step)


def jpeg_names(pairs: Iterable[int], *, layout: str, step: int) -> list[str]:
    """Return the names of the files of some pairs (from 0), x before y."""
    make, _ = NAMES[layout]
    numbers = [pair_number(layout, pair, step) for pair in pairs]
    return [make(name) for n in numbers for name in (FlowName("x", n, step), FlowName("y", n, step))]


def lacks_any(folder: Path, names: Iterable[str]) -> bool:
    """Return whether a folder lacks any of these files, by listing it once: thousands of names cost no more."""
    wanted: dict[str, set[str]] = {}
    for name in names:
        below, _, file = name.rpartition("/")
        wanted.setdefault(below, set()).add(file)
    try:
        return any(
            not files.issubset(os.listdir(folder / below))  # noqa: PTH208 - a Path for each costs 20 times as much
            for below, files in wanted.items()
        )
    except OSError:  # absent, or not to be listed: writing will say so
        return True


def flow_files(folder: Path, *, layout: str, step: int) -> Iterator[Path]:
    """Yield a folder's files that are flow of this step by their names."""
    _, parse = NAMES[layout]
    for path in folder.rglob("*.jpg"):
        name = parse(path.relative_to(folder).as_posix())
        if name is not None and (name.step == step or layout != "denseflow"):
            yield path


def _remove_flow(folder: Path, *, layout: str, step: int) -> None:
    """Delete a folder's flow of this step: that of a video that has changed, or that may have been longer."""
    for path in list(flow_files(folder, layout=layout, step=step)):
        path.unlink()


class NpyWriter:
    """Writes one .npy file of floats."""

    def __init__(self, target: Path, part: Path, *, pairs: int) -> None:
        """Gather in the file `part` what becomes the file `target`; the number of pairs is known."""
        self._target, self._part = target, part
        self._count, self._pairs = pairs, 0
        self._file: BinaryIO | None = None

    def add(self, encoded: EncodedFlow) -> None:
        """Append the next pairs; not through a memory map, in which a full disk would kill the process."""
        floats = encoded.floats
        if floats is None:
            raise ValueError("an .npy file takes floats")
        with storage_errors(self._part):
            if self._file is None:
                self._part.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._part.open("wb")
                shape = (self._count, *floats.shape[1:])
                header = {"descr": "<f4", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(self._file, header)
            self._file.write(floats.astype("<f4", copy=False).tobytes())
            self._pairs += len(encoded)

    def finish(self) -> None:
        """Move the file into place."""
        if self._pairs != self._count or self._file is None:
            raise ValueError(f"{self._pairs} of {self._count} pairs were written")
        with storage_errors(self._target):
            self._file.close()
            _place(self._part, self._target)

    def abandon(self) -> None:
        """Remove what was gathered."""
        with suppress(OSError):  # closing writes, and the disk may be full
            if self._file is not None:
                self._file.close()
        with suppress(OSError):
            self._part.unlink(missing_ok=True)


class Hdf5Writer:
    """Writes one HDF5 file whose group NAME holds encoded JPEGs, or the floats of I3D."""

    def __init__(self, target: Path, part: Path, name: str, *, attributes: dict[str, Any]) -> None:
        """Gather in the file `part` what becomes the file `target`; `attributes` are stored with the group `name`.

        Raises VideoError for a name that HDF5 cannot hold.
        """
        self._target, self._part = target, part
        try:
            name.encode()
        except UnicodeEncodeError:
            raise VideoError("its name is not valid UTF-8, as HDF5 needs; rename it, or write a folder") from None
        with storage_errors(self._part):
            self._part.parent.mkdir(parents=True, exist_ok=True)
            self._output = Hdf5Output(self._part)
            with self._output.refusals():
                self._group = self._output.file.create_group(name)
                self._group.attrs.update(attributes)

    def add(self, encoded: EncodedFlow) -> None:
        """Append the next pairs."""
        with storage_errors(self._part), self._output.refusals():
            if encoded.floats is not None:
                data = self._grown("flow", encoded.floats.shape, np.float32)
                data[-len(encoded) :] = encoded.floats
                return
            for axis, planes in zip(("flow_x", "flow_y"), zip(*encoded.jpegs, strict=True), strict=True):
                data = self._grown(axis, (len(planes),), h5py.vlen_dtype(np.uint8))
                # One by one: h5py takes rows that happen to be equally long for a table, and refuses it.
                for row, plane in enumerate(planes, start=len(data) - len(planes)):
                    data[row] = np.frombuffer(plane, np.uint8)

    def _grown(self, name: str, more: tuple[int, ...], dtype: Any) -> Any:
        """Return the data set of a name, made where it is not there, with room for `more` at its end."""
        if name not in self._group:
            shape = (0, *more[1:])
            chunk = (1, *more[1:]) if len(more) > 1 else (256,)
            self._group.create_dataset(name, shape=shape, maxshape=(None, *shape[1:]), dtype=dtype, chunks=chunk)
        data = self._group[name]
        data.resize(len(data) + more[0], axis=0)
        return data

    def finish(self) -> None:
        """Move the file into place."""
        with storage_errors(self._target):
            self._output.close()
            _place(self._part, self._target)

    def abandon(self) -> None:
        """Remove what was gathered."""
        self._output.abandon()
        with suppress(OSError):
            self._part.unlink(missing_ok=True)


def _place(part: Path, target: Path) -> None:
    """Move a whole file into place, to last."""
    sync_file(part)
    target.parent.mkdir(parents=True, exist_ok=True)
    _move(part, target)
    sync_directory(target.parent)


def _move(part: Path, target: Path) -> None:
    """Move a file or folder into place in one step, also where a folder of results is a link to another disk."""
    try:
        part.rename(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        beside = target.with_name(TEMPORARY.replace("*", uuid.uuid4().hex[:16]))
        try:
            (shutil.copytree if part.is_dir() else shutil.copyfile)(part, beside)
            beside.rename(target)
        except OSError:
            shutil.rmtree(beside, ignore_errors=True)
            beside.unlink(missing_ok=True)
            raise
