"""How logits are stored: round trips within fp16's error, KL against torch, and what is refused."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch.nn import functional

from mmkd.cache_tools.cache.logit_formats import decode_logits, encode_logits
from mmkd.cache_tools.cache.softmax import kl_divergence, log_softmax

quick = settings(deadline=None, database=None, derandomize=True, max_examples=150)
rows = arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.integers(1, 20)),
    elements=st.floats(-30_000, 30_000, width=32),
)


@quick
@given(rows)
def test_a_round_trip_is_off_by_the_rounding_of_fp16_at_most(logits):
    shifted, maximum = encode_logits(logits)
    assert (shifted.dtype, maximum.dtype) == (np.float16, np.float32)
    assert (shifted.max(axis=-1) == 0).all()
    np.testing.assert_array_equal(maximum, logits.max(axis=-1))
    below = maximum[..., None].astype(np.float64) - logits
    # Half a unit of fp16 (2^-11, or 2^-25 where subnormal), and float32's two roundings of sums of up to 60,000.
    bound = np.maximum(below * 2**-11, 2**-25) + 2 * np.spacing(np.abs(logits).max(initial=0) + below)
    assert (np.abs(decode_logits(shifted, maximum).astype(np.float64) - logits) <= bound).all()


def test_logits_that_fp16_holds_are_stored_exactly():
    logits = np.array([[[3.0, -1.5, 0.25], [-2048.0, -4096.0, -2049.0]]], np.float32)
    shifted, maximum = encode_logits(logits)
    np.testing.assert_array_equal(shifted, [[[0, -4.5, -2.75], [0, -2048, -1]]])
    np.testing.assert_array_equal(maximum, [[3, -2048]])
    np.testing.assert_array_equal(decode_logits(shifted, maximum), logits)


def test_the_error_of_realistic_logits_is_below_a_millionth_of_a_nat_and_does_not_grow_with_an_offset():
    logits = 4 * np.random.default_rng(0).standard_normal((500, 174)).astype(np.float32)
    for offset in (0, 1000):
        moved = logits + np.float32(offset)
        for temperature in (1, 4, 10):
            assert kl_divergence(moved, decode_logits(*encode_logits(moved)), temperature).max() < 1e-6
    raw = (logits + np.float32(1000)).astype(np.float16).astype(np.float32)
    assert kl_divergence(logits, raw).max() > 1e-3, "raw fp16 is what this format is better than"


def test_nan_rows_stay_nan():
    decoded = decode_logits(np.full((2, 3), np.nan, np.float16), np.full(2, np.nan, np.float32))
    assert np.isnan(decoded).all()


@pytest.mark.parametrize(
    "row", [[0, np.nan], [0, np.inf], [0, -np.inf], [0, -65505], [65505, 0], [3e38, -3e38], [np.inf, np.inf]]
)
def test_what_fp16_cannot_hold_is_refused(row):
    with pytest.raises(ValueError, match="finite and lie within 65504"):
        encode_logits(np.array([[0, 0], row], np.float32))


def test_the_largest_distance_that_fits_is_stored():
    shifted, maximum = encode_logits(np.array([[0, -65504]], np.float32))
    np.testing.assert_array_equal(decode_logits(shifted, maximum), [[0, -65504]])
    assert encode_logits(np.zeros((0, 3), np.float32))[0].shape == (0, 3)


@quick
@given(rows)
def test_log_softmax_is_that_of_torch(logits):
    expected = torch.log_softmax(torch.from_numpy(logits).double(), dim=-1)
    np.testing.assert_allclose(log_softmax(logits.astype(np.float64)), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kl_is_that_of_torch_and_never_negative(temperature):
    random = np.random.default_rng(3)
    p, q = 5 * random.standard_normal((2, 6, 4, 10)).astype(np.float32)
    log_p, log_q = (torch.log_softmax(torch.from_numpy(x).double() / temperature, -1) for x in (p, q))
    expected = functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    np.testing.assert_allclose(kl_divergence(p, q, temperature), expected, rtol=1e-10)
    assert kl_divergence(p, p, temperature).max() == 0
    assert kl_divergence(p, p + np.float32(1e-6)).min() >= 0


def test_kl_by_closed_form():
    even, uneven = np.zeros((1, 2), np.float32), np.log(np.array([[3, 1]], np.float32))
    expected = 0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(0.5 / 0.25)
    np.testing.assert_allclose(kl_divergence(even, uneven), expected, rtol=1e-6)
