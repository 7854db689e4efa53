"""The loss of one training step: distillation and labels, averaged over heads.

For a head and a row r with student logits z_S and teacher logits z_T,

    distill_r = T^2 KL(softmax(z_T / T) || softmax(z_S / T))        label_r = -log softmax(z_S)[label]

and the row's loss is `label_weight` * label_r + (1 - `label_weight`) * distill_r. A row without a target is
either left out or learns from its label with weight 1; an absent label (-1) leaves out the label term alone.
A head's loss is the mean over the rows that contribute to it, the total is the mean over heads. With every
target present and `label_weight` 0 this is exactly the authors' loss (batch mean, mean over heads). Label
smoothing and class balance change label_r alone: mmkd.student.loss.class_balance. Clips that are mixed in
pairs have the mixture of both losses: mmkd.student.loss.mixed.

T^2 keeps the size of the gradient as T grows: d distill / d z_S = T (softmax(z_S / T) - softmax(z_T / T)),
which for T -> infinity tends to that of the squared distance of the centred logits, per class.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F  # noqa: N812 - the name that every torch user expects
from torch import Tensor

from mmkd.student.loss.class_balance import PLAIN, LabelRules, label_rows
from mmkd.student.recipes.loss import LossAt
from mmkd.student.teacher.targets import Targets


def distillation_rows(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Return T^2 KL(teacher || student) of each row (B,) from logits (B, C), in float32.

    `temperature` T > 0: larger flattens both distributions, so that more of the teacher's order of the
    unlikely classes is learned.
    """
    student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    return temperature**2 * (teacher.exp() * (teacher - student)).sum(-1)


def total_loss(
    logits: Mapping[str, Tensor],
    labels: Mapping[str, Tensor],
    targets: Targets | None,
    *,
    options: LossAt,
    rules: LabelRules = PLAIN,
    shares: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Return the mean over heads of the loss in this module's docstring, a scalar.

    `logits` {head: (B, C)}, `labels` {head: int64 (B,), -1 absent}; without `targets` the label term alone
    with weight 1 (the baseline), whatever `label_weight` says. Of a part of a batch `shares` {head: scalar} says
    how much of the whole batch's contributing rows it has: the losses of all parts then add up to the batch's.
    """
    losses = {name: head_loss(name, logits, labels, targets, options=options, rules=rules) for name in logits}
    return mean_over_heads(losses, shares)


def mean_over_heads(losses: Mapping[str, Tensor], shares: Mapping[str, Tensor] | None) -> Tensor:
    """Return the mean of heads' losses, each times its share if there are any."""
    if shares is not None:
        losses = {name: value * shares[name] for name, value in losses.items()}
    return torch.stack(list(losses.values())).mean()


def contributing_rows(
    labels: Mapping[str, Tensor], targets: Targets | None, *, options: LossAt
) -> dict[str, Tensor]:
    """Return head -> how many rows contribute to its loss, a float scalar on the labels' device."""
    counts = {}
    for head, label in labels.items():
        has_label = label >= 0
        if targets is None:
            rows = has_label
        else:
            without_target = has_label if options.without_target == "label-only" else torch.zeros_like(has_label)
            with_target = has_label if options.of(head).label_weight == 1 else torch.ones_like(has_label)
            rows = torch.where(targets.valid, with_target, without_target)
        counts[head] = rows.sum().float()
    return counts


def head_loss(
    head: str,
    logits: Mapping[str, Tensor],
    labels: Mapping[str, Tensor],
    targets: Targets | None,
    *,
    options: LossAt,
    rules: LabelRules = PLAIN,
) -> Tensor:
    """Return one head's mean over its contributing rows; 0 where no row contributes."""
    student, label = logits[head].float(), labels[head]
    of_label, of_target = row_weights(head, label, targets, options)
    terms = [(label_rows(head, student, label, rules), of_label)]
    if targets is not None:
        teacher = known_logits(targets, head)
        terms.append((distillation_rows(student, teacher, options.of(head).temperature), of_target))
    return weighted_mean(terms)


def row_weights(head: str, label: Tensor, targets: Targets | None, options: LossAt) -> tuple[Tensor, Tensor]:
    """Return the weights (B,) of the label terms and of the distillation terms of a head's rows."""
    has_label = label >= 0
    if targets is None:
        return has_label.float(), torch.zeros_like(has_label).float()
    with_target, share = targets.valid, options.of(head).label_weight
    without_target_weight = 1.0 if options.without_target == "label-only" else 0.0
    return torch.where(with_target, share, without_target_weight) * has_label, with_target * (1 - share)


def known_logits(targets: Targets, head: str) -> Tensor:
    """Return a head's targets (B, C), 0 where there is none: a masked NaN must not reach a sum."""
    return torch.where(targets.valid[:, None], targets.logits[head], 0.0)


def weighted_mean(terms: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the sum of weight * value over all terms, divided by the number of rows with any weight."""
    total = torch.stack([(values * weights).sum() for values, weights in terms]).sum()
    contributing = (torch.stack([weights for _, weights in terms]) > 0).any(0).sum()
    return total / contributing.clamp_min(1)
