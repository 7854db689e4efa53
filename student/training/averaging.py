"""A moving average of the weights while they train, by torch's `AveragedModel`, with a warm-up of its length.

After update n (from 1) the average keeps min(decay, (1 + n) / (10 + n)) of itself, as TensorFlow's
`ExponentialMovingAverage` does: a decay of .9999 would otherwise hold the initial weights for 10,000 steps. The
first update copies. Buffers (a batch norm's statistics) are averaged, too, and counters copied.
"""

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from mmkd.student.recipes.loop import AveragingRecipe

Tensors = tuple[Tensor, ...] | list[Tensor]


class Average:
    """The average of a network's weights."""

    def __init__(self, network: nn.Module, recipe: AveragingRecipe) -> None:
        """Begin at the network's weights."""
        self._recipe = recipe
        self._model = AveragedModel(network, multi_avg_fn=self._blend, use_buffers=True)
        self._model.eval()

    @property
    def network(self) -> nn.Module:
        """The network with averaged weights, in evaluation mode."""
        return self._model.module

    @property
    def updates(self) -> int:
        """How many steps were averaged."""
        return int(self._model.n_averaged)

    def update(self, network: nn.Module) -> None:
        """Take in the network's weights after a step."""
        self._model.update_parameters(network)

    def restore(self, updates: int) -> None:
        """Go on after so many updates; the weights are loaded into `network`."""
        self._model.n_averaged.fill_(updates)

    def _decay(self) -> float:
        decay, n = self._recipe.decay, self.updates
        return min(decay, (1 + n) / (10 + n)) if self._recipe.warmup else decay

    @torch.no_grad()
    def _blend(self, averaged: Tensors, current: Tensors, _: Tensor | int) -> None:
        """Move the averages towards the current values; counts are copied."""
        if averaged[0].is_floating_point():
            torch._foreach_lerp_(list(averaged), list(current), 1 - self._decay())
        else:
            for own, value in zip(averaged, current, strict=True):
                own.copy_(value)
