"""The flow files of one video, opened: how many fields there are, a field in pixels, and what tells them apart.

JPEG or PNG pictures of 8-bit codes in a folder, a tar or an HDF5 file, or the floats of I3D. Nothing is unpickled,
and no field is held: each is read where it lies.
"""

import hashlib
from abc import ABC, abstractmethod
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from mmkd.cache_tools.frames.records import Float32Array
from mmkd.cache_tools.frames.still_files import tar_members
from mmkd.cache_tools.frames.still_hdf5 import inside, list_of_pictures, own_picture, picture_bytes, stored_here
from mmkd.cache_tools.frames.stills import still_size
from mmkd.data_manifests.regular_file import open_regular, read_regular
from mmkd.pipeline.flow.conventions import codes_of_jpeg, flow_of_codes, flow_of_i3d
from mmkd.pipeline.flow.file_names import NAMES, FlowName, pair_number

MAX_FIELD_PIXELS = 2**26
SAMPLED_FIELDS = 5
"""Fields of a video whose bytes its identity covers: the first, the last, and others evenly between them."""


class VideoFlow(ABC):
    """The fields of one video, opened."""

    count: int
    """How many there are."""

    @abstractmethod
    def planes(self, field: int) -> tuple[bytes, ...]:
        """Return what is stored of a field, pictures of u and v; KeyError, ValueError or OSError without it."""

    def size(self, field: int) -> tuple[int, int]:
        """Return the (width, height) that a field states; ValueError or VideoError where it states none."""
        size = still_size(self.planes(field)[0])
        return size.width, size.height

    def read(self, field: int, *, bound_px: float) -> Float32Array:
        """Return a field (2, h, w) in pixels, `bound_px` being what 8-bit codes mean; raises what `planes` does."""
        codes = np.stack([codes_of_jpeg(bounded(part)) for part in self.planes(field)])
        values: Float32Array = flow_of_codes(torch.from_numpy(codes), bound_px=bound_px).numpy()
        return values

    def identity(self) -> str:
        """Return a hash of how many fields there are, and of all bytes of `SAMPLED_FIELDS` of them."""
        found = hashlib.blake2b(str(self.count).encode(), digest_size=16)
        for field in np.linspace(0, self.count - 1, SAMPLED_FIELDS).round().astype(int).tolist():
            for part in self.planes(field):
                found.update(len(part).to_bytes(8, "little") + part)
        return found.hexdigest()

    def identity_by_sizes(self) -> str:
        """Return what `identity` was in earlier versions: other flow whose files are as large is not noticed."""
        sizes = [[len(part) for part in self.planes(field)] for field in (0, self.count // 2, self.count - 1)]
        return hashlib.blake2b(f"{self.count} {sizes}".encode(), digest_size=16).hexdigest()


class FloatFlow(VideoFlow):
    """Fields as I3D's float32 (H, W, 2), clipped to ±20 pixels and divided by 20."""

    shape: tuple[int, ...]
    """(pairs, H, W, 2)."""

    def check_form(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        """Keep the shape; ValueError where it is none of I3D's flow."""
        if len(shape) != 4 or shape[-1] != 2 or not all(shape) or dtype != np.dtype("<f4"):
            raise ValueError(f"I3D's flow is little-endian float32 (pairs, H, W, 2), not {dtype} {shape}")
        if shape[1] * shape[2] > MAX_FIELD_PIXELS:
            raise ValueError(f"a field of {shape[2]} x {shape[1]}; the limit is {MAX_FIELD_PIXELS} pixels")
        self.shape, self.count = shape, shape[0]

    def size(self, field: int) -> tuple[int, int]:
        """Return the (width, height) of every field."""
        return self.shape[2], self.shape[1]

    def read(self, field: int, *, bound_px: float) -> Float32Array:
        """Return a field (2, h, w) in pixels; ValueError where it is not within ±1, as I3D's is."""
        values = np.frombuffer(self.planes(field)[0], "<f4").reshape(self.shape[1:]).transpose(2, 0, 1)
        if not (np.abs(values) <= 1).all():  # nor where one is not a number
            raise ValueError("it has values beyond ±1; I3D's flow is clipped to ±20 pixels and divided by 20")
        flow: Float32Array = flow_of_i3d(torch.from_numpy(values.copy())).numpy()
        return flow


class NpyFlow(FloatFlow):
    """One .npy file, of which single fields are read."""

    def __init__(self, path: Path) -> None:
        """Read the header; ValueError where the file is of another form, or not whole."""
        self._path = path
        with open_regular(path) as file:
            version = np.lib.format.read_magic(file)
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            if version not in read:
                raise ValueError(f"an .npy file of version {version}")
            shape, is_fortran, dtype = read[version](file)
            if is_fortran:
                raise ValueError("its fields are stored column by column; write them in C order")
            self.check_form(shape, dtype)
            self._begin = file.tell()
        self._size = 4 * int(np.prod(shape[1:]))
        if path.stat().st_size < self._begin + self.count * self._size:
            raise ValueError("it is cut short")

    def planes(self, field: int) -> tuple[bytes, ...]:
        """Return the bytes of a field."""
        with open_regular(self._path) as file:
            file.seek(self._begin + field * self._size)
            data = file.read(self._size)
        if len(data) < self._size:
            raise ValueError("it is cut short")
        return (data,)


class Hdf5Floats(FloatFlow):
    """The dataset `flow` of a video's group in an HDF5 file."""

    def __init__(self, node: Any) -> None:
        """Take a video's group; ValueError where it is of another form."""
        if "flow" not in node:
            raise ValueError("its group holds no `flow`, I3D's floats")
        self._flow = inside(node, "flow")
        if not stored_here(self._flow):
            raise ValueError("its `flow` does not lie in the file itself")
        self.check_form(self._flow.shape, self._flow.dtype)

    def planes(self, field: int) -> tuple[bytes, ...]:
        """Return the bytes of a field."""
        return (self._flow[field].tobytes(),)


class FolderFlow(VideoFlow):
    """Files in a folder."""

    def __init__(self, folder: Path, layout: str, step: int) -> None:
        """Count the fields of a folder; ValueError where they have a gap."""
        self._folder, self._layout, self._step = folder, layout, step
        parse = NAMES[layout][1]
        found: dict[str, set[int]] = {"x": set(), "y": set()}
        for path in folder.rglob("*.jpg"):
            name = parse(path.relative_to(folder).as_posix())
            if name is not None and (name.step == step or layout != "denseflow"):
                found[name.axis].add(name.number)
        self.count = count_fields(found, pair_number(layout, 0, step))

    def planes(self, field: int) -> tuple[bytes, ...]:
        """Return the pictures of u and v of a field."""
        number, make = pair_number(self._layout, field, self._step), NAMES[self._layout][0]
        x, y = (read_regular(self._folder / make(FlowName(axis, number, self._step))) for axis in ("x", "y"))
        return x, y


class TarFlow(VideoFlow):
    """Files in a tar archive, in EPIC's layout."""

    def __init__(self, path: Path) -> None:
        """Read the archive's headers; VideoError where it is damaged, ValueError where fields have a gap."""
        self._path, self._places = path, dict[tuple[str, int], tuple[int, int]]()
        found: dict[str, set[int]] = {"x": set(), "y": set()}
        for member, place in tar_members(path).items():
            name = NAMES["epic"][1]("/".join(PurePosixPath(member).parts[-2:]))
            if name is not None:
                found[name.axis].add(name.number)
                self._places[name.axis, name.number] = place
        self.count = count_fields(found, 1)

    def planes(self, field: int) -> tuple[bytes, ...]:
        """Return the pictures of u and v of a field."""
        with open_regular(self._path) as file:
            parts = []
            for axis in ("x", "y"):
                begin, size = self._places[axis, field + 1]
                file.seek(begin)
                parts.append(file.read(size))
        return parts[0], parts[1]


class Hdf5Flow(VideoFlow):
    """Two lists of pictures in an HDF5 file, or the authors' group with u and v in turn."""

    def __init__(self, node: Any) -> None:
        """Take a video's group; ValueError where it is of no known form."""
        self._u = self._v = None
        if "flow_x" in node and "flow_y" in node:
            self._u, self._v = (list_of_pictures(inside(node, name), name) for name in ("flow_x", "flow_y"))
            self.count = int(self._u.shape[0])
            if self._v.shape != self._u.shape:
                raise ValueError("flow_x and flow_y have different lengths")
        else:
            numbers = sorted(int(name) for name in node if name.isdigit())
            if not numbers or numbers != list(range(len(numbers))) or len(numbers) % 2:
                raise ValueError(
                    "its group holds neither flow_x and flow_y nor pictures named 0, 1, 2, ... in pairs"
                )
            self.count = len(numbers) // 2
        self._node = node

    def planes(self, field: int) -> tuple[bytes, ...]:
        """Return the pictures of u and v of a field."""
        if self._u is not None and self._v is not None:
            return picture_bytes(self._u[field]), picture_bytes(self._v[field])
        return own_picture(self._node, str(2 * field)), own_picture(self._node, str(2 * field + 1))


def bounded(picture: bytes) -> bytes:
    """Return a picture's bytes; ValueError where it states a size that no field has."""
    size = still_size(picture)
    if size.width * size.height > MAX_FIELD_PIXELS:
        raise ValueError(f"a picture of {size.width} x {size.height}; the limit is {MAX_FIELD_PIXELS} pixels")
    return picture


def count_fields(found: dict[str, set[int]], first: int) -> int:
    """Return how many fields have both planes; ValueError where there is none, or a number is missing."""
    both = sorted(found["x"] & found["y"])
    if not both or len(both) != len(found["x"] | found["y"]):
        raise ValueError("no field of it has both planes" if not both else "a field lacks one of its planes")
    if both != list(range(first, first + len(both))):
        raise ValueError(f"its fields are not numbered from {first} without a gap")
    return len(both)
