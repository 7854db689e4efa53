"""A video as blocks of consecutive pairs: what one decoding process reads, and on a CPU computes and encodes.

Blocks bound the memory that a long video takes, show progress, and let several processes work on one video. They
overlap by the frames that their pairs share, and the values do not depend on where they are cut. Each block costs
decoding from the key frame before it.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mmkd.cache_tools.frames.records import Float32Array, IntArray, UInt8Array, VideoFacts
from mmkd.cache_tools.frames.source import VideoFiles
from mmkd.data_manifests.counted import counted
from mmkd.data_manifests.errors import VideoError
from mmkd.pipeline.flow.conventions import Pairs
from mmkd.pipeline.flow.flow_method import DIS_LEAST_SIDE
from mmkd.pipeline.flow.methods import sequence_flow
from mmkd.pipeline.flow_command.encoding import EncodedFlow, encode_values, stored_values
from mmkd.pipeline.flow_command.faults import fault_of
from mmkd.pipeline.flow_command.options import FlowOptions

BLOCK_PIXELS_CPU, BLOCK_PIXELS_DEVICE = 2_800_000, 33_000_000
"""Pixels of one block's frames: 32 and 380 at 340x256. Larger: fewer frames decoded twice, more memory."""
LEAST_BLOCK, MOST_BLOCK = 16, 512
"""Pairs of a block at least and at most."""


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
        # Of the plan a process gets this block's frames alone, renumbered: a long video's are megabytes.
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
    # A sequence at a stated rate repeats frames; each is decoded once.
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
