"""Metrics against closed forms and slow, readable references."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmkd.student.evaluation.metrics import average_views, clip_scores, evaluate


def binary_logits(confidences):
    """Two-class logits whose class 0 has the given probabilities."""
    p = np.array(confidences, np.float64)
    return np.stack([np.log(p), np.log1p(-p)], 1)


def test_calibration_error_closed_form():
    # Bin (0.6, 0.667]: confidence 0.65, half right. Bin (0.867, 0.933]: confidence 0.9, all right.
    logits = binary_logits([0.65, 0.65, 0.9, 0.9])
    labels = np.array([0, 1, 0, 0])
    expected = 0.5 * abs(0.5 - 0.65) + 0.5 * abs(1.0 - 0.9)
    assert evaluate(logits, labels).ece == pytest.approx(expected, rel=1e-9)


def test_gaps_of_opposite_sign_cancel_within_a_bin_but_not_between_bins():
    logits = binary_logits([0.61, 0.66])  # one bin: mean confidence 0.635, accuracy 0.5
    assert evaluate(logits, np.array([0, 1])).ece == pytest.approx(0.135, rel=1e-9)
    apart = clip_scores(logits, np.array([0, 1])).calibration_error(100)
    assert apart == pytest.approx((0.39 + 0.66) / 2, rel=1e-9)


def test_a_confidence_on_an_edge_belongs_to_the_bin_below():
    logits = np.array([[0.0, 0.0], [np.log(3.0), 0.0]])  # confidences 1/2 and 3/4; right, wrong
    error = clip_scores(logits, np.array([0, 1])).calibration_error(2)
    assert error == pytest.approx((0.5 + 0.75) / 2, rel=1e-9)


def slow_calibration_error(logits, labels, bins):
    total = 0.0
    rows = [row for row in range(len(labels)) if labels[row] >= 0]
    for number in range(bins):
        low, high = number / bins, (number + 1) / bins
        members = []
        for row in rows:
            weights = [math.exp(value - max(logits[row])) for value in logits[row].tolist()]
            probabilities = [weight / sum(weights) for weight in weights]
            confidence = max(probabilities)
            if low < confidence <= high:
                members.append((confidence, probabilities.index(confidence) == labels[row]))
        if members:
            accuracy = sum(right for _, right in members) / len(members)
            confidence = sum(value for value, _ in members) / len(members)
            total += len(members) / len(rows) * abs(accuracy - confidence)
    return total


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 40), classes=st.integers(2, 7))
def test_calibration_error_equals_a_slow_reference(seed, rows, classes):
    draw = np.random.default_rng(seed)
    logits = draw.normal(scale=2, size=(rows, classes))
    labels = draw.integers(-1, classes, rows)
    labels[0] = 0
    expected = slow_calibration_error(logits, labels, 15)
    assert evaluate(logits, labels).ece == pytest.approx(expected, abs=1e-9)


def test_certain_and_right_is_calibrated_certain_and_wrong_is_not():
    logits = np.array([[1e4, 0.0], [1e4, 0.0]], np.float32)
    assert evaluate(logits, np.array([0, 0])).ece == 0
    assert evaluate(logits, np.array([1, 1])).ece == 1


def test_top_k_counts_ranks_and_gives_ties_to_the_lower_class():
    logits = np.array([[3.0, 2.0, 1.0], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    labels = np.array([1, 0, 2])
    assert clip_scores(logits, labels).top_k(1) == pytest.approx(1 / 3)
    assert clip_scores(logits, labels).top_k(2) == pytest.approx(2 / 3)
    assert clip_scores(logits, labels).top_k(5) == 1


def test_negative_log_likelihood_closed_form():
    logits = binary_logits([0.25, 0.5])
    expected = (-math.log(0.25) - math.log(0.5)) / 2
    assert evaluate(logits, np.array([0, 1])).nll == pytest.approx(expected)


def test_rows_without_label_are_left_out_even_when_not_finite():
    logits = np.array([[2.0, 0.0], [np.nan, 0.0], [0.0, 2.0]], np.float32)
    result = evaluate(logits, np.array([0, -1, 0]))
    assert (result.count, result.top1, result.top5) == (2, 0.5, 1.0)


def test_no_labelled_row_gives_nan_and_count_zero():
    result = evaluate(np.zeros((2, 3), np.float32), np.array([-1, -1]))
    assert result.count == 0
    assert all(math.isnan(value) for value in (result.top1, result.top5, result.ece, result.nll))


def test_average_views_is_the_mean_of_logits():
    logits = np.array([[[1.0, 0.0], [3.0, 2.0]]], np.float32)
    averaged = average_views(logits)
    assert averaged.dtype == np.float32
    np.testing.assert_array_equal(averaged, [[2.0, 1.0]])


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (np.zeros((2, 3)), np.array([0]), "need logits"),
        (np.zeros((2, 3)), np.array([0, 3]), "labels must be"),
        (np.zeros((2, 3)), np.array([0, -2]), "labels must be"),
        (np.array([[np.inf, 0.0]]), np.array([0]), "NaN or infinity"),
    ],
)
def test_wrong_input_is_refused(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        evaluate(logits, labels)
