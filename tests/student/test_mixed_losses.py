"""Mixing, class balance, smoothing and schedules of the loss: against torch's own losses and closed forms."""

import logging
import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional

from mmkd.data_manifests.errors import InputError, InterruptedByUserError
from mmkd.student.loss.class_balance import LabelRules, class_numbers, label_rows, label_rules, soft_label_rows
from mmkd.student.loss.losses import total_loss
from mmkd.student.loss.mixed import aims, mix_batch, mixed_loss
from mmkd.student.recipes.balance import BalanceRecipe
from mmkd.student.recipes.loop import LoopRecipe
from mmkd.student.recipes.loss import LossOptions
from mmkd.student.recipes.mix import MixRecipe
from mmkd.student.recipes.train import TrainRecipe
from mmkd.student.teacher.targets import Targets
from mmkd.student.training.checkpoint import checkpoints
from mmkd.student.training.loop import fit
from tests.helpers.array_targets import ArrayTargets
from tests.helpers.moving_bars import Interrupting, MovingBars
from tests.helpers.plain_network import plain

LABELS = {"verb": torch.tensor([0, 2, -1, 1, 2, 0]), "noun": torch.tensor([1, -1, 0, 0, 1, 1])}
CLASSES = {"verb": 3, "noun": 2}
ONLY_MIXUP = MixRecipe(mixup_alpha=0.8)


def draw(seed=0, **sizes):
    generator = torch.Generator().manual_seed(seed)
    return {head: 2 * torch.randn(6, count, generator=generator) for head, count in sizes.items()}


def some_targets():
    logits = draw(1, verb=4, noun=3)
    valid = torch.tensor([True, True, False, True, False, True])
    return Targets({head: torch.where(valid[:, None], value, torch.nan) for head, value in logits.items()}, valid)


def frames(seed=2):
    return torch.randint(0, 256, (6, 2, 8, 8, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@pytest.mark.parametrize("with_teacher", [False, True])
@pytest.mark.parametrize("without_target", ["drop", "label-only"])
def test_what_is_not_mixed_has_the_plain_loss(with_teacher, without_target):
    options = LossOptions(temperature=3.0, label_weight=0.3, without_target=without_target).at(0)
    rules = LabelRules(0.1, weights={"verb": torch.tensor([1.0, 0.5, 2.0, 3.0])})
    targets = some_targets() if with_teacher else None
    logits = draw(5, verb=4, noun=3)
    wanted = total_loss(logits, LABELS, targets, options=options, rules=rules)
    found = mixed_loss(logits, aims(LABELS, targets, options=options, classes=CLASSES), rules=rules)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("recipe", [ONLY_MIXUP, MixRecipe(cutmix_alpha=1.0)])
def test_labels_targets_and_pixels_are_mixed_in_one_share_with_the_row_before(recipe):
    """The share is read off a marked picture, and the loss is that share of both rows' own losses."""
    options = LossOptions(temperature=2.0, label_weight=0.4, without_target="label-only").at(0)
    targets = some_targets()
    pixels = (40 * torch.arange(6, dtype=torch.uint8))[:, None, None, None, None].expand(6, 2, 8, 8, 3).contiguous()
    torch.manual_seed(7)
    mixed, wanted = mix_batch({"rgb": pixels}, aims(LABELS, targets, options=options, classes=CLASSES), recipe)
    own, before = pixels.float(), pixels.float().roll(1, 0)
    of_own = (mixed["rgb"] - before) / (own - before)
    share = of_own.mean().item()
    if recipe.cutmix_alpha is None:
        assert (of_own - share).abs().max() < 1e-4
    else:
        assert set(of_own.round(decimals=4).unique().tolist()) == {0.0, 1.0}
        assert (of_own == of_own[:1, :1]).all()
    assert 0.02 < share < 0.98
    for head, aim in wanted.items():
        plain_aim = aims(LABELS, targets, options=options, classes=CLASSES)[head]
        for name in ("label", "target"):
            masses = getattr(plain_aim, name)
            expected = share * masses + (1 - share) * masses.roll(1, 0)
            torch.testing.assert_close(getattr(aim, name), expected, rtol=1e-4, atol=1e-5)
        assert aim.rows == plain_aim.rows


def test_a_mixture_s_gradient_is_that_of_both_rows_losses():
    """One row and the one before it, by torch's own kl_div and cross_entropy."""
    options = LossOptions(temperature=2.0, label_weight=0.4).at(0)
    labels = {"a": torch.tensor([0, 2])}
    teacher = draw(3, a=3)["a"][:2]
    targets = Targets({"a": teacher}, torch.tensor([True, True]))
    torch.manual_seed(1)
    picture = torch.zeros(2, 1, 8, 8, 3, dtype=torch.uint8)
    picture[0] = 255
    mixed, wanted = mix_batch(
        {"rgb": picture}, aims(labels, targets, options=options, classes={"a": 3}), ONLY_MIXUP
    )
    share = mixed["rgb"][0].mean().item() / 255
    logits = draw(4, a=3)["a"][:2].requires_grad_()
    mixed_loss({"a": logits}, wanted).backward()
    again = logits.detach().clone().requires_grad_()
    total = 0
    for row, (s, other) in ((0, (share, 1)), (1, (share, 0))):
        for weight, source in ((s, row), (1 - s, other)):
            probabilities = functional.softmax(teacher[source] / 2, 0)
            distill = 4 * functional.kl_div(
                functional.log_softmax(again[row] / 2, 0), probabilities, reduction="sum"
            )
            total = total + weight * (
                0.4 * functional.cross_entropy(again[row], labels["a"][source]) + 0.6 * distill
            )
    (total / 2).backward()
    torch.testing.assert_close(logits.grad, again.grad, rtol=1e-4, atol=1e-6)


def test_views_of_one_clip_are_mixed_with_another_clip():
    pixels = torch.arange(6, dtype=torch.uint8).div(2, rounding_mode="floor").view(6, 1, 1, 1, 1) * 100
    pixels = pixels.expand(6, 1, 4, 4, 3)
    torch.manual_seed(3)
    mixed, _ = mix_batch(
        {"rgb": pixels},
        aims({"a": torch.arange(6)}, None, options=LossOptions().at(0), classes={"a": 6}),
        ONLY_MIXUP,
        repeats=2,
    )
    assert (mixed["rgb"] != pixels).flatten(1).all(1).all()


def test_mixing_is_refused_for_another_modality_and_leaves_one_clip_alone():
    wanted = aims({"a": torch.tensor([0])}, None, options=LossOptions().at(0), classes={"a": 1})
    with pytest.raises(InputError, match=r"train.mix is for rgb; this network sees flow"):
        mix_batch({"flow": torch.zeros(1)}, wanted, ONLY_MIXUP)
    same, _ = mix_batch({"rgb": frames()[:1]}, wanted, ONLY_MIXUP)
    assert torch.equal(same["rgb"], frames()[:1].float())


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_smoothed_and_weighted_labels_are_torchs(smoothing):
    logits, labels = draw(8, a=5)["a"], torch.tensor([0, 4, 2, -1, 1, 0])
    weights = torch.tensor([1.0, 2.0, 0.5, 0.25])  # of classes 0 to 2, and of all further ones
    rules = LabelRules(smoothing, weights={"a": weights})
    whole = torch.tensor([1.0, 2.0, 0.5, 0.25, 0.25])
    wanted = functional.cross_entropy(
        logits, labels, weight=whole, ignore_index=-1, label_smoothing=smoothing, reduction="none"
    )
    torch.testing.assert_close(label_rows("a", logits, labels, rules), wanted)
    one_hot = functional.one_hot(labels.clamp_min(0), 5) * (labels >= 0)[:, None]
    torch.testing.assert_close(soft_label_rows("a", logits, one_hot.float(), rules), wanted)


def test_the_rules_of_class_balance_are_their_closed_forms():
    labels = np.array([0] * 6 + [1] * 3 + [2] + [-1] * 5)
    inverse = class_numbers(BalanceRecipe(inverse_frequency=1.0), labels)
    assert inverse / inverse[0] == pytest.approx([1, 2, 6, 6])
    assert (inverse[:3] * [6, 3, 1]).sum() / 10 == pytest.approx(1)  # the mean weight of a training label
    effective = class_numbers(BalanceRecipe(effective_number=0.9), labels)
    wanted = [0.1 / (1 - 0.9**count) for count in (6, 3, 1, 1)]
    assert effective / effective[0] == pytest.approx(np.array(wanted) / wanted[0])
    offsets = class_numbers(BalanceRecipe(logit_adjustment=2.0), labels)
    assert offsets == pytest.approx([2 * math.log(share) for share in (0.6, 0.3, 0.1, 0.1)])


def test_adjusted_logits_undo_the_prior():
    """With t = 1 the best constant logits of the label term are equal: the network need not learn the prior."""
    labels = np.array([0] * 6 + [1] * 3 + [2])
    rules = label_rules(LoopRecipe(class_balance=BalanceRecipe(logit_adjustment=1.0)), {"a": labels})
    logits = torch.zeros(10, 3, requires_grad=True)
    label_rows("a", logits, torch.from_numpy(labels), rules).sum().backward()
    assert logits.grad.sum(0) == pytest.approx([0, 0, 0], abs=1e-5)


def test_numbers_of_the_loss_change_over_the_run_and_by_head():
    options = LossOptions.model_validate(
        {"temperature": [[0, 10], [0.5, 2]], "label_weight": {"verb": 0.25, "noun": [[0.5, 0], [1, 1]]}}
    )
    assert [options.at(share).of("x").temperature for share in (0, 0.25, 0.5, 1)] == [10, 6, 2, 2]
    assert [options.at(share).of("noun").label_weight for share in (0, 0.5, 0.75, 1)] == [0, 0, 0.5, 1]
    assert options.at(0.9).of("verb").label_weight == 0.25
    assert options.at(0.9).of("another").label_weight == 0
    with pytest.raises(InputError, match=r"loss\.label_weight: there is no head 'noun'; the heads are verb"):
        options.check_heads(["verb"])


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"temperature": 0}, "must be above 0 and at most 1000"),
        ({"temperature": [[0, 1], [0.5, 0]]}, "must be above 0 and at most 1000"),
        ({"label_weight": 1.5}, "must be at least 0 and at most 1"),
        ({"label_weight": [[0.5, 0], [0.2, 1]]}, "shares of the run must rise"),
        ({"label_weight": {}}, "must be a number, points"),
        ({"label_weight": True}, "must be a number, points"),
        ({"label_weight": [[0, "x"]]}, "must be a number, points"),
    ],
)
def test_numbers_of_the_loss_that_are_none_are_refused(fields, said):
    with pytest.raises(ValidationError, match=said):
        LossOptions.model_validate(fields)


def test_plain_numbers_are_written_as_they_were():
    assert LossOptions(temperature=4, label_weight=0.5).model_dump(mode="json") == {
        "temperature": 4.0,
        "label_weight": 0.5,
        "without_target": "drop",
    }


SHORT = TrainRecipe(network="small3d", epochs=3, batch_size=4, learning_rate=1e-3, loader_threads=1)
MIXED = {
    "mix": MixRecipe(mixup_alpha=0.4, cutmix_alpha=1.0),
    "label_smoothing": 0.1,
    "class_balance": BalanceRecipe(inverse_frequency=0.5),
}


def test_a_mixed_run_learns_and_is_resumed_to_the_same_bits(tmp_path, caplog):
    caplog.set_level(logging.ERROR)
    recipe = SHORT.model_copy(update=MIXED)
    teacher = ArrayTargets({"direction": np.random.default_rng(1).normal(size=(18, 3, 4)).astype(np.float32)})
    loss = LossOptions.model_validate({"label_weight": [[0, 1], [1, 0]], "temperature": 2})
    options = {"targets": teacher, "loss": loss, "progress": False}
    whole = plain()
    report = fit(whole, MovingBars(18, views=3), recipe, run_dir=tmp_path / "whole", **options)
    assert math.isfinite(report.final_loss)
    with pytest.raises(InterruptedByUserError):
        fit(plain(), Interrupting(18, views=3, at=12), recipe, run_dir=tmp_path / "parts", **options)
    assert int(checkpoints(tmp_path / "parts")[0].name[-9:]) > 0
    parts = plain()
    fit(parts, MovingBars(18, views=3), recipe, run_dir=tmp_path / "parts", **options)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))
    other = plain()
    fit(other, MovingBars(18, views=3), SHORT, **options)
    assert not torch.equal(other.body.weight, whole.body.weight)
