"""TV-L1 optical flow of many image pairs at once, in torch alone, on any device.

Follows OpenCV's two implementations: `opencv-cuda`, which denseflow, EPIC's furnari-flow and I3D's flow were
made with and which is the default, and `opencv`, its CPU class. A pair's result has the same bits in any
batch and with any number of threads, early stopping included. What this gives up: on a GPU it asks the
device for the convergence of each pair, so it is a reference there rather than a fast path.

Sources: Zach, Pock, Bischof, "A duality based approach for realtime TV-L1 optical flow" (2007); Sánchez,
Meinhardt-Llopis, Facciolo, "TV-L1 optical flow estimation" (IPOL 2013); opencv_contrib
modules/cudaoptflow/src/tvl1flow.cpp, cuda/tvl1flow.cu and modules/optflow/src/tvl1flow.cpp.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmkd.pipeline.tvl1_iterate import Iterations
from mmkd.pipeline.tvl1_median import median_filter
from mmkd.pipeline.tvl1_steps import (
    ClampedWarp,
    ZeroWarp,
    centred_gradient,
    pyramid_sizes,
    resize_linear,
)

Mode = Literal["opencv-cuda", "opencv"]
MODES: tuple[Mode, ...] = ("opencv-cuda", "opencv")
# Measured on a CPU (tests/benchmarks/RESULTS.md): a strip's 20 planes should stay in a core's second cache.
STRIP_PIXELS_CPU = 32_768
GROUP_PIXELS_CPU = 131_072
MEDIAN_PIXELS = 16_384
GROUP_PIXELS_DEVICE = 8_388_608


@dataclass(frozen=True, kw_only=True)
class TVL1Params:
    """Parameters of TV-L1, named as in the field; `default`, `opencv`, `accurate` and `fast` are presets."""

    tau: float = 0.25
    """τ, step of the dual update (Sánchez et al., eq. 11); larger converges faster, above 0.25 not surely."""
    lambda_: float = 0.15
    """λ, weight of the data term (eq. 2) for images in 0..255; larger follows the images, less smooth."""
    theta: float = 0.3
    """θ, tightness between u and v (eq. 4); larger moves faster per iteration and couples less exactly."""
    scales: int = 5
    """Levels of the pyramid at most; more follow larger motion. A level with a side below 16 is not used."""
    zoom: float = 0.8
    """Size of a level relative to the finer one, in (0, 1); larger takes smaller, more accurate steps."""
    warps: int = 5
    """Linearisations per level; more follow larger motion within a level."""
    iterations: int = 300
    """Iterations per warp at most; OpenCV's CPU class counts 10 outer x 30 inner."""
    epsilon: float = 0.01
    """ε, stop once the mean squared update is at most ε² px²; larger stops sooner, 0 never stops early."""
    median: int = 0
    """Side of the median filter of the flow, 3 or 5; 0 for none, as on CUDA."""
    median_every: int = 30
    """Iterations between medians, the first one before the first iteration (OpenCV's inner iterations)."""
    mode: Mode = "opencv-cuda"
    """Whose sampling, borders and stopping rule: `opencv-cuda` or `opencv` (its CPU class)."""

    def __post_init__(self) -> None:
        """Refuse what cannot be computed, naming the field."""
        for name in ("tau", "lambda_", "theta"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"TVL1Params.{name} must be a positive number, not {value!r}")
        if not (math.isfinite(self.epsilon) and self.epsilon >= 0):
            raise ValueError(f"TVL1Params.epsilon must be 0 or a positive number, not {self.epsilon!r}")
        if not 0 < self.zoom < 1:
            raise ValueError(f"TVL1Params.zoom must lie between 0 and 1, not {self.zoom!r}")
        for name in ("scales", "warps", "iterations", "median_every"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"TVL1Params.{name} must be a whole number of at least 1, not {value!r}")
        if self.median not in (0, 3, 5):
            raise ValueError(f"TVL1Params.median must be 0 (none), 3 or 5, not {self.median!r}")
        if self.mode not in MODES:
            raise ValueError(f"TVL1Params.mode must be one of {', '.join(MODES)}, not {self.mode!r}")

    @classmethod
    def default(cls) -> "TVL1Params":
        """Return the parameters of OpenCV's CUDA class, which most published flow was made with."""
        return cls()

    @classmethod
    def opencv(cls) -> "TVL1Params":
        """Return the parameters of OpenCV's CPU class `DualTVL1OpticalFlow`."""
        return cls(mode="opencv", median=5)

    @classmethod
    def accurate(cls) -> "TVL1Params":
        """Return `opencv` with 10 scales, which follows motion of 20 pixels and more."""
        return cls(mode="opencv", median=5, scales=10)

    @classmethod
    def fast(cls) -> "TVL1Params":
        """Return a rough preset for tiny clips, demonstrations and tests; no published flow is like it."""
        return cls(mode="opencv", scales=3, zoom=0.5, warps=2, iterations=8, epsilon=0)


def tvl1_flow(first: Tensor, second: Tensor, *, params: TVL1Params) -> Tensor:
    """Return the flow from `first` to `second`, float32 (B, 2, H, W), in pixels per step.

    Both are grey images (B, H, W), uint8 or floating point in 0..255, on one device, and are not changed.
    Channel 0 is horizontal, positive to the right, channel 1 vertical, positive downwards: the pixel x of
    `first` is found at x + flow(x) in `second`.
    """
    _check_images(first, second)
    height, width = first.shape[1:]
    result = torch.empty(len(first), 2, height, width, dtype=torch.float32, device=first.device)
    count = _pairs_per_group(first)
    with torch.no_grad():
        for start in range(0, len(first), count):
            pairs = slice(start, start + count)
            pyramids = (_pyramid(images[pairs], params) for images in (first, second))
            result[pairs] = _group_flow(*pyramids, params=params)
    return result


def tvl1_clip_flow(frames: Tensor, *, params: TVL1Params, step: int = 1) -> Tensor:
    """Return the flow from each frame to the one `step` later, float32 (N - step, 2, H, W).

    `frames` are the grey images of one clip (N, H, W), as in `tvl1_flow`, which gives the same bits; here
    the pyramid of each frame is made once.
    """
    if step < 1:
        raise ValueError(f"tvl1_clip_flow needs a step of at least 1 frame, not {step}")
    _check_images(frames, frames)
    pairs, (height, width) = max(0, len(frames) - step), frames.shape[1:]
    result = torch.empty(pairs, 2, height, width, dtype=torch.float32, device=frames.device)
    count = _pairs_per_group(frames)
    with torch.no_grad():
        held = _pyramid(frames[:step], params) if pairs else []
        for start in range(0, pairs, count):
            fresh = _pyramid(frames[start + step : start + step + count], params)
            size = len(fresh[0])
            levels = [torch.cat(both) for both in zip(held, fresh, strict=True)]
            firsts, seconds = [level[:size] for level in levels], [level[step:] for level in levels]
            result[start : start + size] = _group_flow(firsts, seconds, params=params)
            held = [level[size:] for level in levels]
    return result


def _check_images(first: Tensor, second: Tensor) -> None:
    if first.ndim != 3 or first.shape != second.shape or 0 in first.shape[1:]:
        shapes = f"{tuple(first.shape)} and {tuple(second.shape)}"
        raise ValueError(f"tvl1_flow needs two stacks of grey images of one shape (B, H, W), not {shapes}")
    if first.device != second.device:
        raise ValueError(f"tvl1_flow needs both stacks on one device, not {first.device} and {second.device}")
    for images in (first, second):
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise ValueError(f"tvl1_flow needs uint8 or floating point images in 0..255, not {images.dtype}")


def _pairs_per_group(images: Tensor) -> int:
    budget = GROUP_PIXELS_CPU if images.device.type == "cpu" else GROUP_PIXELS_DEVICE
    return max(1, budget // (images.shape[1] * images.shape[2]))


def _pyramid(images: Tensor, params: TVL1Params) -> list[Tensor]:
    """Return the scales of (B, H, W) as float32, finest first ("create the scales" of both tvl1flow.cpp)."""
    if images.is_floating_point():
        low, high = images.aminmax()
        if not (low.item() >= 0 and high.item() <= 255):  # NaN fails both comparisons
            raise ValueError("tvl1_flow needs grey values in 0..255; found NaN or a value outside that range")
    levels = [images.to(torch.float32)]
    half_pixel = params.mode == "opencv"
    for size in pyramid_sizes(*images.shape[1:], scales=params.scales, zoom=params.zoom)[1:]:
        levels.append(resize_linear(levels[-1], size, ratio=1 / params.zoom, half_pixel=half_pixel))
    return levels


def _group_flow(first: list[Tensor], second: list[Tensor], *, params: TVL1Params) -> Tensor:
    """Run the scales of B pairs, coarse to fine (`calc` of both tvl1flow.cpp); return (B, 2, H, W)."""
    coarsest = first[-1]
    flow = coarsest.new_zeros(2, *coarsest.shape)
    for images in zip(reversed(first), reversed(second), strict=True):
        size = (images[0].shape[1], images[0].shape[2])
        if images[0] is not coarsest:
            half_pixel = params.mode == "opencv"
            flow = resize_linear(flow, size, ratio=None, half_pixel=half_pixel).mul_(1 / params.zoom)
        flow = _level_flow(*images, flow=flow, params=params)
    return flow.transpose(0, 1)


def _level_flow(first: Tensor, second: Tensor, *, flow: Tensor, params: TVL1Params) -> Tensor:
    """Run the warps of one scale from `flow` (2, B, H, W), as `procOneScale` of both tvl1flow.cpp does."""
    chunk = STRIP_PIXELS_CPU if first.device.type == "cpu" else GROUP_PIXELS_DEVICE
    stacks = (second, *centred_gradient(second))
    warp: ClampedWarp | ZeroWarp
    warp = ZeroWarp(stacks) if params.mode == "opencv" else ClampedWarp(stacks, chunk_pixels=chunk)
    state = Iterations(flow, tau=params.tau, lambda_=params.lambda_, theta=params.theta, strip_pixels=chunk)
    for _ in range(params.warps):
        flow = state.flow()
        state.linearise(warp(flow), first, flow)
        _iterate(state, params)
    return state.flow()


def _iterate(state: Iterations, params: TVL1Params) -> None:
    """Iterate until each pair has converged or the iterations are used up ("n" of both `procOneScale`)."""
    threshold = params.epsilon**2 * state.height * state.width
    previous = [0.0] * state.pairs
    for n in range(params.iterations):
        if params.median > 1 and n % params.median_every == 0:
            planes = state.u[:, : state.active]
            planes.copy_(median_filter(planes, size=params.median, chunk_pixels=MEDIAN_PIXELS))
        due = [_error_is_due(n, previous[i], threshold, params) for i in range(state.active)]
        errors = state.step(with_error=any(due))
        for i in reversed(range(state.active)):
            previous[i] = errors[i] if due[i] else previous[i] - threshold
            if due[i] and errors[i] <= threshold:
                last = state.retire(i)
                previous[i], previous[last] = previous[last], previous[i]
        if state.active == 0:
            break


def _error_is_due(n: int, previous_error: float, threshold: float, params: TVL1Params) -> bool:
    """Say whether iteration n tests for convergence.

    The CPU class tests in each. `procOneScale` of cudaoptflow/src/tvl1flow.cpp tests in odd iterations
    only, and for each threshold that the last sum held not in one of the next iterations.
    """
    if params.epsilon == 0:
        return False
    return params.mode == "opencv" or (n % 2 == 1 and previous_error < threshold)
