"""Start a backbone from a weights file that the user has: checked, never downloaded, never run.

Reads safetensors, and torch files with `weights_only=True`, so a hostile file cannot run code. Understands
torchvision's names for its own networks and the names of networks trained here.
"""

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mmkd.data_manifests.errors import InputError

CLASSIFIERS = ("head.", "fc.", "heads.")
"""Prefixes of the parameters that a file may hold in vain: its classifier is for other classes."""
SHOWN = 3


def read_state(path: Path) -> dict[str, Tensor]:
    """Read a dict of tensors, unwrapping one level of `state_dict` or `model`; InputError names the file."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"cannot read the weights {path}: {first_line}") from error
    for key in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise InputError(f"the weights {path} are not a dict of tensors; save the network's state_dict()")
    return dict(loaded)


def load_backbone(backbone: nn.Module, path: Path, *, first_conv: str) -> None:
    """Load all of the backbone's parameters from `path`; only the file's classifier is left aside.

    Where the backbone has another number of input channels than the file, the parameter `first_conv` takes
    the mean over the file's channels in each of its own (as in two-stream networks since TSN).
    """
    state = {backbone_name(name): value for name, value in read_state(path).items()}
    state = {name: value for name, value in state.items() if not name.startswith(CLASSIFIERS)}
    wanted = backbone.state_dict()
    if first_conv in state and first_conv in wanted:
        state[first_conv] = adapt_channels(state[first_conv], wanted[first_conv].shape[1])
    missing = sorted(set(wanted) - set(state))
    unexpected = sorted(set(state) - set(wanted))
    misshapen = [name for name in wanted if name in state and state[name].shape != wanted[name].shape]
    problems = [
        f"{len(names)} {what} ({', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''})"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
        if names
    ]
    if problems:
        raise InputError(f"the weights {path} are not those of this network: {'; '.join(problems)}")
    backbone.load_state_dict(state)


def backbone_name(name: str) -> str:
    """Strip what networks trained here, and data-parallel wrappers, put before a parameter's name."""
    for prefix in ("module.", "network.", "backbone."):
        name = name.removeprefix(prefix)
    return name


def adapt_channels(weight: Tensor, channels: int) -> Tensor:
    """Return a convolution weight (out, in, ...) for `channels` inputs: unchanged, or the mean repeated."""
    if weight.ndim < 2 or weight.shape[1] == channels:
        return weight
    return weight.mean(1, keepdim=True).repeat(1, channels, *[1] * (weight.ndim - 2))
