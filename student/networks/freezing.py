"""What of a network does not learn: everything but its heads, or its batch norms."""

from typing import Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmkd.data_manifests.errors import InputError

Frozen = Literal["backbone", "batch_norm"]
HEADS = "heads"
"""The module of a network's heads, in whatever it is wrapped."""


def frozen_modules(network: nn.Module, part: Frozen | None) -> list[nn.Module]:
    """Return the modules of a part of a network; InputError for a network that has none."""
    if part is None:
        return []
    if part == "batch_norm":
        found: list[nn.Module] = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    else:
        heads = {
            id(inner) for name, module in network.named_modules() if is_head(name) for inner in module.modules()
        }
        found = [m for m in network.modules() if heads and id(m) not in heads and _own_state(m)]
    if not found:
        raise InputError(f"freeze: this network has no {'batch norms' if part == 'batch_norm' else 'heads'}")
    return found


def freeze(modules: list[nn.Module]) -> None:
    """Take modules' own parameters out of training."""
    for module in modules:
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)


def train_all_but(network: nn.Module, frozen: list[nn.Module]) -> None:
    """Put a network into training mode, and what is frozen into evaluation mode: its statistics stay, too."""
    network.train()
    for module in frozen:
        module.training = False


def is_head(name: str) -> bool:
    """Return whether a module or parameter of this name belongs to the heads."""
    return HEADS in name.split(".")


def _own_state(module: nn.Module) -> bool:
    """Return whether a module holds parameters or draws random numbers itself, and is no mere container."""
    return not list(module.children()) or any(True for _ in module.parameters(recurse=False))
