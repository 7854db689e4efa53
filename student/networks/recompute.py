"""Gradient checkpointing: a block's activations are computed again in the backward pass, and not kept until then.

Chen et al., "Training Deep Nets with Sublinear Memory Cost" (2016), by `torch.utils.checkpoint`. What it adds to
that: a batch norm's running statistics are updated once, and not once more when its block is recomputed.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from mmkd.data_manifests.errors import InputError
from mmkd.student.networks.blocks import blocks


def recompute_blocks(network: nn.Module) -> int:
    """Let each block of a network recompute its activations in training; return how many blocks there are.

    Outputs and gradients stay what they are. Raises InputError for a network without blocks.
    """
    found = blocks(network)
    if not found:
        raise InputError("gradient_checkpointing: this network has no blocks to recompute; leave it out")
    for _, block in found:
        block.forward = partial(_checkpointed, block, block.forward)
    return len(found)


def _checkpointed(block: nn.Module, forward: Any, *args: Any, **options: Any) -> Any:
    if not (block.training and torch.is_grad_enabled()):
        return forward(*args, **options)
    if torch.compiler.is_compiling():  # which takes no context, and updates statistics once of itself
        return checkpoint(forward, *args, use_reentrant=False, **options)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=partial(_contexts, block), **options)


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts of the first computation and of the second."""
    return nullcontext(), _without_statistics(block)


@contextmanager
def _without_statistics(block: nn.Module) -> Iterator[None]:
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0  # the same tensors have to be saved as in the first computation: they are, unchanged
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            if norm.training and norm.num_batches_tracked is not None:
                norm.num_batches_tracked.sub_(1)
