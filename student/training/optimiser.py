"""AdamW with the rate of each step, and the seed of each step."""

import hashlib

from torch import nn
from torch.optim import AdamW

from mmkd.student.recipes.loop import LoopRecipe


def make_optimizer(network: nn.Module, recipe: LoopRecipe) -> AdamW:
    """Return AdamW that decays matrices and kernels, but no norm, bias or relative position table."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            exempt = parameter.ndim <= 1 or "relative_position_bias_table" in name
            (plain if exempt else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return AdamW([group for group in groups if group["params"]], lr=recipe.learning_rate, fused=True)


def learning_rate(recipe: LoopRecipe, step: int, steps_per_epoch: int) -> float:
    """Return the rate of step `step`, counted from 0.

    It rises linearly to the peak at the end of warm-up, then falls linearly, reaching 0 one step after the
    last. Different from the authors' schedule by one step: their first step has rate 0.
    """
    total = recipe.epochs * steps_per_epoch
    warmup = round(recipe.warmup * steps_per_epoch)
    share = (step + 1) / warmup if step < warmup else (total - step) / (total - warmup)
    return recipe.learning_rate * share


def step_seed(seed: int, step: int) -> int:
    """Return the seed of everything random in one step."""
    digest = hashlib.blake2b(f"{seed}:{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
