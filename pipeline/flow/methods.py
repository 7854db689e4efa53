"""The ways to compute flow behind one call: TV-L1 (ours), DIS (OpenCV's) and RAFT (torchvision's).

`tvl1` is what published flow was made with. `dis` is the quick look for people without a GPU: Kroeger, Timofte,
Dai, Van Gool, "Fast Optical Flow using Dense Inverse Search" (ECCV 2016), smoother at motion boundaries than
TV-L1 and of other error, see `DIS_PRESETS`. `raft` needs weights that the user has.
"""

from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from mmkd.cache_tools.frames.records import IntArray
from mmkd.pipeline.flow.flow_method import DIS_LEAST_SIDE, FlowMethod
from mmkd.pipeline.tvl1.dispatch import tvl1_clip_flow, tvl1_flow
from mmkd.pipeline.tvl1.params import PRESETS as TVL1_PRESETS
from mmkd.pipeline.tvl1.params import TVL1Params

DIS_PRESETS = {
    "ultrafast": cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST,
    "fast": cv2.DISOPTICAL_FLOW_PRESET_FAST,
    "medium": cv2.DISOPTICAL_FLOW_PRESET_MEDIUM,
}
"""OpenCV's presets. Mean endpoint error on Middlebury's Dimetrodon, Grove2, RubberWhale and Urban2, and time for a
640x480 pair on one thread: ultrafast .66 px, 6 ms; fast .53 px, 9 ms; medium .34 px, 39 ms."""


def pair_flow(first: Tensor, second: Tensor, *, method: FlowMethod) -> Tensor:
    """Return the flow from `first` to `second` by any method: float32 (B, 2, H, W), as `tvl1_flow`.

    Images are grey (B, H, W), for RAFT also (B, 3, H, W), in 0..255, on one device.
    """
    if method.name == "tvl1":
        return tvl1_flow(first, second, params=tvl1_preset(method))
    if method.name == "dis":
        return dis_flow(first, second, preset=method.chosen_preset or "medium")
    from mmkd.pipeline.flow.raft import raft_flow

    if method.weights is None:
        raise ValueError("RAFT needs weights")
    return raft_flow(first, second, weights=method.weights)


def sequence_flow(frames: Tensor, firsts: IntArray, seconds: IntArray, *, method: FlowMethod) -> Tensor:
    """Return the flow (P, 2, H, W) of the pairs `frames[firsts]`, `frames[seconds]` of one clip.

    The same bits as `pair_flow`; where consecutive frames pair at one distance TV-L1 makes each pyramid once.
    """
    step = int(seconds[0] - firsts[0])
    consecutive = step != 0 and len(frames) == len(firsts) + abs(step) and bool((np.diff(firsts) == 1).all())
    if method.name == "tvl1" and consecutive and (np.diff(seconds) == 1).all():
        params = tvl1_preset(method)
        if step > 0:
            return tvl1_clip_flow(frames, params=params, step=step)
        return tvl1_clip_flow(frames.flip(0), params=params, step=-step).flip(0)
    first, second = (frames[torch.from_numpy(side).to(frames.device)] for side in (firsts, seconds))
    return pair_flow(first, second, method=method)


def tvl1_preset(method: FlowMethod) -> TVL1Params:
    """Return the parameters of a TV-L1 preset."""
    return TVL1_PRESETS[method.chosen_preset or "default"]


def dis_flow(first: Tensor, second: Tensor, *, preset: str = "medium") -> Tensor:
    """Return the flow from `first` to `second`, float32 (B, 2, H, W) in pixels, by OpenCV's DIS.

    Both are grey (B, H, W), uint8 or floating point in 0..255 (rounded to whole levels). Computed on the CPU,
    returned on their device. OpenCV refuses images below 16 pixels, which raise ValueError here.
    """
    if first.ndim != 3 or first.shape != second.shape:
        shapes = f"{tuple(first.shape)} and {tuple(second.shape)}"
        raise ValueError(f"dis_flow needs two stacks of grey images of one shape (B, H, W), not {shapes}")
    if min(first.shape[1:]) < DIS_LEAST_SIDE:
        raise ValueError(f"DIS needs images of at least {DIS_LEAST_SIDE} pixels, not {tuple(first.shape[1:])}")
    solver: Any = cv2.DISOpticalFlow.create(DIS_PRESETS[preset])
    result = torch.empty(len(first), 2, *first.shape[1:], dtype=torch.float32)
    pairs = zip(*(_grey_levels(stack) for stack in (first, second)), strict=True)
    for row, (one, two) in enumerate(pairs):
        # None, not the last result: DIS would start from it, and a pair depend on the one before.
        result[row] = torch.from_numpy(solver.calc(one, two, None).transpose(2, 0, 1))
    return result.to(first.device)


def _grey_levels(images: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    levels = images if images.dtype == torch.uint8 else images.round().clamp(0, 255).to(torch.uint8)
    return levels.cpu().numpy()
