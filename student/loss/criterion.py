"""The loss of a run, step by step: its numbers at that step, mixing where the recipe asks for it, and the loss."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mmkd.cache_tools.frames.records import IntArray
from mmkd.student.loss.class_balance import LabelRules, label_rules
from mmkd.student.loss.losses import contributing_rows, total_loss
from mmkd.student.loss.mixed import aims, mix_batch, mixed_loss
from mmkd.student.recipes.loop import LoopRecipe
from mmkd.student.recipes.loss import LossAt, LossOptions
from mmkd.student.teacher.targets import Targets

LossOf = Callable[[Mapping[str, Tensor], Mapping[str, Tensor] | None], Tensor]
"""Maps logits {head: (B, C)} and a part's shares, as `total_loss` has them, to the loss."""


class Criterion:
    """The loss of a run."""

    def __init__(
        self, recipe: LoopRecipe, options: LossOptions, labels: Mapping[str, IntArray], device: torch.device
    ) -> None:
        """Take the recipe's numbers, and the classes' from the training labels {head: int64 (rows,)}.

        Raises InputError for a head that `options` names and that does not exist.
        """
        options.check_heads(list(labels))
        self._recipe, self._options = recipe, options
        self._rules = label_rules(recipe, labels).to(device)
        self._classes = {head: int(values.max(initial=-1)) + 1 for head, values in labels.items()}

    def at(self, share: float) -> "StepLoss":
        """Return the loss of a step, before which a share 0..1 of the run's steps were done."""
        return StepLoss(self._recipe, self._options.at(share), self._rules, self._classes)


@dataclass(frozen=True)
class StepLoss:
    """The loss of one step."""

    recipe: LoopRecipe
    """What it says of mixing."""
    numbers: LossAt
    """Temperature and weights."""
    rules: LabelRules
    """Smoothing and class balance, on the device."""
    classes: Mapping[str, int]
    """Head -> a number above all of its labels."""

    def counts(self, labels: Mapping[str, Tensor], targets: Targets | None) -> dict[str, Tensor]:
        """Return head -> how many rows contribute to its loss; mixing does not change them."""
        return contributing_rows(labels, targets, options=self.numbers)

    def prepare(
        self, inputs: dict[str, Tensor], labels: Mapping[str, Tensor], targets: Targets | None
    ) -> tuple[dict[str, Tensor], LossOf]:
        """Return inputs, mixed if so drawn, and the loss of the logits that they give; raises as `mix_batch`."""
        if self.recipe.mix is None:
            return inputs, lambda logits, shares: total_loss(
                logits, labels, targets, options=self.numbers, rules=self.rules, shares=shares
            )
        wanted = aims(labels, targets, options=self.numbers, classes=self.classes)
        mixed, wanted = mix_batch(inputs, wanted, self.recipe.mix, repeats=self.recipe.repeats)
        return mixed, lambda logits, shares: mixed_loss(logits, wanted, rules=self.rules, shares=shares)
