"""Calibrated mixtures: by closed form, against a grid over mixtures of two experts, and the truth behind labels."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from mmkd.student.weighing import calibration
from mmkd.student.weighing.calibration import fit_calibrated


def drawn(random, logits):
    """Labels drawn from softmax(logits)."""
    return (logits + random.gumbel(size=logits.shape)).argmax(-1)


def nll(logits, labels):
    values = torch.from_numpy(np.asarray(logits, np.float64))
    return float(functional.cross_entropy(values, torch.from_numpy(labels)))


def coefficients(mixture, experts="abc"):
    """What the teacher's logits depend on: weight / temperature of each expert."""
    return [mixture.weights.get(e, 0) / mixture.temperatures.get(e, 1) for e in experts]


def temperature_of(logits, labels):
    mixture = fit_calibrated({"a": logits}, labels)
    assert mixture.weights == {"a": 1.0}
    return mixture.temperatures["a"]


@pytest.mark.parametrize(("z", "right"), [(3.0, 6000), (0.4, 9500), (12.0, 7000)])
def test_the_temperature_of_one_expert_by_closed_form(z, right):
    """Logits (z, 0) whose first class is right in a share f of cases: sigmoid(z / T) = f."""
    logits = np.tile(np.array([z, 0], np.float32), (10_000, 1))
    labels = (np.arange(10_000) >= right).astype(np.int64)
    share = right / 10_000
    assert temperature_of(logits, labels) == pytest.approx(z / np.log(share / (1 - share)), rel=2e-3)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_mixture_on_a_grid_has_a_smaller_nll(seed):
    random = np.random.default_rng(seed)
    a, b = (random.uniform(1, 6) * random.standard_normal((300, 5)).astype(np.float32) for _ in range(2))
    labels = drawn(random, 0.2 * a + random.uniform(0.05, 0.5) * b)
    found = coefficients(fit_calibrated({"a": a, "b": b}, labels), "ab")
    best = nll(found[0] * a + found[1] * b, labels)
    grid = np.exp(np.linspace(np.log(0.02), np.log(2), 60))
    values = np.array([[nll(u * a + v * b, labels) for v in grid] for u in grid])
    row, column = np.unravel_index(values.argmin(), values.shape)
    assert best <= values.min() + 1e-4, "the prior may cost this much"
    assert found == pytest.approx([grid[row], grid[column]], rel=0.1)


def test_the_mixture_that_the_labels_were_drawn_from_is_found():
    random = np.random.default_rng(3)
    logits = {name: scale * random.standard_normal((30_000, 8)) for name, scale in {"a": 2, "b": 5, "c": 1}.items()}
    truth = {"a": 0.5, "b": 0.1, "c": 0.8}
    labels = drawn(random, sum(truth[name] * logits[name] for name in truth))
    mixture = fit_calibrated({name: value.astype(np.float32) for name, value in logits.items()}, labels)
    assert coefficients(mixture) == pytest.approx(list(truth.values()), rel=0.05)
    shares = np.array([0.5 * 2, 0.1 * 5, 0.8 * 1])
    assert list(mixture.weights.values()) == pytest.approx(shares / shares.sum(), rel=0.05)
    assert sum(mixture.weights.values()) == pytest.approx(1)


def test_the_gradient_vanishes_at_the_fit(monkeypatch):
    random = np.random.default_rng(8)
    logits = {name: random.standard_normal((500, 6)).astype(np.float32) for name in "abc"}
    labels = drawn(random, logits["a"] + logits["b"] + 0.3 * logits["c"])
    monkeypatch.setattr(calibration, "PRIOR_STD", 1e6)
    found = torch.tensor(coefficients(fit_calibrated(logits, labels)), dtype=torch.float64, requires_grad=True)
    z = torch.from_numpy(np.stack([logits[name] for name in "abc"]).astype(np.float64))
    functional.cross_entropy(torch.einsum("e,enc->nc", found, z), torch.from_numpy(labels)).backward()
    assert found.grad.abs().max() < 1e-6


def test_an_experts_scale_goes_to_its_temperature_and_not_to_its_weight():
    random = np.random.default_rng(4)
    z = random.standard_normal((2000, 6)).astype(np.float32)
    labels = drawn(random, 2 * z)
    mixture = fit_calibrated({"a": z, "b": 7 * z + 30}, labels)
    assert mixture.weights == pytest.approx({"a": 0.5, "b": 0.5}, abs=1e-3)
    assert mixture.temperatures["b"] / mixture.temperatures["a"] == pytest.approx(7, rel=1e-3)
    assert mixture.temperatures["a"] == pytest.approx(temperature_of(z, labels), rel=1e-3)


def test_an_expert_that_knows_nothing_weighs_next_to_nothing():
    random = np.random.default_rng(5)
    z, noise = random.standard_normal((2, 10_000, 6)).astype(np.float32)
    assert fit_calibrated({"a": z, "b": noise}, drawn(random, 3 * z)).weights.get("b", 0) < 0.02


def test_an_expert_that_misleads_is_left_out():
    random = np.random.default_rng(6)
    z, other = random.standard_normal((2, 3000, 4)).astype(np.float32)
    labels = drawn(random, 3 * z - other)
    mixture = fit_calibrated({"a": z, "b": other}, labels)
    assert mixture.weights == {"a": 1.0}
    assert mixture.temperatures["a"] == pytest.approx(temperature_of(z, labels), rel=0.01)


def test_an_expert_that_says_nothing_does_not_disturb():
    random = np.random.default_rng(6)
    z = random.standard_normal((3000, 4)).astype(np.float32)
    labels = drawn(random, 3 * z)
    mixture = fit_calibrated({"a": z, "b": np.full_like(z, 7)}, labels)
    assert coefficients(mixture)[0] == pytest.approx(1 / temperature_of(z, labels), rel=0.01)


def test_clips_that_are_told_apart_without_a_fault_still_have_a_finite_temperature():
    labels = np.arange(40) % 4
    logits = np.eye(4, dtype=np.float32)[labels]
    mixture = fit_calibrated({"a": logits, "b": logits}, labels)
    for value in (temperature_of(logits, labels), *mixture.temperatures.values()):
        assert 1e-3 < value < 1


def test_of_too_many_views_every_nth_is_taken(monkeypatch):
    random = np.random.default_rng(7)
    z = random.standard_normal((1000, 4)).astype(np.float32)
    labels = drawn(random, 2 * z)
    expected = temperature_of(z[::4], labels[::4])
    monkeypatch.setattr(calibration, "MAX_VALUES", 1000)
    assert temperature_of(z, labels) == expected
