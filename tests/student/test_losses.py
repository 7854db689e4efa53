"""The losses against closed forms, torch's own functions and the gradient's formula."""

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the name that every torch user expects

from mmkd.student.loss.losses import distillation_rows, total_loss
from mmkd.student.recipes.loss import LossOptions
from mmkd.student.teacher.targets import Targets


def logits(seed, *shape, scale=3.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def distillation_loss(student, teacher, temperature):
    return distillation_rows(student, teacher, temperature).mean()


def test_two_classes_closed_form():
    teacher = torch.tensor([[math.log(3.0), 0.0]])  # softmax 3/4, 1/4
    student = torch.tensor([[0.0, 0.0]])  # softmax 1/2, 1/2
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert distillation_loss(student, teacher, 1.0).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 10.0])
def test_equals_torch_kl_div_times_t_squared(temperature):
    student, teacher = logits(0, 7, 5), logits(1, 7, 5)
    expected = temperature**2 * F.kl_div(
        F.log_softmax(student / temperature, 1),
        F.log_softmax(teacher / temperature, 1),
        log_target=True,
        reduction="batchmean",
    )
    torch.testing.assert_close(distillation_loss(student, teacher, temperature), expected)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_gradient_is_t_times_the_difference_of_softmaxes(temperature):
    student, teacher = logits(2, 6, 4).double().requires_grad_(), logits(3, 6, 4).double()
    distillation_rows(student, teacher, temperature).sum().backward()
    difference = (student.detach() / temperature).softmax(1) - (teacher / temperature).softmax(1)
    torch.testing.assert_close(student.grad, temperature * difference, rtol=1e-5, atol=1e-6)


def test_large_temperature_tends_to_the_squared_distance_of_centred_logits():
    student, teacher = logits(4, 8, 6, scale=1.0), logits(5, 8, 6, scale=1.0)
    centred = (teacher - teacher.mean(1, keepdim=True)) - (student - student.mean(1, keepdim=True))
    expected = centred.square().sum(1).mean() / (2 * 6)
    torch.testing.assert_close(distillation_loss(student, teacher, 100.0), expected, rtol=0.03, atol=0)


def test_constant_offsets_change_nothing_and_equal_logits_give_zero():
    student, teacher = logits(6, 5, 9), logits(7, 5, 9)
    moved = distillation_loss(student + 11, teacher - 5, 2.0)
    torch.testing.assert_close(moved, distillation_loss(student, teacher, 2.0), rtol=1e-4, atol=1e-6)
    assert distillation_loss(teacher, teacher, 2.0).item() == pytest.approx(0, abs=1e-6)


def test_half_precision_logits_are_computed_in_float32():
    student, teacher = logits(8, 5, 9).half(), logits(9, 5, 9).half()
    result = distillation_loss(student, teacher, 3.0)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, distillation_loss(student.float(), teacher.float(), 3.0))


def targets(values, valid):
    return Targets(values, torch.tensor(valid))


def test_without_targets_it_is_cross_entropy_over_the_labelled_rows():
    student, labels = {"action": logits(0, 4, 3)}, {"action": torch.tensor([2, -1, 0, 1])}
    expected = F.cross_entropy(student["action"], labels["action"], ignore_index=-1)
    options = LossOptions(label_weight=0.0).at(0)
    torch.testing.assert_close(total_loss(student, labels, None, options=options), expected)


def test_mean_over_heads_with_absent_labels_per_head():
    student = {"verb": logits(0, 4, 3), "noun": logits(1, 4, 5)}
    teacher = {"verb": logits(2, 4, 3), "noun": logits(3, 4, 5)}
    labels = {"verb": torch.tensor([2, -1, 0, 1]), "noun": torch.tensor([-1, -1, -1, -1])}
    options = LossOptions(temperature=2.0, label_weight=0.25).at(0)
    result = total_loss(student, labels, targets(teacher, [True] * 4), options=options)
    verb = 0.75 * distillation_loss(student["verb"], teacher["verb"], 2.0)
    verb += 0.25 * F.cross_entropy(student["verb"], labels["verb"], ignore_index=-1, reduction="sum") / 4
    noun = 0.75 * distillation_loss(student["noun"], teacher["noun"], 2.0)
    torch.testing.assert_close(result, (verb + noun) / 2)


@pytest.mark.parametrize("without_target", ["drop", "label-only"])
def test_rows_without_target_are_dropped_or_learn_from_the_label(without_target):
    student = logits(0, 4, 3).requires_grad_()
    teacher = logits(2, 4, 3)
    teacher[1] = float("nan")
    labels = torch.tensor([2, 1, 0, 1])
    options = LossOptions(temperature=2.0, without_target=without_target).at(0)
    given = targets({"action": teacher}, [True, False, True, True])
    result = total_loss({"action": student}, {"action": labels}, given, options=options)
    distill = distillation_rows(student, teacher.nan_to_num(), 2.0)[[0, 2, 3]].sum()
    label = F.cross_entropy(student[1:2], labels[1:2])
    expected = distill / 3 if without_target == "drop" else (distill + label) / 4
    torch.testing.assert_close(result, expected)
    (gradient,) = torch.autograd.grad(result, student)
    assert gradient.isfinite().all()
    assert bool(gradient[1].any()) == (without_target == "label-only")


def test_a_batch_without_anything_to_learn_gives_zero_and_no_nan():
    student = logits(0, 2, 3).requires_grad_()
    given = targets({"action": torch.full((2, 3), float("nan"))}, [False, False])
    result = total_loss({"action": student}, {"action": torch.tensor([-1, 1])}, given, options=LossOptions().at(0))
    result.backward()
    assert result.item() == 0
    assert not student.grad.any()


def test_targets_refuse_wrong_shapes():
    with pytest.raises(ValueError, match="must be bool"):
        Targets({"action": torch.zeros(2, 3)}, torch.ones(2))
    with pytest.raises(ValueError, match=r"\(2, C\)"):
        Targets({"action": torch.zeros(3, 3)}, torch.ones(2, dtype=torch.bool))
