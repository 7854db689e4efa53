"""Where the flow command writes: which videos are done, with which parameters, in a folder or one HDF5 file.

OUT/mmkd-flow.json        parameters and versions; another run with other parameters is refused
OUT/NAME...               the layout's files of each video
OUT/.done/NAME            written last (as denseflow's marker, which is empty): pairs and the video's identity
OUT.h5                    the same as one file, from OUT.h5.parts, which takes as much space until it is done
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import h5py

from mmkd.data_manifests.atomic import write_atomically
from mmkd.data_manifests.errors import InputError, StorageError
from mmkd.pipeline.flow_blocks import FlowOptions, VideoPlan
from mmkd.pipeline.flow_conventions import NAMES, FlowName, pair_number
from mmkd.pipeline.flow_files import PARTS, FlowWriter, Hdf5Writer, JpegFolderWriter, NpyWriter, storage_errors

PARAMETERS, DONE = "mmkd-flow.json", ".done"
FILE_SUFFIXES = (".h5", ".hdf5")
ATTRIBUTE = "mmkd"
"""Name of the HDF5 attribute that holds parameters (of the file) or a record (of a video's group), as JSON."""


@dataclass(frozen=True)
class DoneVideo:
    """The record of a video whose flow is whole."""

    pairs: int
    """Number of flow fields."""
    stamp: str
    """Size and time of change of the video file."""
    identity: str
    """Hash of the video's packets, which a copy shares."""


class FlowOutput:
    """A folder of results, or one HDF5 file that is gathered at the end."""

    def __init__(self, out: Path, options: FlowOptions, computed_by: str) -> None:
        """Open or start the output; raise InputError when it holds flow of other parameters.

        Devices and paths round differently, so one output is `computed_by` one of them.
        """
        self.out = out
        self.is_file = out.suffix.lower() in FILE_SUFFIXES
        if self.is_file and options.layout not in ("hdf5", "i3d"):
            raise InputError(f"-o {out}: the layout {options.layout} needs a folder; one file holds hdf5 or i3d")
        self.folder = out.with_name(out.name + ".parts") if self.is_file else out
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"-o {self.folder} is a file; name a folder, or a file that ends in .h5")
        self._options = options
        self._identity = options_identity(options) | {"computed_by": computed_by}
        self._in_file = self._read_file()
        self._check_parameters(self.folder / PARAMETERS)

    def done(self, name: str) -> DoneVideo | None:
        """Return the record of a video whose flow is there, or None."""
        marker = self.folder / DONE / name
        if not marker.is_file():
            return self._in_file.get(name)
        try:
            record = DoneVideo(**json.loads(marker.read_bytes()))
        except (ValueError, TypeError) as error:
            raise InputError(
                f"{marker} is not of this program: {self.folder} holds other flow; name another folder"
            ) from error
        return record if all(path.exists() for path in self._ends(name, record.pairs)) else None

    def writer(self, plan: VideoPlan, record: DoneVideo) -> FlowWriter:
        """Return the writer of a video's flow."""
        options = self._options
        if options.layout in NAMES:
            return JpegFolderWriter(self.folder, plan.name, layout=options.layout, step=options.step)
        if options.layout == "i3d" and not self.is_file:
            return NpyWriter(self.folder, plan.name, pairs=len(plan.pairs))
        attributes = {"bound_px": options.bound_px, "step": options.step, "layout": options.layout}
        attributes |= {"width": plan.size[0], "height": plan.size[1], ATTRIBUTE: json.dumps(asdict(record))}
        return Hdf5Writer(self.folder, plan.name, attributes=attributes)

    def mark(self, name: str, record: DoneVideo) -> None:
        """Note that a video's flow is whole: the last thing written of it."""
        write_atomically(self.folder / DONE / name, json.dumps(asdict(record)).encode() + b"\n")

    def close(self, *, gather: bool) -> None:
        """Remove the empty folder of parts; with `gather` put the videos that are done into the one file."""
        parts = self.folder / PARTS
        if parts.is_dir():
            for folder, _, files in os.walk(parts, topdown=False):
                if not files and not any(Path(folder).iterdir()):
                    Path(folder).rmdir()
        if gather and self.is_file:
            self._gather()

    def _ends(self, name: str, pairs: int) -> list[Path]:
        """Return the first and the last file of a video's flow."""
        options = self._options
        if options.layout not in NAMES:
            return [self.folder / f"{name}{'.npy' if options.layout == 'i3d' and not self.is_file else '.h5'}"]
        make, _ = NAMES[options.layout]
        numbers = (pair_number(options.layout, pair, options.step) for pair in (0, pairs - 1))
        names = (make(FlowName(axis, number, options.step)) for number in numbers for axis in ("x", "y"))
        return [self.folder / name / file for file in names]

    def _check_parameters(self, path: Path) -> None:
        if path.is_file():
            try:
                stored = json.loads(path.read_bytes())["parameters"]
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{path} is damaged; name another folder, or delete this one") from error
            self._refuse_others(stored, self.folder)
        elif not self._in_file and (self.folder / DONE).is_dir() and any((self.folder / DONE).iterdir()):
            raise InputError(f"{self.folder} holds flow of another program; name another folder")
        else:
            versions = {name: version(name) for name in ("mmkd", "torch", "numpy", "av")}
            text = json.dumps({"parameters": self._identity, "versions": versions}, indent=1)
            write_atomically(path, text.encode() + b"\n")

    def _refuse_others(self, stored: Any, where: Path) -> None:
        changed = [
            f"{key} {stored.get(key)!r}, now {value!r}"
            for key, value in self._identity.items()
            if stored.get(key) != value
        ]
        if changed:
            raise InputError(f"{where} holds flow of other parameters ({'; '.join(changed)}); name another -o")

    def _read_file(self) -> dict[str, DoneVideo]:
        """Return the records of the videos that the one file holds."""
        if not (self.is_file and self.out.exists()):
            return {}
        found: dict[str, DoneVideo] = {}

        def visit(name: str, item: Any) -> None:
            if isinstance(item, h5py.Group) and ATTRIBUTE in item.attrs:
                found[name] = DoneVideo(**json.loads(item.attrs[ATTRIBUTE]))

        try:
            with h5py.File(self.out, "r") as file:
                stored = json.loads(file.attrs[ATTRIBUTE])
                file.visititems(visit)
        except (OSError, KeyError, ValueError, TypeError) as error:
            raise InputError(f"-o {self.out} is not an HDF5 file of this command; name another file") from error
        self._refuse_others(stored, self.out)
        return found

    def _gather(self) -> None:
        """Copy the parts beside the old file's videos into a new file, move it into place, delete the parts."""
        marked = sorted(path for path in (self.folder / DONE).rglob("*") if path.is_file())
        names = [path.relative_to(self.folder / DONE).as_posix() for path in marked]
        temporary = self.out.with_name(f".{self.out.name}.tmp")
        with storage_errors(self.out):
            if names:
                temporary.unlink(missing_ok=True)
                if self.out.exists():
                    shutil.copyfile(self.out, temporary)
                with h5py.File(temporary, "a") as file:
                    file.attrs[ATTRIBUTE] = json.dumps(self._identity)
                    for name in names:
                        _copy_group(self.folder / f"{name}.h5", name, file)
                with temporary.open("rb") as whole:
                    os.fsync(whole.fileno())
                temporary.replace(self.out)
            shutil.rmtree(self.folder)


def _copy_group(part: Path, name: str, file: Any) -> None:
    try:
        with h5py.File(part, "r") as source:
            if name in file:
                del file[name]
            source.copy(source[name], file, name=name)
    except KeyError as error:
        raise StorageError(f"{part} is damaged; delete {part.parent} and run again") from error


def options_identity(options: FlowOptions) -> dict[str, Any]:
    """Return everything that could change a byte of the result, as JSON."""
    known = {key: value for key, value in vars(options).items() if key != "method"}
    return known | options.method.identity()
