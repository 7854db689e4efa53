"""RAFT through torchvision, with a weights file that the user has; nothing is downloaded.

Teed, Deng, "RAFT: Recurrent All-Pairs Field Transforms for Optical Flow" (ECCV 2020). The file is safetensors or
a torch state dict, read without running code, as torchvision publishes them (`raft_small`, `raft_large`: which
of the two is seen from the names in it). Its accuracy is that of the weights. It gives up bit-equality between
devices, and between batches on a GPU.
"""

from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.models.optical_flow import RAFT, raft_large, raft_small

from mmkd.data_manifests.errors import InputError
from mmkd.student.checkpoints.checkpoint_file import read_state
from mmkd.student.checkpoints.fit import fit_of
from mmkd.student.training.devices import reproducible

UPDATES = 12
"""Recurrent updates, torchvision's number; more refine the flow and take time in proportion."""
MULTIPLE, LEAST = 8, 128
"""Sides are padded to a multiple of 8, and to 128, below which the correlation pyramid has no fourth level."""
CORRELATION_BYTES = 2**30
"""Memory for the all-pairs correlations of one batch on a GPU; the CPU takes one pair at a time."""


def raft_flow(first: Tensor, second: Tensor, *, weights: Path, updates: int = UPDATES) -> Tensor:
    """Return the flow from `first` to `second`, float32 (B, 2, H, W) in pixels, as `tvl1_flow` does.

    Both are grey (B, H, W) or RGB (B, 3, H, W), uint8 or floating point in 0..255, on one device. RAFT was trained
    on RGB: grey images stand in all three channels and cost accuracy. Raises InputError for a weights file that is
    not of these networks.
    """
    if first.shape != second.shape or first.ndim not in (3, 4) or (first.ndim == 4 and first.shape[1] != 3):
        shapes = f"{tuple(first.shape)} and {tuple(second.shape)}"
        raise ValueError(f"raft_flow needs two stacks of one shape, (B, H, W) or (B, 3, H, W), not {shapes}")
    height, width = first.shape[-2:]
    network = load_raft(weights, first.device)
    result = torch.empty(len(first), 2, height, width, dtype=torch.float32, device=first.device)
    count = _pairs_per_batch(first)
    with torch.no_grad(), reproducible(first.device):
        for start in range(0, len(first), count):
            pairs = slice(start, start + count)
            images = (pad_images(normalise(stack[pairs])) for stack in (first, second))
            flow = network(*images, num_flow_updates=updates)[-1]
            left, _, top, _ = padding(width, height)
            result[pairs] = flow[..., top : top + height, left : left + width]
    return result


def load_raft(path: Path, device: torch.device) -> RAFT:
    """Return the network of a weights file on a device, kept for the next call while the file is the same."""
    if not path.is_file():
        raise InputError(f"there is no weights file {path}; give torchvision's raft_small or raft_large weights")
    stat = path.stat()
    return _load(path, (stat.st_size, stat.st_mtime_ns), device)


@lru_cache(maxsize=2)
def _load(path: Path, stamp: tuple[int, int], device: torch.device) -> RAFT:
    state = {name.removeprefix("module."): value for name, value in read_state(path).items()}
    large = any(name.startswith("mask_predictor.") for name in state)  # the small one upsamples bilinearly
    network: RAFT = (raft_large if large else raft_small)(weights=None, progress=False)
    if problems := fit_of(state, network.state_dict()).problems:
        kind = "raft_large" if large else "raft_small"
        raise InputError(f"the weights {path} are not those of torchvision's {kind}: {problems}")
    network.load_state_dict(state, strict=False)  # not strict: counters of batches may be absent
    return network.to(device).eval()


def normalise(images: Tensor) -> Tensor:
    """Return (B, 3, H, W) float32 in -1..1, as torchvision's `OpticalFlow` transform: x / 255, mean and std .5."""
    if images.ndim == 3:
        images = images[:, None].expand(-1, 3, -1, -1)
    return (images.to(torch.float32) / 255 - 0.5) / 0.5


def padding(width: int, height: int) -> tuple[int, int, int, int]:
    """Return (left, right, top, bottom) that make both sides fit, half on each side (RAFT's `InputPadder`)."""
    sides = (max(LEAST, -(-side // MULTIPLE) * MULTIPLE) - side for side in (width, height))
    across, down = sides
    return across // 2, across - across // 2, down // 2, down - down // 2


def pad_images(images: Tensor) -> Tensor:
    """Pad (B, 3, H, W) to sides that fit, by repeating the border."""
    return functional.pad(images, padding(images.shape[-1], images.shape[-2]), mode="replicate")


def _pairs_per_batch(images: Tensor) -> int:
    if images.device.type == "cpu":
        return 1
    cells = images.shape[-1] * images.shape[-2] / MULTIPLE**2
    return max(1, int(CORRELATION_BYTES / (cells**2 * 4 * 4 / 3)))
