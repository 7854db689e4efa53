"""A video as blocks of consecutive pairs: what one decoding process reads, and on a CPU computes and encodes.

Blocks bound the memory that a long video takes, show progress, and let several processes work on one video. They
overlap by the frames that their pairs share, and the values do not depend on where they are cut. Each block costs
decoding from the key frame before it.
"""

import errno
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mmkd.cache_tools.frames.records import (
    Float32Array,
    IntArray,
    UInt8Array,
    VideoFacts,
)
from mmkd.cache_tools.frames.source import VideoFiles, frame_interval_seconds
from mmkd.data_manifests.counted import counted
from mmkd.data_manifests.errors import InputError, StorageError, VideoError
from mmkd.data_manifests.system_errors import FULL
from mmkd.pipeline.flow.conventions import (
    I3D_BOUND_PX,
    I3D_FPS,
    Pairs,
    denseflow_size,
    epic_size,
    frames_at_rate,
    grey_then_resize,
    resize_bicubic,
    resize_bilinear,
    resize_then_grey,
    short_side_size,
)
from mmkd.pipeline.flow.methods import DIS_LEAST_SIDE, FlowMethod, sequence_flow
from mmkd.pipeline.flow_command.files import (
    LAYOUTS,
    EncodedFlow,
    encode_values,
    stored_values,
)

BLOCK_PIXELS_CPU, BLOCK_PIXELS_DEVICE = 2_800_000, 33_000_000
"""Pixels of one block's frames: 32 and 380 at 340x256. Larger: fewer frames decoded twice, more memory."""
LEAST_BLOCK, MOST_BLOCK = 16, 512
"""Pairs of a block at least and at most."""
MOST_PX = 16384
"""Pixels, or frames, that an option may ask for at most: more than any video has."""
SHORT_SIDES = {"epic": 256, "i3d": 256}
"""Layouts whose frames have a short side by their convention; the others keep the video's size."""

OF_ONE_NAME = frozenset(
    {
        errno.ENAMETOOLONG,
        errno.EILSEQ,
        errno.EINVAL,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.ELOOP,
        errno.EEXIST,
        errno.ENOTEMPTY,
    }
)
"""What the system says of a name that cannot be, or is taken: a fault of one result, whatever the disk is like."""


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


@dataclass(frozen=True)
class VideoPlan:
    """One video to be computed."""

    name: str
    """Name of its result below the output."""
    video: str
    """Its file, for the source."""
    facts: VideoFacts
    """What the probe found."""
    sequence: IntArray
    """(frames,) indices of the frames that are paired, in order."""
    pairs: Pairs
    """Which of them make pairs."""
    size: tuple[int, int]
    """Width and height of the flow."""


def plan_video(name: str, video: str, facts: VideoFacts, *, options: FlowOptions) -> VideoPlan:
    """Return the plan of a video; VideoError if it is too short for one pair."""
    sequence = options.sequence(facts)
    pairs = Pairs(len(sequence), step=options.step, stride=options.stride)
    if not len(pairs):
        raise VideoError(f"{counted(len(sequence), 'frame', ('holds', 'hold'))} no pair at step {options.step}")
    size = options.size(facts.width, facts.height)
    if options.method.name == "dis" and min(size) < DIS_LEAST_SIDE:
        raise VideoError(f"frames of {size[0]} x {size[1]} pixels; DIS needs {DIS_LEAST_SIDE}")
    return VideoPlan(name, video, facts, sequence, pairs, size)


@dataclass(frozen=True)
class FlowBlock:
    """Consecutive pairs of one video."""

    source: VideoFiles
    """Where its frames come from."""
    plan: VideoPlan
    """Its video, with a sequence of this block's frames alone, to keep the message to a process small."""
    options: FlowOptions
    """What is computed."""
    firsts: IntArray
    """(P,) positions of the pairs' first frames in the plan's sequence."""
    seconds: IntArray
    """(P,) positions of their second frames."""
    shown: tuple[int, ...]
    """Positions among the pairs that a preview shows."""
    compute: bool
    """Whether the process computes flow, or returns the frames for another device."""
    is_last: bool
    """Whether it ends its video."""

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.firsts)


@dataclass(frozen=True)
class ShownPair:
    """One pair for a preview."""

    frame_index: int
    """Index in the video of its first frame."""
    image: UInt8Array
    """(h, w) or (h, w, 3), the first frame."""
    flow: Float32Array
    """(2, h, w) in pixels."""


@dataclass(frozen=True)
class BlockResult:
    """What became of a block."""

    encoded: EncodedFlow | None
    """The pairs as they are stored; None when the flow is left to another device."""
    frames: UInt8Array | None
    """(N, h, w) or (N, h, w, 3) prepared frames of the block's sequence, then."""
    shown: tuple[ShownPair, ...] = ()
    """What a preview shows."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Stage -> seconds of this process."""


def blocks_of(
    plan: VideoPlan, *, source: VideoFiles, options: FlowOptions, compute: bool, previewed: int = 0
) -> Iterator[FlowBlock]:
    """Yield the blocks of a video in order; `previewed` pairs of it, evenly spread, are to be shown."""
    total, count = len(plan.pairs), pairs_per_block(plan.size, compute=compute)
    shown = np.unique(np.linspace(0, total - 1, previewed).round().astype(int)) if previewed else np.empty(0, int)
    for start in range(0, total, count):
        pairs = np.arange(start, min(start + count, total))
        firsts, seconds = (np.array(side) for side in zip(*map(plan.pairs.frames, pairs.tolist()), strict=True))
        used = np.union1d(firsts, seconds)
        part = VideoPlan(plan.name, plan.video, plan.facts, plan.sequence[used], plan.pairs, plan.size)
        yield FlowBlock(
            source,
            part,
            options,
            firsts=np.searchsorted(used, firsts),
            seconds=np.searchsorted(used, seconds),
            shown=tuple((shown[(shown >= pairs[0]) & (shown <= pairs[-1])] - start).tolist()),
            compute=compute,
            is_last=bool(pairs[-1] == total - 1),
        )


def pairs_per_block(size: tuple[int, int], *, compute: bool) -> int:
    """Return the pairs of a block whose frames have this size."""
    budget = BLOCK_PIXELS_CPU if compute else BLOCK_PIXELS_DEVICE
    return min(MOST_BLOCK, max(LEAST_BLOCK, budget // (size[0] * size[1])))


def do_block(block: FlowBlock) -> BlockResult:
    """Decode a block and, where it says so, compute and encode its flow.

    Raises VideoError for whatever is wrong with this video alone, StorageError for a fault of the machine.
    """
    try:
        return _do_block(block)
    except Exception as error:
        raise fault_of(error, block.plan.size) from error


def fault_of(error: Exception, size: tuple[int, int]) -> VideoError | StorageError:
    """Return what anything raised in work on one video amounts to: a fault of the video, or of the machine."""
    cause = error.__cause__ if isinstance(error, StorageError) else error
    if isinstance(cause, OSError) and cause.errno in OF_ONE_NAME:
        return VideoError(str(error))
    if isinstance(error, VideoError | StorageError):
        return error
    text = (str(error).strip().splitlines() or [""])[0]
    fault: VideoError | StorageError
    if isinstance(error, OSError):
        fault = StorageError(f"cannot read or write: {text}; fix that and run again")
    elif isinstance(error, MemoryError | torch.OutOfMemoryError):
        asked = f"frames of {size[0]} x {size[1]} pixels"
        fault = StorageError(f"not enough memory for {asked}; give --workers or --short-side a smaller number")
    else:
        fault = VideoError(f"its flow cannot be computed: {type(error).__name__}: {text}")
    fault.__cause__ = error
    return fault


def is_of_all(fault: VideoError | StorageError) -> bool:
    """Return whether a fault would befall every other video, too: a disk that is full, or may not be written."""
    return isinstance(fault.__cause__, OSError) and fault.__cause__.errno in FULL | {errno.EROFS}


def _do_block(block: FlowBlock) -> BlockResult:
    began = time.perf_counter()
    frames = read_frames(block)
    seconds = {"decode": time.perf_counter() - began}
    if not block.compute:
        return BlockResult(None, frames, seconds=seconds)
    began = time.perf_counter()
    flow = block_flow(block, frames, torch.device("cpu"))
    seconds["flow"] = time.perf_counter() - began
    began = time.perf_counter()
    values = stored_values(flow, layout=block.options.layout, bound_px=block.options.bound_px)
    encoded = encode_values(values, layout=block.options.layout)
    seconds["encode"] = time.perf_counter() - began
    return BlockResult(encoded, None, shown_pairs(block, frames, flow), seconds)


def read_frames(block: FlowBlock) -> UInt8Array:
    """Return the prepared frames (N, h, w) or (N, h, w, 3) of a block's sequence; each is decoded once."""
    wanted, position = np.unique(block.plan.sequence, return_inverse=True)
    stream = block.source.stream(block.plan.video, wanted, block.plan.facts)
    decoded = np.stack([block.options.prepare(frame, block.plan.size) for frame in stream])
    frames: UInt8Array = decoded if len(decoded) == len(position) else decoded[position]
    return frames


def block_flow(block: FlowBlock, frames: UInt8Array, device: torch.device) -> Tensor:
    """Return the flow (P, 2, h, w) of a block's pairs, in pixels, on the device."""
    images = torch.from_numpy(frames).to(device)
    if images.ndim == 4:
        images = images.permute(0, 3, 1, 2)
    return sequence_flow(images, block.firsts, block.seconds, method=block.options.method)


def shown_pairs(block: FlowBlock, frames: UInt8Array, flow: Tensor) -> tuple[ShownPair, ...]:
    """Return the pairs of a block that a preview shows."""
    found = []
    for pair in block.shown:
        position = int(block.firsts[pair])
        index = int(block.plan.sequence[position])
        found.append(ShownPair(index, frames[position], flow[pair].cpu().numpy()))
    return tuple(found)
