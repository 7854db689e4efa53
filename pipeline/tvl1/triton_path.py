# mypy: disable-error-code="import-untyped"
# Triton ships no type information.
"""TV-L1 on a CUDA device: groups of pairs, coarse to fine, by the kernels of triton_kernels.py and blocked.cu.

Same results as the torch path up to rounding, which TV-L1 amplifies at isolated pixels; the same bits for a pair in
any batch, early stopping included. Both iteration kernels follow OpenCV's stopping rule exactly: the blocked one
finds after a launch that a pair should have stopped within it, and runs the launch again that far. They round
differently, so a result that must not mix them keeps `iteration_kernel` with it. What this gives up: memory is kept
between calls, up to the budget, until `release_memory`.
"""

import threading
import warnings
from collections import OrderedDict
from typing import Literal

import torch
import triton
from torch import Tensor

from mmkd.pipeline.tvl1 import triton_kernels as kernels
from mmkd.pipeline.tvl1.blocked import Blocked, load_blocked
from mmkd.pipeline.tvl1.nvrtc import NvrtcError
from mmkd.pipeline.tvl1.params import BUDGET_BYTES_DEVICE, TVL1Params
from mmkd.pipeline.tvl1.steps import pyramid_sizes
from mmkd.pipeline.tvl1.triton_level import (
    MOST_PAIRS,
    OPTIONS,
    PIXELS_PER_PROGRAM,
    PLANES_PER_PAIR,
    Level,
    Size,
    axis_taps,
    pitch_of,
)

IMAGE_PLANES_PER_PAIR = 10
"""float32 planes of a pair outside its levels: both images, as they come and smaller, and the result twice."""

IterationKernel = Literal["blocked", "fused"]


def triton_available() -> bool:
    """Say whether the kernels run here: a CUDA device that Triton supports (Volta or later, not ROCm)."""
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability() >= (7, 0)


def iteration_kernel(device: torch.device) -> IterationKernel:
    """Return the kernel that iterates on a device by default, for whoever must not mix their rounding."""
    return "fused" if _blocked(device) is None else "blocked"


def tvl1_flow_triton(
    first: Tensor,
    second: Tensor,
    *,
    params: TVL1Params,
    budget_bytes: int = BUDGET_BYTES_DEVICE,
    kernel: IterationKernel | None = None,
) -> Tensor:
    """Return the flow from `first` to `second`, float32 (B, 2, H, W), as tvl1.tvl1_flow, which checks the images.

    `kernel` overrides the choice of `iteration_kernel`. Raises ValueError if one pair does not fit the budget.
    """
    solver = _solver(first, len(first), params=params, budget_bytes=budget_bytes, kernel=kernel)
    result = torch.empty(len(first), 2, *first.shape[1:], device=first.device)
    for start in range(0, len(first), solver.pairs):
        pairs = slice(start, start + solver.pairs)
        result[pairs] = solver.flow(solver.pyramid(first[pairs]), solver.pyramid(second[pairs]))
    return result


def tvl1_clip_flow_triton(
    frames: Tensor,
    *,
    step: int,
    params: TVL1Params,
    budget_bytes: int = BUDGET_BYTES_DEVICE,
    kernel: IterationKernel | None = None,
) -> Tensor:
    """Return the flow from each frame to the one `step` later: the same bits, each frame's pyramid made once."""
    count = len(frames) - step
    solver = _solver(frames, count, params=params, budget_bytes=budget_bytes, kernel=kernel)
    result = torch.empty(max(0, count), 2, *frames.shape[1:], device=frames.device)
    for start in range(0, count, solver.pairs):
        stop = min(start + solver.pairs, count)
        levels = solver.pyramid(frames[start : stop + step])
        result[start:stop] = solver.flow([level[:-step] for level in levels], [level[step:] for level in levels])
    return result


def pair_bytes(height: int, width: int, *, params: TVL1Params) -> int:
    """Return the device memory that one pair takes."""
    sizes = pyramid_sizes(height, width, scales=params.scales, zoom=params.zoom)
    planes = PLANES_PER_PAIR + (2 if params.median > 1 else 0)
    levels = sum(4 * planes * rows * pitch_of(columns) for rows, columns in sizes)
    return levels + 4 * IMAGE_PLANES_PER_PAIR * height * width


class Solver:
    """The levels of a group of up to `pairs` pairs of one size, with their graphs."""

    def __init__(
        self, pairs: int, size: Size, *, params: TVL1Params, device: torch.device, blocked: Blocked | None
    ) -> None:
        """Allocate all levels."""
        self.pairs, self.params, self.bytes = pairs, params, pairs * pair_bytes(*size, params=params)
        self.sizes = pyramid_sizes(*size, scales=params.scales, zoom=params.zoom)
        self.levels = [Level(pairs, s, params=params, device=device, blocked=blocked) for s in self.sizes]

    def pyramid(self, images: Tensor) -> list[Tensor]:
        """Return the scales of (B, H, W) as float32, finest first."""
        levels = [images.to(torch.float32).contiguous()]
        ratio, half_pixel, device = 1 / self.params.zoom, self.params.mode == "opencv", images.device
        for rows, columns in self.sizes[1:]:
            source = levels[-1]
            result = source.new_empty(len(source), rows, columns)
            sides = ((source.shape[2], columns), (source.shape[1], rows))
            x_taps, y_taps = (axis_taps(*s, ratio=ratio, half_pixel=half_pixel, device=device) for s in sides)
            kernels.resize_kernel[(triton.cdiv(rows * columns, PIXELS_PER_PROGRAM), len(source))](
                source, result, *x_taps, *y_taps, *source.shape[1:], rows, columns,
                BLOCK=PIXELS_PER_PROGRAM, **OPTIONS,
            )  # fmt: skip
            levels.append(result)
        return levels

    def flow(self, first: list[Tensor], second: list[Tensor]) -> Tensor:
        """Run the scales, coarse to fine (`calc` of both tvl1flow.cpp); return (B, 2, H, W)."""
        pairs, coarser = len(first[0]), None
        with _LOCK:
            for level, *images in reversed(list(zip(self.levels, first, second, strict=True))):
                level.start(coarser, pairs=pairs)
                level.run(*images)
                coarser = level
            return self.levels[0].flow(pairs)


_LOCK = threading.RLock()
_SOLVERS: OrderedDict[tuple[object, ...], Solver] = OrderedDict()
"""Kept between calls, as graphs and memory are costly to make; the one used last comes last."""


def release_memory() -> None:
    """Give up what is kept between calls."""
    with _LOCK:
        _SOLVERS.clear()


def _solver(
    images: Tensor, count: int, *, params: TVL1Params, budget_bytes: int, kernel: IterationKernel | None
) -> Solver:
    size, device = (images.shape[1], images.shape[2]), images.device
    fitting = budget_bytes // pair_bytes(*size, params=params)
    if fitting < 1:
        raise ValueError(f"TV-L1 of {size[1]}x{size[0]} pixels does not fit a budget of {budget_bytes:,} bytes")
    pairs = min(MOST_PAIRS, fitting, 1 << max(0, count - 1).bit_length())
    # Work on another stream must not share buffers.
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    blocked = None if kernel == "fused" else _blocked(device)
    if kernel == "blocked" and blocked is None:
        raise ValueError(f"TV-L1's blocked kernel does not run on {device}; use kernel='fused'")
    key = pairs, size, params, device, stream, blocked is None
    with _LOCK:
        if key not in _SOLVERS:
            needed = pairs * pair_bytes(*size, params=params)
            while _SOLVERS and needed + sum(solver.bytes for solver in _SOLVERS.values()) > budget_bytes:
                _SOLVERS.popitem(last=False)
            _SOLVERS[key] = Solver(pairs, size, params=params, device=device, blocked=blocked)
        _SOLVERS.move_to_end(key)
        return _SOLVERS[key]


_BLOCKED: dict[torch.device, Blocked | None] = {}


def _blocked(device: torch.device) -> Blocked | None:
    """Return the blocked kernel of a device, None where it does not run; said once."""
    if device not in _BLOCKED:
        try:
            _BLOCKED[device] = load_blocked(device) if device.type == "cuda" else None
        except NvrtcError as error:
            warnings.warn(f"TV-L1 takes its slower fused kernel: {error}", stacklevel=2)
            _BLOCKED[device] = None
    return _BLOCKED[device]
