"""The optimiser of a run: which parameters decay, how fast each learns at each step; and the seed of each step."""

import hashlib
import inspect
import math
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from mmkd.data_manifests.errors import InputError
from mmkd.student.networks.blocks import blocks
from mmkd.student.networks.freezing import is_head
from mmkd.student.networks.own_networks import find_factory, one_line
from mmkd.student.recipes.loop import LoopRecipe

BUILT_IN: dict[str, tuple[type[AdamW] | type[SGD], dict[str, Any]]] = {
    "adamw": (AdamW, {"fused": True}),
    "sgd": (SGD, {"momentum": 0.9, "nesterov": True, "fused": True}),
}
"""Name in recipes -> optimiser, and its options unless the recipe says otherwise."""
SHARE = "share"
"""Of a parameter group: its rate as a share of the step's."""


def make_optimizer(network: nn.Module, recipe: LoopRecipe) -> Optimizer:
    """Return the recipe's optimiser, which decays matrices and kernels, but no norm, bias or position table.

    Raises InputError for options that it does not take, and for a factory that is not there.
    """
    groups = parameter_groups(network, recipe)
    if recipe.optimizer in BUILT_IN:
        kind, defaults = BUILT_IN[recipe.optimizer]
        options = defaults | recipe.optimizer_options
        known = set(inspect.signature(kind.__init__).parameters) - {"self", "params", "lr", "weight_decay"}
        if unknown := set(recipe.optimizer_options) - known:
            raise InputError(
                f"optimizer_options: {recipe.optimizer} takes no {', '.join(sorted(unknown))}; it takes "
                f"{', '.join(sorted(known))}"
            )
        try:
            return kind(groups, lr=recipe.peak_rate, **options)
        except (TypeError, ValueError) as error:
            raise InputError(f"optimizer_options: {error}") from error
    factory = find_factory(recipe.optimizer, "optimizer")
    try:
        found = factory(groups, lr=recipe.peak_rate, **recipe.optimizer_options)
    except Exception as error:  # somebody's code: whatever it raises is told in one line
        raise InputError(f"optimizer {recipe.optimizer}: {one_line(error)}") from error
    if not isinstance(found, Optimizer):
        raise InputError(f"optimizer {recipe.optimizer} gave {type(found).__name__}, not a torch.optim.Optimizer")
    return found


def parameter_groups(network: nn.Module, recipe: LoopRecipe) -> list[dict[str, Any]]:
    """Return groups of the parameters that learn, by weight decay and, with `layer_decay`, by depth."""
    groups: dict[tuple[bool, float], dict[str, Any]] = {}
    depths = dict(layer_depths(network)) if recipe.layer_decay is not None else {}
    decays: dict[bool, list[tuple[str, nn.Parameter]]] = {True: [], False: []}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            exempt = parameter.ndim <= 1 or "relative_position_bias_table" in name
            decays[not exempt].append((name, parameter))
    for decayed in (True, False):  # AdamW's state in a checkpoint has this order
        for name, parameter in decays[decayed]:
            share = 1.0 if recipe.layer_decay is None else recipe.layer_decay ** depths[name]
            new = {"params": [], "weight_decay": recipe.weight_decay if decayed else 0.0, SHARE: share}
            groups.setdefault((decayed, share), new)["params"].append(parameter)
    return list(groups.values())


def layer_depths(network: nn.Module) -> Iterator[tuple[str, int]]:
    """Yield each parameter's name and how many layers lie above it: heads 0, the last block 1, the stem the most.

    As in BEiT (Bao et al., 2022): what comes after the blocks counts with the heads' side, as depth 0 or 1.
    """
    prefixes = [f"{name}." for name, _ in blocks(network)]
    met = 0
    for name, _ in network.named_parameters():
        inside = next((number for number, prefix in enumerate(prefixes, 1) if name.startswith(prefix)), None)
        met = met if inside is None else max(met, inside)
        # Between blocks (merging patches) a layer belongs to the block before it; before the first it is the stem.
        layer = len(prefixes) + 1 if is_head(name) else (met if inside is None else inside)
        yield name, len(prefixes) + 1 - layer


def learning_rate(recipe: LoopRecipe, step: int, steps_per_epoch: int) -> float:
    """Return the rate of step `step`, counted from 0.

    It rises linearly to the peak at the end of warm-up, then falls, reaching 0 one step after the last: linearly,
    or as (1 + cos(pi x)) / 2 (Loshchilov and Hutter, "SGDR", 2017, equation 5, without restarts). Different from
    the authors' schedule by one step: their first step has rate 0.
    """
    total = recipe.epochs * steps_per_epoch
    warmup = round(recipe.warmup * steps_per_epoch)
    if step < warmup:
        share = (step + 1) / warmup
    elif recipe.schedule == "linear":
        share = (total - step) / (total - warmup)
    else:
        share = (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2
    return recipe.peak_rate * share


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """Give every group of parameters its share of a rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get(SHARE, 1.0)


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """Return the seed of everything random in one step, in one process of several."""
    text = f"{seed}:{step}" if rank == 0 else f"{seed}:{step}:{rank}"
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
