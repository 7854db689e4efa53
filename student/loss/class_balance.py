"""Label smoothing and class balance: what the label term of each head is changed by, from the training labels.

Of a class with n_c of a head's N training labels, weights w_c (which multiply the label term, scaled so that the
mean weight of a training label is 1, so that the term keeps its size) or what is added to its logit:

    inverse frequency      w_c ~ n_c^-p
    effective number       w_c ~ (1 - b) / (1 - b^n_c)          Cui et al., CVPR 2019, equations 2 and 3
    logit adjustment       z_c + t log(n_c / N)                  Menon et al., ICLR 2021, equation 10

A class without a training clip counts as one with a single clip. The logits that leave the network, and those that
distillation sees, are not adjusted.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812 - the name that every torch user expects
from torch import Tensor

from mmkd.cache_tools.frames.records import IntArray
from mmkd.student.recipes.balance import BalanceRecipe
from mmkd.student.recipes.loop import LoopRecipe


@dataclass(frozen=True)
class LabelRules:
    """How the label term of each head differs from plain cross-entropy."""

    smoothing: float = 0.0
    """Share of each label that is spread evenly over all classes."""
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    """Head -> float32 (classes with a label or below one + 1,); the last is of all further classes."""
    offsets: Mapping[str, Tensor] = field(default_factory=dict)
    """Head -> what is added to logits, in the same form."""

    def to(self, device: torch.device) -> "LabelRules":
        """Return the rules on a device."""
        moved = [{head: value.to(device) for head, value in by.items()} for by in (self.weights, self.offsets)]
        return LabelRules(self.smoothing, *moved)

    def weight(self, head: str, classes: int) -> Tensor | None:
        """Return a head's weights (classes,), None for equal ones."""
        return for_classes(self.weights.get(head), classes)

    def adjusted(self, head: str, logits: Tensor) -> Tensor:
        """Return a head's logits (B, C) as the label term sees them."""
        offset = for_classes(self.offsets.get(head), logits.shape[1])
        return logits if offset is None else logits + offset


PLAIN = LabelRules()


def label_rules(recipe: LoopRecipe, labels: Mapping[str, IntArray]) -> LabelRules:
    """Return the rules of a recipe for training labels {head: int64 (rows,), -1 absent}."""
    if recipe.class_balance is None:
        return LabelRules(recipe.label_smoothing)
    numbers = {
        head: torch.from_numpy(class_numbers(recipe.class_balance, values)).float()
        for head, values in labels.items()
        if (values >= 0).any()
    }
    if recipe.class_balance.logit_adjustment is None:
        return LabelRules(recipe.label_smoothing, weights=numbers)
    return LabelRules(recipe.label_smoothing, offsets=numbers)


def class_numbers(recipe: BalanceRecipe, labels: IntArray) -> npt.NDArray[np.float64]:
    """Return each class's weight or offset, and last that of a class beyond the largest label, by its clips."""
    clips = np.append(np.bincount(labels[labels >= 0]), 0)
    counted: npt.NDArray[np.float64] = np.maximum(clips, 1).astype(np.float64)
    if recipe.logit_adjustment is not None:
        offsets: npt.NDArray[np.float64] = recipe.logit_adjustment * np.log(counted / clips.sum())
        return offsets
    if recipe.inverse_frequency is not None:
        weights = counted**-recipe.inverse_frequency
    else:
        beta = recipe.effective_number or 0.0
        weights = (1 - beta) / (1 - beta**counted)
    weights *= clips.sum() / (weights * clips).sum()
    return weights


def for_classes(numbers: Tensor | None, classes: int) -> Tensor | None:
    """Return a head's numbers (classes,): the last one is that of every class which no label reaches."""
    if numbers is None:
        return None
    return torch.cat([numbers[:-1], numbers[-1:].expand(classes - len(numbers) + 1)])


def label_rows(head: str, logits: Tensor, labels: Tensor, rules: LabelRules) -> Tensor:
    """Return the label term (B,) of logits (B, C) in float32 and labels int64 (B,); 0 where a label is absent."""
    return F.cross_entropy(
        rules.adjusted(head, logits),
        labels,
        weight=rules.weight(head, logits.shape[1]),
        ignore_index=-1,
        reduction="none",
        label_smoothing=rules.smoothing,
    )


def soft_label_rows(head: str, logits: Tensor, masses: Tensor, rules: LabelRules) -> Tensor:
    """Return the same for labels that are masses (B, classes that labels reach), which need not sum to 1.

    Mass m of class c counts as m labels of c: masses of one label each give `label_rows`.
    """
    classes = logits.shape[1]
    even = masses.sum(1, keepdim=True) / classes
    smoothed = torch.lerp(F.pad(masses, (0, classes - masses.shape[1])), even, rules.smoothing)
    rows = -smoothed * F.log_softmax(rules.adjusted(head, logits), dim=1)
    weight = rules.weight(head, classes)
    return (rows if weight is None else rows * weight).sum(1)
