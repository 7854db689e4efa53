"""Clips of a batch mixed in pairs, and the loss of such a mixture, by torchvision's `MixUp` and `CutMix`.

Row i is mixed with the row j before it (the first with the last): x = s x_i + (1 - s) x_j for mixup (Zhang et al.,
ICLR 2018), a window of x_j in x_i, in all frames alike, with s the share that stays for cutmix (Yun et al., ICCV
2019). Its loss is the same mixture of the two rows' losses,

    s loss(z_S(x), row i) + (1 - s) loss(z_S(x), row j),

up to a term without z_S: cross-entropy is linear in the label's distribution, and so is KL(p || q) in p but for
the entropy of p. So labels are mixed as one-hot rows and the teacher as *probabilities* softmax(z_T / T), with one
s and one pairing. Mixed logits would be another teacher: softmax of their mean is the geometric mean of both
answers, small where either is, while a picture that shows both clips is to be told as one or the other. Each row's
masses carry the weights of its terms before they are mixed, so a row without a label or a target gives its share
of nothing, and as many rows contribute as without mixing.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812 - the name that every torch user expects
from torch import Tensor

from mmkd.data_manifests.errors import InputError
from mmkd.student.loss.class_balance import PLAIN, LabelRules, soft_label_rows
from mmkd.student.loss.losses import known_logits, mean_over_heads, row_weights
from mmkd.student.recipes.loss import LossAt
from mmkd.student.recipes.mix import MixRecipe
from mmkd.student.teacher.targets import Targets

Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Mixes a video (B, T, C, H, W) and rows (B, N) with those before them, in one share."""


@dataclass(frozen=True)
class Aim:
    """What one head of a batch is to say, as masses: distributions over classes times the weight of their terms."""

    label: Tensor
    """float32 (B, classes that labels reach); a row sums to the weight of its label term."""
    target: Tensor | None
    """float32 (B, C) of softmax(z_T / T); a row sums to the weight of its distillation term. None: no teacher."""
    temperature: float
    """T."""
    rows: Tensor
    """Scalar: how many rows contribute, before and after mixing."""


def aims(
    labels: Mapping[str, Tensor],
    targets: Targets | None,
    *,
    options: LossAt,
    classes: Mapping[str, int],
) -> dict[str, Aim]:
    """Return head -> aim of labels {head: int64 (B,), -1 absent} and targets; `classes` are above every label."""
    found = {}
    for head, label in labels.items():
        of_label, of_target = row_weights(head, label, targets, options)
        one_hot = label[:, None] == torch.arange(classes[head], device=label.device)  # absent ones: zeros
        temperature, target = options.of(head).temperature, None
        if targets is not None:
            target = of_target[:, None] * F.softmax(known_logits(targets, head).float() / temperature, dim=1)
        rows = ((of_label > 0) | (of_target > 0)).sum()
        found[head] = Aim(of_label[:, None] * one_hot, target, temperature, rows)
    return found


def mix_batch(
    inputs: Mapping[str, Tensor], wanted: Mapping[str, Aim], recipe: MixRecipe, *, repeats: int = 1
) -> tuple[dict[str, Tensor], dict[str, Aim]]:
    """Return inputs {"rgb": float32 (B, T, S, S, 3) in 0..255} and aims, mixed, or as they were if so drawn.

    The inputs may be uint8. Of rows that lie in runs of `repeats` views of one clip, different clips are paired as
    far as there are such. The draws come from torch's CPU generator. Raises InputError for another modality.
    """
    if set(inputs) != {"rgb"}:
        raise InputError(f"train.mix is for rgb; this network sees {', '.join(sorted(inputs))}: leave it out")
    frames, is_mixed = inputs["rgb"].float(), bool(torch.rand(()) < recipe.probability)
    mix = drawn_mix(recipe)
    if not is_mixed or len(frames) < 2:
        return {"rgb": frames}, dict(wanted)
    masses = torch.cat([mass for aim in wanted.values() for mass in (aim.label, aim.target) if mass is not None], 1)
    if repeats == 1:
        frames, masses = mix_pairs(frames, masses, mix)
    else:
        order = apart(len(frames), repeats).to(frames.device)
        frames, masses = (value[order.argsort()] for value in mix_pairs(frames[order], masses[order], mix))
    return {"rgb": frames}, cut_masses(masses, wanted)


def drawn_mix(recipe: MixRecipe) -> Mix:
    """Return the transform of a batch: of two, the one that is drawn."""
    from torchvision.transforms import v2  # half a second, for those that mix alone

    if recipe.mixup_alpha is None or (recipe.cutmix_alpha is not None and torch.rand(()) < recipe.switch):
        return cast(Mix, v2.CutMix(alpha=recipe.cutmix_alpha or 1.0))
    return cast(Mix, v2.MixUp(alpha=recipe.mixup_alpha))


def mix_pairs(frames: Tensor, masses: Tensor, mix: Mix) -> tuple[Tensor, Tensor]:
    """Mix each row of frames (B, T, S, S, 3) and of masses (B, N) with the row before it, in one share."""
    from torchvision import tv_tensors

    video = tv_tensors.Video(frames.permute(0, 1, 4, 2, 3))  # a window is of the last two axes, in all frames
    mixed, masses = mix(video, masses)
    return mixed.as_subclass(Tensor).permute(0, 1, 3, 4, 2), masses


def apart(count: int, repeats: int) -> Tensor:
    """Return an order of rows 0..count - 1 in which those of a run of `repeats` lie apart."""
    return (torch.arange(count) % repeats).argsort(stable=True)


def cut_masses(masses: Tensor, wanted: Mapping[str, Aim]) -> dict[str, Aim]:
    """Return aims with masses (B, N) in the order of those that were put side by side."""
    widths = [m.shape[1] for aim in wanted.values() for m in (aim.label, aim.target) if m is not None]
    parts = iter(torch.split(masses, widths, dim=1))
    return {
        head: replace(aim, label=next(parts), target=None if aim.target is None else next(parts))
        for head, aim in wanted.items()
    }


def mixed_loss(
    logits: Mapping[str, Tensor],
    wanted: Mapping[str, Aim],
    *,
    rules: LabelRules = PLAIN,
    shares: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Return the mean over heads of the loss of logits {head: (B, C)} against aims, a scalar.

    Of aims that were not mixed it is `total_loss`, within rounding. `shares` as there.
    """
    losses = {head: aimed_loss(head, logits[head].float(), aim, rules) for head, aim in wanted.items()}
    return mean_over_heads(losses, shares)


def aimed_loss(head: str, student: Tensor, aim: Aim, rules: LabelRules) -> Tensor:
    """Return one head's mean over its contributing rows; 0 where no row contributes."""
    total = soft_label_rows(head, student, aim.label, rules).sum()
    if aim.target is not None:
        total = total + aim.temperature**2 * divergence_rows(student / aim.temperature, aim.target).sum()
    return total / aim.rows.clamp_min(1)


def divergence_rows(logits: Tensor, masses: Tensor) -> Tensor:
    """Return m KL(p || softmax(logits)) (B,) of logits (B, C) and masses (B, C) = m p."""
    mass = masses.sum(1)
    entropy = torch.xlogy(masses, masses).sum(1) - torch.xlogy(mass, mass)  # negative, and times m
    return entropy - (masses * F.log_softmax(logits, dim=1)).sum(1)
