"""TV-L1 in torch alone, on any device: the readable reference, and the path where no faster one runs.

Follows OpenCV's two implementations, see `mmkd.pipeline.tvl1.dispatch`. Planes of a group of pairs are worked on in
strips that stay in a core's cache. What this gives up: each step is one call of torch for a strip, so planes are
read again and again, and on a GPU it asks the device for the convergence of each pair.
"""

import math

import torch
from torch import Tensor

from mmkd.pipeline.tvl1.iterations import Iterations
from mmkd.pipeline.tvl1.median import median_filter
from mmkd.pipeline.tvl1.params import TVL1Params
from mmkd.pipeline.tvl1.steps import ClampedWarp, ZeroWarp, centred_gradient, pyramid_sizes, resize_linear

# Measured on a CPU (tests/benchmarks/RESULTS.md): a strip's 20 planes should stay in a core's second cache.
STRIP_PIXELS_CPU = 32_768
GROUP_PIXELS_CPU = 131_072
MEDIAN_PIXELS = 16_384
GROUP_PIXELS_DEVICE = 8_388_608
# Counted and rounded up: the warp's 50 planes of float32, the iterations' 20, temporaries; without pyramids.
BYTES_PER_PIXEL = 350


def flow_of_pairs(first: Tensor, second: Tensor, *, params: TVL1Params, budget_bytes: int) -> Tensor:
    """Return the flow of each pair of (B, H, W), checked by the caller, float32 (B, 2, H, W)."""
    height, width = first.shape[1:]
    result = torch.empty(len(first), 2, height, width, dtype=torch.float32, device=first.device)
    count = pairs_per_group(first, params=params, budget_bytes=budget_bytes)
    for start in range(0, len(first), count):
        pairs = slice(start, start + count)
        pyramids = (_pyramid(images[pairs], params) for images in (first, second))
        result[pairs] = _group_flow(*pyramids, params=params)
    return result


def flow_of_clip(frames: Tensor, *, step: int, params: TVL1Params, budget_bytes: int) -> Tensor:
    """Return the flow from each frame of (N, H, W) to the one `step` later, with one pyramid for each frame."""
    pairs, (height, width) = max(0, len(frames) - step), frames.shape[1:]
    result = torch.empty(pairs, 2, height, width, dtype=torch.float32, device=frames.device)
    count = pairs_per_group(frames, params=params, budget_bytes=budget_bytes, held_frames=step)
    held = _pyramid(frames[:step], params) if pairs else []
    for start in range(0, pairs, count):
        fresh = _pyramid(frames[start + step : start + step + count], params)
        size = len(fresh[0])
        levels = [torch.cat(both) for both in zip(held, fresh, strict=True)]
        firsts, seconds = [level[:size] for level in levels], [level[step:] for level in levels]
        result[start : start + size] = _group_flow(firsts, seconds, params=params)
        # The last `step` frames are the first ones of the next group's pairs.
        held = [level[size:] for level in levels]
    return result


def pair_bytes(height: int, width: int, *, params: TVL1Params) -> int:
    """Return the memory that one pair needs beyond images and result."""
    return BYTES_PER_PIXEL * height * width + 4 * _pyramid_bytes(height, width, params)


def _pyramid_bytes(height: int, width: int, params: TVL1Params) -> int:
    return 4 * sum(math.prod(size) for size in pyramid_sizes(height, width, scales=params.scales, zoom=params.zoom))


def pairs_per_group(images: Tensor, *, params: TVL1Params, budget_bytes: int, held_frames: int = 0) -> int:
    """Return how many pairs are computed at once, at least one: as many as is fast, within the budget.

    A clip holds the pyramids of `held_frames` frames besides.
    """
    height, width = images.shape[1:]
    fast = (GROUP_PIXELS_CPU if images.device.type == "cpu" else GROUP_PIXELS_DEVICE) // (height * width)
    free = budget_bytes - held_frames * _pyramid_bytes(height, width, params)
    return max(1, min(fast, free // pair_bytes(height, width, params=params)))


def _pyramid(images: Tensor, params: TVL1Params) -> list[Tensor]:
    """Return the scales of (B, H, W) as float32, finest first ("create the scales" of both tvl1flow.cpp)."""
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
        # From the end: retiring swaps a pair with the last active one, which was looked at already.
        for i in reversed(range(state.active)):
            # OpenCV counts down by the threshold until the next test is due.
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
