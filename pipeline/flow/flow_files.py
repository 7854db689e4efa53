"""Flow that a user has: read from files in place of being computed, by the same two calls as the scratch store.

    layout       a video's files                                      field of native frame i, at t seconds
    denseflow    flow_x_00000.jpg, flow_y_00000.jpg                   i
    mmaction     x_00001.jpg, y_00001.jpg                             i
    epic         u/frame_0000000001.jpg, v/..., a folder or a tar     i where there are as many as the video's own
                                                                      frames need, as `mmkd-cache flow` writes them;
                                                                      else t times the official rate: 60 a second,
                                                                      50 of PXX_1YY
    hdf5         flow_x, flow_y: pictures, of `mmkd-cache flow`       i
    i3d          NAME.npy, or `flow` in HDF5: floats of ±20 px / 20   the last that begins with i at 25 a second
    interleaved  h5[video][narration][2 k], [2 k + 1], the authors'   k = i from the segment's first frame

Where only every `stride`-th frame has a field (EPIC-55: 2), it is that of the frame before. Codes are 8 bits of
values within ±bound: v = code / 255 * 2 b - b, so that 128, the code of rest, is b / 255. Vectors stay in pixels of
the grid that they were computed on, per step of the sequence that they were computed on: I3D's in 1/25 s, whatever
the video's rate. What cannot be known from files: the bound, which the user states.
"""

import math
import re
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import h5py
import numpy as np

from mmkd.cache_tools.frames.clip_set import ClipVideo
from mmkd.cache_tools.frames.records import Float32Array, IntArray, VideoFacts
from mmkd.cache_tools.frames.source import frame_interval_seconds
from mmkd.cache_tools.frames.still_hdf5 import find_node, open_frames_file
from mmkd.data_manifests.counted import counted
from mmkd.data_manifests.errors import StorageError, VideoError
from mmkd.pipeline.flow.conventions import I3D_BOUND_PX, I3D_FPS, frames_at_rate
from mmkd.pipeline.flow.opened_flow import FolderFlow, Hdf5Floats, Hdf5Flow, NpyFlow, TarFlow, VideoFlow
from mmkd.pipeline.missing import FlowMissingError
from mmkd.pipeline.recipe import FlowFilesRecipe, FlowRecipe

KEPT_VIDEOS = 16
"""Videos whose files' list is kept in a process: clips of a long video follow each other."""
NOMINAL_TOLERANCE = 0.02
"""Share by which the number of official frames may miss duration times nominal rate."""
ASPECT_SLACK_PX, ASPECT_TOLERANCE = 2, 0.02
"""By how much a field's sides may miss the frames' proportion: pixels that tools round away, or a share."""
LAST_FIELDS = 3
"""Fields that may be missing at the end beside those of the step: the last one that is there stands for them."""

_KEPT: "OrderedDict[tuple[object, ...], VideoFlow]" = OrderedDict()


@dataclass(frozen=True)
class FlowFiles:
    """Flow of a data set's videos, as a user has it. Nothing is held open, so it can be sent to workers."""

    files: FlowFilesRecipe
    """Where it lies, and what its codes mean."""
    recipe: FlowRecipe
    """The recipe that it stands in."""

    def has(self, item: ClipVideo) -> bool:
        """Return whether the clip's flow is there and fits its video."""
        try:
            self.check(item)
        except FlowMissingError:
            return False
        return True

    def check(self, item: ClipVideo) -> str:
        """Return the identity of the flow of a clip's video; FlowMissingError says what is missing or does not
        fit."""
        flow = self._open(item)
        check_count(flow.count, item, self.files, self.recipe.step)
        with self._faults(item):
            check_aspect(flow.size(0), item)
            return flow.identity()

    def check_sizes(self, item: ClipVideo) -> str:
        """Return what `check` did in earlier versions, for the caches that they made."""
        flow = self._open(item)
        check_count(flow.count, item, self.files, self.recipe.step)
        with self._faults(item):
            return flow.identity_by_sizes()

    def source_of(self, item: ClipVideo) -> str:
        """Return what clips of the same flow files have in common: their video, in `interleaved` themselves."""
        return f"{item.clip.video} {item.clip.clip_id if self.files.layout == 'interleaved' else ''}"

    def read(self, item: ClipVideo, starts: IntArray) -> Float32Array:
        """Return the fields (T, 2, h, w) of the pairs that begin at `starts`, which may repeat, in pixels.

        Raises FlowMissingError where one is missing, damaged or of another size, StorageError for the machine's
        faults.
        """
        flow = self._open(item)
        check_count(flow.count, item, self.files, self.recipe.step)
        by_frame = is_by_frame(flow.count, item, self.files, self.recipe.step)
        fields = field_numbers(starts, item, self.files, by_frame=by_frame)
        if (last := int(fields.max())) >= flow.count + LAST_FIELDS + self.recipe.step:
            raise FlowMissingError(f"its flow ends with field {flow.count - 1}; this clip needs field {last}")
        fields = fields.clip(0, flow.count - 1)
        bound_px = self.files.bound_px or I3D_BOUND_PX
        with self._faults(item):
            read = {field: flow.read(field, bound_px=bound_px) for field in np.unique(fields).tolist()}
            values: Float32Array = np.stack([read[field] for field in fields.tolist()])
            check_aspect((values.shape[3], values.shape[2]), item)
        return values

    def _open(self, item: ClipVideo) -> VideoFlow:
        video, clip = item.clip.video, item.clip.clip_id
        with self._faults(item):
            if self.files.path.is_file():
                names = hdf5_names(video, clip) if self.files.layout == "interleaved" else places_of(video)
                return hdf5_flow(first_node(self.files.path, names), self.files.layout)
            path = first_path(self.files.path, video, self.files.layout)
            found = path.stat()
            key = (path, self.files.layout, self.recipe.step, found.st_size, found.st_mtime_ns, found.st_ino)
            if key not in _KEPT:
                _KEPT[key] = open_path(path, video, self.files.layout, self.recipe.step)
                while len(_KEPT) > KEPT_VIDEOS:
                    _KEPT.popitem(last=False)
            return _KEPT[key]

    def _faults(self, item: ClipVideo) -> "_Faults":
        return _Faults(item.clip.video, self.files.path)


class _Faults:
    """Tell the machine's faults from the flow's while it is read."""

    def __init__(self, video: str, path: Path) -> None:
        self._video, self._path = video, path

    def __enter__(self) -> None:
        """Begin."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Raise what the error amounts to."""
        if isinstance(error, FlowMissingError | StorageError):
            return
        if isinstance(error, FileNotFoundError | NotADirectoryError | KeyError | ValueError | VideoError):
            raise FlowMissingError(f"no flow that can be read: {error}") from error
        if isinstance(error, OSError):
            raise StorageError(f"cannot read the flow of {self._video} in {self._path}: {error.strerror or error}")


def places_of(video: str) -> list[str]:
    """Return under which names a video's flow is looked for: its path without ending, EPIC's folder, its name."""
    path = PurePosixPath(video).with_suffix("")
    return list(dict.fromkeys((str(path), f"{path.parts[0]}/flow_frames/{path.name}", path.name, video)))


def hdf5_names(video: str, clip: str) -> list[str]:
    """Return under which names the authors' file has a segment: video and narration, or the video alone."""
    path = PurePosixPath(video).with_suffix("")
    return list(dict.fromkeys((f"{path.name}/{clip}", f"{path.parent.name}/{clip}", str(path), path.name)))


def first_node(path: Path, names: Iterable[str]) -> Any:
    """Return the group of the first name that an HDF5 file has; VideoError where it has none."""
    file = open_frames_file(path)
    for name in names:
        node = find_node(file, name)
        if isinstance(node, h5py.Group):
            return node
    raise VideoError(f"{path.name} holds none of {', '.join(names)}")


def first_path(root: Path, video: str, layout: str) -> Path:
    """Return the folder, archive or HDF5 file of a video's flow; VideoError where there is none."""
    endings = {"epic": ("", ".tar"), "hdf5": (".h5",), "interleaved": (".h5",), "i3d": (".npy", ".h5")}.get(
        layout, ("",)
    )
    for place in places_of(video):
        for ending in endings:
            path = root / f"{place}{ending}"
            if path.is_file() if ending else path.is_dir():
                return path
    raise VideoError(f"{root} holds none of {', '.join(f'{place}{endings[0]}' for place in places_of(video)[:3])}")


def open_path(path: Path, video: str, layout: str, step: int) -> VideoFlow:
    """Open one video's flow."""
    if path.suffix == ".tar":
        return TarFlow(path)
    if path.suffix == ".npy":
        return NpyFlow(path)
    if path.suffix == ".h5":
        return hdf5_flow(first_node(path, [*places_of(video), PurePosixPath(video).stem]), layout)
    return FolderFlow(path, layout, step)


def hdf5_flow(node: Any, layout: str) -> VideoFlow:
    """Open a video's group in an HDF5 file."""
    return Hdf5Floats(node) if layout == "i3d" else Hdf5Flow(node)


def nominal_rate(video: str) -> float:
    """Return the rate that official numbers of an EPIC video count: 60 of P01_01, 50 of P01_101."""
    return 50.0 if re.search(r"P\d\d_1\d\d(?!\d)", PurePosixPath(video).name) else 60.0


def is_by_frame(count: int, item: ClipVideo, files: FlowFilesRecipe, step: int) -> bool:
    """Return whether a video in EPIC's layout has a field for each native frame, and not for each official one.

    Official frames of a video at 59.94 a second are .1 % more. Where both counts are within one, so are the fields.
    """
    pairs = max(0, item.video.frame_count - step)
    return abs(count - math.ceil(pairs / files.stride)) <= 1


def field_numbers(starts: IntArray, item: ClipVideo, files: FlowFilesRecipe, *, by_frame: bool = False) -> IntArray:
    """Return which field of a video each native frame has; `by_frame` as `is_by_frame` found."""
    if files.layout == "epic" and not by_frame:
        frames = np.floor(item.video.times_seconds[starts] * nominal_rate(item.clip.video) + 0.5).astype(np.int64)
    elif files.layout == "interleaved":
        frames = starts - item.facts.first_frame
    elif files.layout == "i3d":
        # of the fields that begin with one frame, shown twice at 25 a second, the last leads to the next frame
        frames = np.searchsorted(frames_for_i3d(item.video), starts, side="right") - 1
    else:
        frames = starts
    return np.asarray(frames // files.stride, np.int64)


def frames_for_i3d(facts: VideoFacts) -> IntArray:
    """Return the native frame shown at each tick of 25 a second, as `mmkd-cache flow --layout i3d` pairs them."""
    return frames_at_rate(
        facts.times_seconds, I3D_FPS, end_seconds=float(facts.times_seconds[-1]) + frame_interval_seconds(facts)
    )


def check_aspect(size: tuple[int, int], item: ClipVideo) -> None:
    """Raise FlowMissingError for fields of another proportion than the frames: they are of other pictures.

    Tools round sides to even numbers, downwards; 340 x 256 of 4:3 is such, 340 x 256 of 16:9 is not.
    """
    (width, height), facts = size, item.facts
    off = abs(width * facts.height - height * facts.width)
    if off > max(ASPECT_SLACK_PX * (facts.width + facts.height), ASPECT_TOLERANCE * width * facts.height):
        raise FlowMissingError(
            f"fields of {width} x {height} of a video of {facts.width} x {facts.height}: their proportions differ, "
            "so they show something else, or were stretched"
        )


def check_count(count: int, item: ClipVideo, files: FlowFilesRecipe, step: int) -> None:
    """Raise FlowMissingError, which says which and why, unless there are as many fields as the frames need."""
    if files.layout == "epic":
        if is_by_frame(count, item, files, step):
            return
        rate = nominal_rate(item.clip.video)
        frames = (float(item.video.times_seconds[-1]) + 1 / rate) * rate
        slack, said = frames * NOMINAL_TOLERANCE + 2 + step, f"{frames:.0f} frames at the nominal {rate:g} a second"
    elif files.layout == "i3d":
        frames = float(len(frames_for_i3d(item.video)))
        slack, said = 1.0 + step, f"{frames:.0f} frames at 25 a second"
    else:
        frames = float(item.facts.frame_count if files.layout == "interleaved" else item.video.frame_count)
        slack, said = 1.0 * step, counted(int(frames), "frame")
    wanted = (frames - step) / files.stride
    if abs(count - wanted) <= slack / files.stride + (1 if files.stride > 1 else 0):
        return
    other = {1: 2, 2: 1}.get(files.stride, 1)
    fits = abs(count - (frames - step) / other) <= slack / other + 1
    hint = f": is it flow.files.stride={other}?" if fits else ""
    raise FlowMissingError(
        f"{counted(count, 'field')} of flow, where {said} at step {step} and stride {files.stride} need "
        f"{wanted:.0f}{hint}"
    )
