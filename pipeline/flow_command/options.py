"""What `mmkd-cache flow` was asked for: what is computed and stored, of which videos, where and by what."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mmkd.cache_tools.frames.records import IntArray, UInt8Array, VideoFacts
from mmkd.cache_tools.frames.source import frame_interval_seconds
from mmkd.data_manifests.errors import InputError
from mmkd.data_manifests.video_files import PLAIN, Naming
from mmkd.pipeline.flow.conventions import (
    I3D_BOUND_PX,
    I3D_FPS,
    denseflow_size,
    epic_size,
    frames_at_rate,
    grey_then_resize,
    resize_bicubic,
    resize_bilinear,
    resize_then_grey,
    short_side_size,
)
from mmkd.pipeline.flow.file_names import LAYOUTS
from mmkd.pipeline.flow.flow_method import FlowMethod

MOST_PX = 16384
"""Pixels, or frames, that an option may ask for at most: more than any video has."""
SHORT_SIDES = {"epic": 256, "i3d": 256}
"""Layouts whose frames have a short side by their convention; the others keep the video's size."""


def is_one_file(out: Path) -> bool:
    """Return whether an output is one HDF5 file, and not a folder."""
    return out.suffix.lower() in (".h5", ".hdf5")


@dataclass(frozen=True, kw_only=True)
class FlowOptions:
    """What is computed and how it is stored; what could change a byte of the result."""

    layout: str = "denseflow"
    """One of `LAYOUTS`: coding, geometry and names."""
    method: FlowMethod = field(default_factory=FlowMethod)
    """How flow is computed."""
    step: int = 1
    """Frames from a pair's first to its second frame; negative: backwards."""
    stride: int = 1
    """Frames from a pair to the next; EPIC's alone."""
    bound_px: int = 20
    """Flow of this many pixels and more is the code 255."""
    new_short: int = 0
    """Short side of the frames, 0: the layout's own."""
    new_width: int = 0
    """Width of the frames, 0: in proportion."""
    new_height: int = 0
    """Height likewise."""
    enlarge: bool = False
    """Whether frames that are smaller than the short side are enlarged to it, as EPIC's tool and I3D do."""

    def __post_init__(self) -> None:
        """Raise InputError, naming the option, for what a layout cannot hold."""
        if self.layout not in LAYOUTS:
            raise InputError(f"--layout {self.layout!r} is not one of {', '.join(LAYOUTS)}")
        if self.step == 0 or self.stride < 1:
            raise InputError("--step must not be 0, and --stride at least 1")
        if self.stride != 1 and self.layout != "epic":
            raise InputError(f"--stride is EPIC's; the layout {self.layout} has no place for it")
        if self.step < 0 and self.layout in ("epic", "mmaction"):
            raise InputError(f"--step {self.step}: file names of {self.layout} cannot tell backward flow")
        if self.layout == "i3d" and self.bound_px != I3D_BOUND_PX:
            raise InputError(f"--bound {self.bound_px}: I3D's flow is clipped to {I3D_BOUND_PX} px")
        if (self.new_width or self.new_height) and (self.new_short or self.layout in SHORT_SIDES):
            raise InputError("--new-width and --new-height exclude --short-side and the layouts epic and i3d")
        if self.enlarge and not (self.new_short or self.layout in SHORT_SIDES):
            raise InputError("--enlarge needs --short-side, or a layout that has one (epic, i3d)")
        for option, value, least in (
            ("--bound", self.bound_px, 1),
            ("--step", abs(self.step), 1),
            ("--stride", self.stride, 1),
            ("--short-side", self.new_short, 0),
            ("--new-width", self.new_width, 0),
            ("--new-height", self.new_height, 0),
        ):
            if not least <= value <= MOST_PX:
                raise InputError(f"{option} {value}: from {least} to {MOST_PX}")

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Return the (width, height) at which the flow of a video of this size is computed."""
        short_side = self.new_short or SHORT_SIDES.get(self.layout, 0)
        if short_side and not self.enlarge:
            short_side = min(short_side, width, height)
        if self.layout == "epic":
            return epic_size(width, height, short_side=short_side)
        if self.layout == "i3d" or self.enlarge:
            return short_side_size(width, height, short_side)
        return denseflow_size(
            width, height, new_short=self.new_short, new_width=self.new_width, new_height=self.new_height
        )

    def sequence(self, facts: VideoFacts) -> IntArray:
        """Return the frames that are paired, in order, repeats included: all of them, for I3D at 25 a second."""
        if self.layout == "i3d":
            end_seconds = float(facts.times_seconds[-1]) + frame_interval_seconds(facts)
            return frames_at_rate(facts.times_seconds, I3D_FPS, end_seconds=end_seconds)
        return np.arange(facts.frame_count)

    def prepare(self, frame: UInt8Array, size: tuple[int, int]) -> UInt8Array:
        """Turn a decoded RGB frame into what the method takes: grey (h, w), or for RAFT RGB (h, w, 3)."""
        if self.method.takes_colour:
            return (resize_bicubic if self.layout == "epic" else resize_bilinear)(frame, size)
        return (resize_then_grey if self.layout == "epic" else grey_then_resize)(frame, size)


@dataclass(frozen=True, kw_only=True)
class FlowRequest:
    """One call of the command."""

    videos: tuple[str, ...]
    """Files, folders and `@LIST` files, as typed."""
    lists: tuple[Path, ...] = ()
    """Further files with a video's path on each line."""
    naming: Naming = PLAIN
    """How results are called after their videos."""
    out: Path
    """Folder, or one HDF5 file."""
    options: FlowOptions
    """What is computed and how it is stored."""
    device: str = "auto"
    """Where: auto, cpu, cuda or cuda:N."""
    workers: int | None = None
    """Processes that decode and, on a CPU, compute; None: as many as there are cores."""
    preview: Path | None = None
    """Folder for a picture of each video."""
    task: tuple[int, int] = (0, 1)
    """(i, n) for run i of n that share the videos: where in their list it begins."""
