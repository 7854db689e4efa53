"""The ways to compute flow behind one call: TV-L1 (ours), DIS (OpenCV's) and RAFT (torchvision's).

`tvl1` is what published flow was made with. `dis` is the quick look for people without a GPU: Kroeger, Timofte,
Dai, Van Gool, "Fast Optical Flow using Dense Inverse Search" (ECCV 2016), smoother at motion boundaries than
TV-L1 and of other error, see `DIS_PRESETS`. `raft` needs weights that the user has.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from mmkd.cache_tools.cache.fingerprints import file_sha256
from mmkd.cache_tools.frames.records import IntArray
from mmkd.data_manifests.errors import InputError
from mmkd.pipeline.tvl1.dispatch import TVL1Params, tvl1_clip_flow, tvl1_flow

DIS_PRESETS = {
    "ultrafast": cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST,
    "fast": cv2.DISOPTICAL_FLOW_PRESET_FAST,
    "medium": cv2.DISOPTICAL_FLOW_PRESET_MEDIUM,
}
"""OpenCV's presets. Mean endpoint error on Middlebury's Dimetrodon, Grove2, RubberWhale and Urban2, and time for a
640x480 pair on one thread: ultrafast .66 px, 6 ms; fast .53 px, 9 ms; medium .34 px, 39 ms."""

DIS_LEAST_SIDE = 16
"""Pixels of an image's shorter side below which OpenCV's DIS stops the process or finds no patch."""


@dataclass(frozen=True)
class FlowMethod:
    """A method and what it needs."""

    name: str = "tvl1"
    """`tvl1`, `dis` or `raft`."""
    preset: str | None = None
    """TV-L1: default, opencv, accurate, fast; DIS: ultrafast, fast, medium; None: default, medium."""
    weights: Path | None = None
    """RAFT: file of weights."""

    def __post_init__(self) -> None:
        """Raise InputError for a method, preset or weights that do not go together."""
        if self.name not in PRESETS:
            raise InputError(f"--method {self.name!r} is not one of {', '.join(PRESETS)}")
        known = PRESETS[self.name]
        if self.preset is not None and self.preset not in known:
            has = f"has the presets {', '.join(known)}" if known else "has no presets; its weights decide"
            raise InputError(f"--preset {self.preset!r}: the method {self.name} {has}")
        if (self.name == "raft") != (self.weights is not None):
            need = (
                "needs --weights, a file"
                if self.name == "raft"
                else "takes no --weights; RAFT does, by --method raft"
            )
            raise InputError(f"the method {self.name} {need}")

    @property
    def takes_colour(self) -> bool:
        """Whether RGB frames serve it better than grey ones."""
        return self.name == "raft"

    @property
    def chosen_preset(self) -> str | None:
        """The preset, or the method's default."""
        return self.preset or next(iter(PRESETS[self.name]), None)

    def identity(self) -> dict[str, Any]:
        """Return everything that could change a value, as JSON; weights by their content."""
        known: dict[str, Any] = {"method": self.name, "preset": self.chosen_preset}
        if self.weights is not None:
            known["weights_sha256"] = file_sha256(self.weights)
        return known


PRESETS: dict[str, tuple[str, ...]] = {
    "tvl1": ("default", "opencv", "accurate", "fast"),
    "dis": ("medium", "fast", "ultrafast"),
    "raft": (),
}
"""Method -> its presets, the default one first."""


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
    params: TVL1Params = getattr(TVL1Params, method.chosen_preset or "default")()
    return params


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
