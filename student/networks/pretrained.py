"""Start a backbone from a weights file that the user has: checked, never downloaded, never run.

Reads safetensors, and torch files with `weights_only=True`, so a hostile file cannot run code. Understands
torchvision's names for its own networks and the names of networks trained here.
"""

import re
import shlex
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mmkd.data_manifests.errors import InputError
from mmkd.data_manifests.regular_file import open_regular

CLASSIFIERS = ("head.", "fc.", "heads.")
"""Prefixes of the parameters that a file may hold without use: its classifier is for other classes."""
SHOWN = 3
UNWRAPPED = ("state_dict", "model_state_dict", "model", "module")
"""Keys under which training programs put the parameters, beside the optimiser and the like."""
WRAPPERS = ("module.", "model.", "network.", "backbone.")
"""What networks trained here, and wrappers such as DistributedDataParallel, put before every parameter's name."""
COMPILED = "_orig_mod."
"""What torch.compile puts into a parameter's name, at the compiled module's place."""
TAKE_OUT = (
    'import torch; d = torch.load({path!r}, "cpu", weights_only=False); '
    'd = d if isinstance(d, dict) else d.state_dict(); d = d.get("state_dict", d.get("model", d)); '
    "torch.save({{k: v for k, v in d.items() if torch.is_tensor(v)}}, {out!r})"
)
"""A program that keeps the tensors of a checkpoint which holds other objects, too."""


def read_state(path: Path) -> dict[str, Tensor]:
    """Read a dict of tensors, unwrapping one level of `state_dict` or `model`; InputError names the file."""
    try:
        with open_regular(path) as file:
            if path.suffix == ".safetensors":
                return load_file(path)
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except OSError as error:
        raise InputError(f"cannot read the weights {path}: {error.strerror or error}") from error
    except Exception as error:  # a file that is not what it seems makes torch and pickle raise anything
        raise InputError(
            f"cannot read the weights {path}: {reason(path, str(error) or type(error).__name__)}"
        ) from error
    for key in UNWRAPPED:
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not all(is_parameter(*item) for item in loaded.items()):
        raise InputError(f"the weights {path} are not a dict of tensors; save the network's state_dict()")
    return dict(loaded)


def is_parameter(name: object, value: object) -> bool:
    """Return whether an entry of a file is a named tensor that has its values, each by itself."""
    plain = isinstance(value, Tensor) and value.layout is torch.strided and not value.is_quantized
    return isinstance(name, str) and plain and not value.is_meta  # type: ignore[attr-defined]  # a tensor here


def reason(path: Path, text: str) -> str:
    """Return in one line why torch did not read a file: of its several lines the one that says it."""
    unsupported = re.search(r"Unsupported (?:global: GLOBAL|class) (\S+)", text)
    if unsupported is None:
        _, found, detail = text.partition("WeightsUnpickler error: ")
        return (detail if found else text).strip().splitlines()[0]
    out = path.with_name(f"{path.stem}-weights.pth")
    command = shlex.join(["python", "-c", TAKE_OUT.format(path=str(path), out=str(out))])
    return (
        f"it holds more than tensors ({unsupported[1]}), and reading that could run code. If you trust where it "
        f"comes from, take the weights out and name {out} instead: {command}"
    )


def load_backbone(backbone: nn.Module, path: Path, *, first_conv: str) -> None:
    """Load all of the backbone's parameters from `path`; only the file's classifier is left aside.

    Where the backbone has another number of input channels than the file, the parameter `first_conv` takes
    the mean over the file's channels in each of its own (as in two-stream networks since TSN).
    """
    state = backbone_state(read_state(path), path)
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


def backbone_state(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return the parameters by their names in the backbone, without a classifier's.

    Raises InputError when two parameters would have one name: the file holds two networks.
    """
    names: dict[str, str] = {}
    for name in state:
        own = backbone_name(name)
        if own.startswith(CLASSIFIERS):
            continue
        if own in names:
            raise InputError(
                f"the weights {path} hold two networks: {names[own]} and {name} are the same parameter; keep one"
            )
        names[own] = name
    return {own: state[name] for own, name in names.items()}


def backbone_name(name: str) -> str:
    """Strip what networks trained here, torch.compile and data-parallel wrappers put into a parameter's name."""
    name = name.replace(COMPILED, "")
    while name.startswith(WRAPPERS):
        name = name.partition(".")[2]
    return name


def adapt_channels(weight: Tensor, channels: int) -> Tensor:
    """Return a convolution weight (out, in, ...) for `channels` inputs: unchanged, or the mean repeated."""
    if weight.ndim < 2 or weight.shape[1] == channels:
        return weight
    return weight.mean(1, keepdim=True).repeat(1, channels, *[1] * (weight.ndim - 2))
