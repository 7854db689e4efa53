"""Where the flow command writes: which videos are done, with which parameters, in a folder or one HDF5 file.

OUT/mmkd-flow.json        parameters and versions; another run with other parameters is refused
OUT/NAME...               the layout's files of each video
OUT/.done/NAME            written last (as denseflow's marker, which is empty): pairs and the video's identity
OUT/.part/                who is at work, and what is not whole yet (mmkd.pipeline.flow_command.claims)
OUT.h5                    the same as one file, from OUT.h5.parts, which takes as much space until it is done

A video is done when its marker is there and so are all the files that the marker counts. Several runs share the
work on a folder, video by video; one file has one writer.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import h5py

from mmkd.cache_tools.storage.hdf5_file import writing_hdf5
from mmkd.data_manifests.atomic import TEMPORARY, storage_errors, sync_directory, sync_file, write_atomically
from mmkd.data_manifests.errors import InputError, StorageError
from mmkd.data_manifests.regular_file import read_regular
from mmkd.pipeline.flow.file_names import LAYOUTS, NAMES
from mmkd.pipeline.flow_command.blocks import VideoPlan
from mmkd.pipeline.flow_command.claims import WHOLE, FlowClaims, Holder, create_once
from mmkd.pipeline.flow_command.options import SHORT_SIDES, FlowOptions, is_one_file
from mmkd.pipeline.flow_command.writers import (
    FlowWriter,
    Hdf5Writer,
    JpegFolderWriter,
    NpyWriter,
    flow_files,
    jpeg_names,
    lacks_any,
)

PARAMETERS, DONE, PARTS = "mmkd-flow.json", ".done", ".part"
ATTRIBUTE = "mmkd"
"""Name of the HDF5 attribute that holds parameters (of the file) or a record (of a video's group), as JSON."""

OLD_VALUES = {layout: {"enlarge": layout in SHORT_SIDES} for layout in LAYOUTS}
"""Layout -> what outputs that do not state a parameter were made with."""


@dataclass(frozen=True)
class DoneVideo:
    """The record of a video whose flow is whole."""

    pairs: int
    """Number of flow fields."""
    stamp: str
    """Size and time of change of the video file."""
    identity: str
    """Hash of the video's packets, which a copy shares."""
    size_bytes: int | None = None
    """Size of its file in a layout of one file a video; None for folders, and where an older run made it."""

    def to_json(self) -> str:
        """Return the record as a text."""
        return json.dumps({key: value for key, value in asdict(self).items() if value is not None})


class FlowOutput:
    """A folder of results, or one HDF5 file that is gathered at the end."""

    def __init__(self, out: Path, options: FlowOptions, computed_by: str, *, names: Iterable[str] = ()) -> None:
        """Open or start the output; raise InputError when it holds flow of other parameters.

        Devices and paths round differently, so one output is `computed_by` one of them. A folder is not started
        where another program's flow of one of the videos `names` lies.
        """
        self.out = out
        self.is_file = is_one_file(out)
        if self.is_file and options.layout not in ("hdf5", "i3d"):
            raise InputError(f"-o {out}: the layout {options.layout} needs a folder; one file holds hdf5 or i3d")
        self.folder = out.with_name(out.name + ".parts") if self.is_file else out
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"-o {self.folder} is a file; name a folder, or a file that ends in .h5")
        self._options = options
        self._identity = options_identity(options) | {"computed_by": computed_by}
        self._claims = FlowClaims(self.folder / PARTS)
        self._in_file = self._read_file()
        self._check_parameters(write=not self.is_file, names=names)

    def done(self, name: str) -> DoneVideo | None:
        """Return the record of a video whose flow is there, every file that the record counts, or None."""
        marker = self.folder / DONE / name
        try:
            record = DoneVideo(**json.loads(read_regular(marker)))
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return self._in_file.get(name)
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:  # writing will say so
                return None
            raise StorageError(f"cannot read {marker}: {error.strerror}; fix that and run again") from error
        except (ValueError, TypeError) as error:
            raise InputError(
                f"{marker} is not of this program: {self.folder} holds other flow; name another folder"
            ) from error
        return record if self._is_whole(name, record) else self._in_file.get(name)

    def take(self, name: str) -> Holder | None:
        """Claim a video; return None when this run may compute it, else the run that does."""
        if self.is_file:
            self.take_whole()
            return None
        return self._claims.take(name)

    def take_whole(self) -> None:
        """Claim the one file; raise InputError, saying who holds it, when another run writes into it."""
        holder = self._claims.take(WHOLE)
        if holder is not None:
            raise InputError(
                f"-o {self.out} is being written by another run ({holder}); wait until it ends, or stop it, or "
                "name another file: a folder can be shared by several runs, one file cannot"
            )
        self._check_parameters(write=True)
        self._in_file = self._read_file()  # the other one may have ended since

    def release(self, name: str) -> None:
        """Give up the claim on a video."""
        if not self.is_file:
            self._claims.release(name)

    def writer(self, plan: VideoPlan, record: DoneVideo) -> FlowWriter:
        """Return the writer of a video's flow; VideoError when its name does not fit the layout."""
        options, target = self._options, self._target(plan.name)
        if options.layout in NAMES:
            return JpegFolderWriter(target, self._claims.part(), layout=options.layout, step=options.step)
        if target.suffix == ".npy":
            return NpyWriter(target, self._claims.part(".npy"), pairs=len(plan.pairs))
        attributes = {"bound_px": options.bound_px, "step": options.step, "layout": options.layout}
        attributes |= {"width": plan.size[0], "height": plan.size[1], ATTRIBUTE: record.to_json()}
        return Hdf5Writer(target, self._claims.part(".h5"), plan.name, attributes=attributes)

    def finish(self, name: str, writer: FlowWriter, record: DoneVideo) -> bool:
        """Move a video's flow into place and mark it; False, and nothing moved, when another run took it over."""
        if not self._claims.holds(WHOLE if self.is_file else name):
            return False
        marker, target = self.folder / DONE / name, self._target(name)
        with storage_errors(marker):
            marker.unlink(missing_ok=True)  # of the video as it was: it must not vouch for a mixture of both
        writer.finish()
        with storage_errors(target, verb="read"):
            size = None if self._options.layout in NAMES else target.stat().st_size
        self.mark(name, replace(record, size_bytes=size))
        return True

    def mark(self, name: str, record: DoneVideo) -> None:
        """Note that a video's flow is whole: the last thing written of it."""
        write_atomically(self.folder / DONE / name, record.to_json().encode() + b"\n")

    def close(self, *, gather: bool) -> None:
        """Leave; with `gather` put the videos that are done into the one file."""
        try:
            if gather and self.is_file:
                self._gather()
        finally:
            self._claims.end()
        if self.is_file:
            _remove_empty(self.folder)

    def _target(self, name: str) -> Path:
        if self._options.layout in NAMES:
            return self.folder / name
        return self.folder / f"{name}{'.npy' if self._options.layout == 'i3d' and not self.is_file else '.h5'}"

    def _is_whole(self, name: str, record: DoneVideo) -> bool:
        options, target = self._options, self._target(name)
        if options.layout in NAMES:
            return not lacks_any(target, jpeg_names(range(record.pairs), layout=options.layout, step=options.step))
        try:
            return record.size_bytes in (None, target.stat().st_size)
        except OSError:
            return False

    def _check_parameters(self, *, write: bool, names: Iterable[str] = ()) -> None:
        """Refuse a folder of other parameters or programs; with `write` state ours where none are."""
        path = self.folder / PARAMETERS
        if write and not path.is_file():
            if not self._in_file and (self.folder / DONE).is_dir() and any((self.folder / DONE).iterdir()):
                raise InputError(f"{self.folder} holds flow of another program; name another folder")
            foreign = next((name for name in names if self._holds_flow(name)), None)
            if foreign is not None and not path.is_file():  # else another run started, and has written since
                raise InputError(
                    f"{self._target(foreign)} holds flow that this command did not write; name another folder"
                )
            versions = {name: version(name) for name in ("mmkd", "torch", "numpy", "av")}
            text = json.dumps({"parameters": self._identity, "versions": versions}, indent=1)
            with storage_errors(path):
                self.folder.mkdir(parents=True, exist_ok=True)
                create_once(path, text.encode() + b"\n")
        if path.is_file():
            try:
                stored = json.loads(read_regular(path))["parameters"]
                self._refuse_others(stored, self.folder)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise InputError(f"{path} is damaged; name another folder, or delete this one") from error

    def _holds_flow(self, name: str) -> bool:
        """Return whether something lies where a video's flow would replace it."""
        options, target = self._options, self._target(name)
        if options.layout not in NAMES:
            return os.path.lexists(target)
        return any(True for _ in flow_files(target, layout=options.layout, step=options.step))

    def _refuse_others(self, stored: Any, where: Path) -> None:
        known = OLD_VALUES.get(self._options.layout, {}) | stored
        changed = [
            f"{key} {known.get(key)!r}, now {value!r}"
            for key, value in self._identity.items()
            if known.get(key) != value
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
        names = [name for name in self._marked() if (record := self.done(name)) and self._is_whole(name, record)]
        if not names:
            if self.folder.exists() and self._claims.take(WHOLE) is None:  # what a killed run left
                self._remove_parts([])
            return
        self.take_whole()
        temporary, is_new = self._claims.part(".h5"), not self.out.exists()
        with storage_errors(self.out):
            # A copy, since HDF5 written in place is lost when the process is killed.
            if not is_new:
                shutil.copyfile(self.out, temporary)
            with writing_hdf5(temporary, "w" if is_new else "r+") as output:
                output.file.attrs[ATTRIBUTE] = json.dumps(self._identity)
                for name in names:
                    _copy_group(self._target(name), name, output.file)
                    output.check()
            sync_file(temporary)
            temporary.replace(self.out)
            sync_directory(self.out.parent)
        self._remove_parts(names)

    def _marked(self) -> list[str]:
        folder = self.folder / DONE
        marked = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        return [path.as_posix() for path in marked if not path.name.startswith(".")]  # temporary ones do

    def _remove_parts(self, names: Iterable[str]) -> None:
        """Delete what is in the one file now, each marker before its part and the parameters last.

        So a run that is killed anywhere in between leaves what the next one understands.
        """
        with storage_errors(self.folder):
            for name in names:
                (self.folder / DONE / name).unlink(missing_ok=True)
                self._target(name).unlink(missing_ok=True)
            marked = {self._target(name) for name in self._marked()}
            for path in [*self.folder.rglob(TEMPORARY), *self.folder.rglob("*.h5")]:
                if path not in marked and self._claims.folder not in path.parents:
                    path.unlink(missing_ok=True)  # a killed run's: this one is alone here
            if not marked:
                (self.folder / PARAMETERS).unlink(missing_ok=True)


def _remove_empty(top: Path) -> None:
    """Remove a folder and those in it, as far as they are empty."""
    for folder, _, _ in os.walk(top, topdown=False):
        with suppress(OSError):
            Path(folder).rmdir()


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
