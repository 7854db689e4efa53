"""The storage error of a mixed teacher: its bound holds in every corner and against logits in full precision."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmkd.cache_tools.cache.logit_formats import FORMATS
from mmkd.cache_tools.cache.reader import CacheReader
from mmkd.cache_tools.cache.softmax import kl_divergence
from mmkd.data_manifests.manifest import Clip, Head, Manifest
from mmkd.student.teacher.mixing import Mixture, mix_head
from mmkd.student.weighing.storage_error import half_widths, kl_bound, mixture_kl_bound
from tests.helpers.small_cache import write_cache

quick = settings(deadline=None, database=None, derandomize=True, max_examples=100)
EXPERTS = {"rgb": 3.0, "flow": 6.0, "boxes": 1.5}
MIXTURES = {
    "uniform": Mixture(dict.fromkeys(EXPERTS, 1 / 3)),
    "calibrated": Mixture({"rgb": 0.5, "flow": 0.2, "boxes": 0.3}, {"rgb": 0.4, "flow": 2.0, "boxes": 0.25}),
    "alone": Mixture({"flow": 1.0}),
}


def corners(half):
    return [np.array(signs) * half for signs in itertools.product((-1, 1), repeat=len(half))]


@quick
@given(st.integers(0, 2**32), st.floats(1e-6, 3), st.sampled_from([0.5, 1.0, 4.0]))
def test_no_corner_and_no_inner_point_exceeds_the_bound(seed, size, temperature):
    random = np.random.default_rng(seed)
    logits, half = 4 * random.standard_normal(5), size * random.uniform(0, 1, 5)
    bound = kl_bound(logits, half, temperature)
    for error in [*corners(half), *(half * random.uniform(-1, 1, (20, 5)))]:
        assert kl_divergence(logits + error, logits, temperature) <= bound + 1e-15  # its own rounding


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_for_small_errors_the_bound_is_nearly_reached_by_a_corner(temperature):
    random = np.random.default_rng(0)
    for _ in range(20):
        logits, half = 0.5 * random.standard_normal(6), 1e-3 * random.uniform(0.5, 1, 6)
        worst = max(kl_divergence(logits + error, logits, temperature) for error in corners(half))
        assert worst <= kl_bound(logits, half, temperature) < 2.5 * worst


def test_the_bound_by_closed_form_and_at_the_extremes():
    assert kl_bound(np.zeros(7), np.zeros(7), 1.0) == 0
    # Equal classes, equal half-widths h: h^2 / 2 e^(2 h).
    assert kl_bound(np.zeros(7), np.full(7, 0.1), 1.0) == pytest.approx(0.005 * np.exp(0.2))
    assert kl_bound(np.array([0.0, -60_000]), np.array([0, 16.0]), 1.0) == 0, "no probability, no error"
    assert kl_bound(np.zeros(2), np.full(2, 1e4), 1.0) == np.inf


def real_logits(rows=300, views=2, classes=40):
    """Per expert (rows, views, classes), peaked as trained experts' are, at an offset of their own."""
    random = np.random.default_rng(1)
    found = {}
    for name, scale in EXPERTS.items():
        values = scale * random.standard_normal((rows, views, classes))
        values[np.arange(rows), :, random.integers(classes, size=rows)] += 3 * scale
        found[name] = (values + 20 * random.standard_normal()).astype(np.float32)
    return found


def exact_teacher(logits, mixture):
    return sum(
        weight / mixture.temperatures.get(name, 1) * logits[name].astype(np.float64)
        for name, weight in mixture.weights.items()
    )


def check(logits, decoded, storage, mixture, temperature):
    """Return worst measured KL and worst bound; every view's error is within its own bound."""
    usable = {name: np.ones(value.shape[:2], np.bool_) for name, value in decoded.items()}
    stored, _ = mix_head(decoded, usable, mixture, missing="drop")
    measured = kl_divergence(exact_teacher(logits, mixture), stored, temperature)
    widths = half_widths(decoded, dict.fromkeys(decoded, storage))
    bound = mixture_kl_bound(decoded, widths, mixture, temperature=temperature)
    assert measured.shape == bound.shape
    assert (measured <= bound).all()
    return measured.max(), bound.max()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 10.0])
@pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES)
@pytest.mark.parametrize("storage", FORMATS.values(), ids=FORMATS)
def test_the_error_against_logits_in_full_precision_is_within_its_bound(storage, mixture, temperature):
    logits = real_logits()
    decoded = {name: storage.decode(storage.encode(value), classes=40) for name, value in logits.items()}
    measured, bound = check(logits, decoded, storage, mixture, temperature)
    assert bound < 40 * measured, "a bound that far off says nothing"


def test_the_error_of_a_cache_is_within_its_bound(tmp_path):
    logits = real_logits(rows=40)
    clips = tuple(Clip(f"c{row}", f"c{row}.webm", "train", {"action": row % 40}) for row in range(40))
    manifest = Manifest("demo", (Head("action", tuple(map(str, range(40)))),), clips)
    write_cache(tmp_path, manifest, {"train": {name: {"action": value} for name, value in logits.items()}})
    reader = CacheReader(tmp_path)
    decoded = {name: reader.logits("train", name)["action"] for name in EXPERTS}
    measured, bound = check(logits, decoded, reader.storage("rgb"), MIXTURES["calibrated"], 1.0)
    assert 1e-8 < measured < bound < 1e-4


def test_weights_per_sample_have_no_bound():
    logits = real_logits(rows=3)
    mixture = Mixture(dict.fromkeys(EXPERTS, 1 / 3), sample_temperature=1.0)
    with pytest.raises(ValueError, match="no bound"):
        mixture_kl_bound(logits, {}, mixture, temperature=1.0)
