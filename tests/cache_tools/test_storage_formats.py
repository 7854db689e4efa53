"""The formats of stored logits: sizes, error bounds, order kept, against a slow packing and the table of errors."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from mmkd.cache_tools.cache.logit_formats import (
    FORMAT,
    FORMATS,
    MAX_RANGE,
    SquareCompanded,
    bytes_per_row,
    encode_logits,
    format_of,
    pack,
    storable,
    unpack,
    worst_kl,
)
from mmkd.cache_tools.cache.softmax import kl_divergence
from mmkd.data_manifests.errors import InputError

quick = settings(deadline=None, database=None, derandomize=True, max_examples=80)
formats = pytest.mark.parametrize("storage", FORMATS.values(), ids=FORMATS)
companded = pytest.mark.parametrize("storage", [SquareCompanded(bits) for bits in (8, 9, 10, 12, 16)], ids=str)

ordinary = st.floats(-30, 30, width=32)
extreme = st.one_of(
    ordinary,
    st.sampled_from([0.0, -0.0, 1e-45, 1e-8, 3.0, -65504.0, 32752.0, 32751.998]),
    st.floats(-32752, 32752, width=32),
)
shapes = array_shapes(min_dims=2, max_dims=3, max_side=20)
row_blocks = st.one_of(arrays(np.float32, shapes, elements=ordinary), arrays(np.float32, shapes, elements=extreme))
"""(..., C) logits, many of them tied, with ranges from 0 to just above what is stored."""


def stored(storage, logits):
    return storage.decode(storage.encode(logits), classes=logits.shape[-1])


def storable_rows(logits):
    return logits.reshape(-1, logits.shape[-1])[storable(logits).ravel()]


# ---- shapes and sizes


@formats
@pytest.mark.parametrize("classes", [1, 2, 3, 7, 8, 9, 97, 174, 300, 3806])
def test_encoded_arrays_are_the_parts_that_the_format_announces(storage, classes):
    logits = np.random.default_rng(classes).standard_normal((3, 2, classes)).astype(np.float32)
    arrays_of = storage.encode(logits)
    parts = {part.name: part for part in storage.parts(classes)}
    assert list(arrays_of) == list(parts)
    for name, value in arrays_of.items():
        assert (value.dtype, value.shape) == (np.dtype(parts[name].dtype), (3, 2, *parts[name].shape))
    assert bytes_per_row(storage, classes) * 6 == sum(value.nbytes for value in arrays_of.values())


@pytest.mark.parametrize("classes", [1, 2, 5, 97, 174, 300, 3806])
def test_bytes_per_row_by_hand(classes):
    found = {key: bytes_per_row(storage, classes) for key, storage in FORMATS.items()}
    assert found == {
        "fp16": 2 * classes + 4,
        "12-bit": math.ceil(12 * classes / 8) + 8,
        "9-bit": math.ceil(9 * classes / 8) + 8,
        "8-bit": classes + 8,
    }


@quick
@given(st.data(), st.integers(8, 16), array_shapes(max_dims=3, max_side=11))
def test_packing_is_that_of_text_and_comes_back(data, bits, shape):
    integers = data.draw(arrays(np.uint16, shape, elements=st.integers(0, 2**bits - 1)))
    packed = pack(integers, bits)
    rows, bytes_of = integers.reshape(-1, shape[-1]), packed.reshape(-1, packed.shape[-1])
    for row, found in zip(rows.tolist(), bytes_of.tolist(), strict=True):
        high = "".join(f"{value >> 8:0{bits - 8}b}" for value in row) if bits > 8 else ""
        high += "0" * (-len(high) % 8)
        assert found == [value & 255 for value in row] + [int(high[i : i + 8], 2) for i in range(0, len(high), 8)]
    np.testing.assert_array_equal(unpack(packed, bits, classes=shape[-1]), integers)


@pytest.mark.parametrize("bits", [0, 7, 17])
def test_other_widths_are_refused(bits):
    with pytest.raises(ValueError, match="8 to 16 bits"):
        SquareCompanded(bits)


def test_fp16_writes_what_encode_logits_writes():
    logits = np.random.default_rng(0).standard_normal((4, 3, 11)).astype(np.float32)
    parts, (shifted, maximum) = FORMATS["fp16"].encode(logits), encode_logits(logits)
    np.testing.assert_array_equal(parts["logits"], shifted)
    np.testing.assert_array_equal(parts["maximum"], maximum)


@formats
def test_formats_are_found_by_the_name_that_metadata_has(storage):
    assert format_of(storage.name) is storage
    assert FORMATS[storage.key] is storage


def test_an_unknown_format_is_refused_with_the_known_ones():
    assert format_of(FORMAT).key == "fp16"
    with pytest.raises(
        InputError, match=r"'bf16', which this version cannot read; it reads fp16-minus-row-maximum"
    ):
        format_of("bf16")


# ---- errors


@formats
@quick
@given(row_blocks)
def test_no_value_is_off_by_more_than_its_bound(storage, logits):
    rows = storable_rows(logits)
    decoded = stored(storage, rows)
    bound = storage.error_bound(decoded)
    assert (np.abs(decoded.astype(np.float64) - rows) <= bound).all()


@formats
def test_the_bound_is_not_much_larger_than_the_errors_there_are(storage):
    logits = 4 * np.random.default_rng(0).standard_normal((2000, 174)).astype(np.float32)
    decoded = stored(storage, logits)
    used = np.abs(decoded.astype(np.float64) - logits) / storage.error_bound(decoded)
    assert 0.9 < used.max() <= 1
    assert 0.35 < used.mean() < 0.55  # uniform errors would give 0.5


@companded
def test_companded_values_by_closed_form(storage):
    q = np.array([storage.largest, 0, 1, storage.largest // 2, 200])
    logits = (-2 * (q / storage.largest) ** 2).astype(np.float32)[None]
    parts = storage.encode(logits)
    np.testing.assert_array_equal(unpack(parts["logits"], storage.bits, classes=5), q[None])
    assert (parts["maximum"][0], parts["range"][0]) == (0, 2)
    np.testing.assert_allclose(stored(storage, logits), logits, rtol=2**-23, atol=0)


@companded
def test_stored_values_are_stored_again_without_change(storage):
    logits = 4 * np.random.default_rng(1).standard_normal((50, 97)).astype(np.float32)
    once = stored(storage, logits)
    assert np.abs(stored(storage, once) - once).max() <= 2 * np.spacing(np.abs(once).max())


# The synthetic rows: normal logits of four spreads, at every temperature of 1..10.
@pytest.mark.parametrize("classes", [97, 174, 300, 3806])
def test_the_table_of_worst_errors(classes):
    random = np.random.default_rng(classes)
    rows = 2000 if classes < 1000 else 100
    logits = np.concatenate([s * random.standard_normal((rows // 4, classes)) for s in (1, 2, 4, 8)])
    worst = {key: worst_kl(storage, logits.astype(np.float32)) for key, storage in FORMATS.items()}
    assert 5e-8 < worst["fp16"] < 1e-6
    assert 2e-7 < worst["12-bit"] < 1e-6
    assert 1e-5 < worst["9-bit"] < 1e-4
    assert 5e-5 < worst["8-bit"] < 4e-4
    assert list(worst.values()) == sorted(worst.values()), "the formats are listed the most exact first"


def test_worst_kl_is_the_largest_over_rows_and_temperatures():
    logits = 8 * np.random.default_rng(5).standard_normal((6, 2, 30)).astype(np.float32)
    storage = FORMATS["8-bit"]
    divergences = [kl_divergence(logits, stored(storage, logits), t).max() for t in range(1, 11)]
    assert worst_kl(storage, logits) == max(divergences)
    assert worst_kl(storage, logits, (7,)) == divergences[6]
    with_gap = logits.copy()
    with_gap[0] = np.nan
    assert worst_kl(storage, with_gap) == worst_kl(storage, logits[1:])
    assert worst_kl(storage, with_gap[:1]) == 0


def test_one_logit_far_below_costs_the_companded_formats_their_precision_but_not_fp16():
    logits = 4 * np.random.default_rng(6).standard_normal((200, 97)).astype(np.float32)
    logits[:, 0] = -60_000
    assert worst_kl(FORMATS["fp16"], logits) < 1e-6
    assert worst_kl(FORMATS["12-bit"], logits) > 1e-4, "then the module's docstring is wrong"


# ---- order


@companded
@quick
@given(row_blocks)
def test_the_set_of_largest_classes_is_kept(storage, logits):
    rows = storable_rows(logits)
    decoded = stored(storage, rows)
    largest = rows == rows.max(-1, keepdims=True)
    np.testing.assert_array_equal(decoded == decoded.max(-1, keepdims=True), largest)
    np.testing.assert_array_equal(decoded[largest], rows[largest])


@companded
def test_a_step_that_float32_cannot_show_beside_a_large_maximum_still_keeps_the_order(storage):
    maximum = np.float32(100)
    near = np.nextafter(maximum, np.float32(0))
    # With this range near is stored as q = 1, which is less than half of float32's step away from the maximum.
    extent = float(maximum - near) * storage.largest**2 / 2.2
    logits = np.array([[near, maximum, maximum - extent]], np.float32)
    decoded = stored(storage, logits)
    assert decoded[0].argmax() == 1
    np.testing.assert_array_equal(decoded[0, :2], logits[0, :2])


def test_fp16_keeps_argmax_but_for_differences_below_its_smallest_step():
    storage = FORMATS["fp16"]
    near = np.array([[1 - 2**-24, 1.0], [4e-8, 5e-8]], np.float32)
    np.testing.assert_array_equal(stored(storage, near).argmax(-1), [1, 0])
    random = np.random.default_rng(7)
    logits = 4 * random.standard_normal((20_000, 97)).astype(np.float32)
    np.testing.assert_array_equal(stored(storage, logits).argmax(-1), logits.argmax(-1))


@formats
@quick
@given(row_blocks)
def test_no_two_values_change_places(storage, logits):
    rows = storable_rows(logits)
    decoded = np.take_along_axis(stored(storage, rows), rows.argsort(-1), -1)
    assert (np.diff(decoded, axis=-1) >= 0).all()


# ---- rows that hold nothing, and rows that cannot be held


@formats
def test_nan_rows_stay_nan_and_leave_others_alone(storage):
    logits = np.random.default_rng(8).standard_normal((3, 2, 13)).astype(np.float32)
    whole = storage.encode(logits)
    logits[1, 0] = np.nan
    parts = storage.encode(logits)
    decoded = storage.decode(parts, classes=13)
    assert np.isnan(decoded[1, 0]).all()
    assert np.isnan(decoded).sum() == 13
    for part in storage.parts(13):
        np.testing.assert_array_equal(parts[part.name][1, 0], np.full(part.shape, part.fill))
        np.testing.assert_array_equal(np.delete(parts[part.name], 1, 0), np.delete(whole[part.name], 1, 0))
    assert np.isnan(storage.error_bound(decoded)[1, 0]).all()


@formats
@pytest.mark.parametrize(
    "row", [[0, np.nan], [0, np.inf], [0, -np.inf], [0, -65505], [65505, 0], [3e38, -3e38], [np.inf, np.inf]]
)
def test_what_cannot_be_stored_is_refused(storage, row):
    logits = np.array([[0, 0], row], np.float32)
    np.testing.assert_array_equal(storable(logits), [True, False])
    with pytest.raises(ValueError, match="finite and lie within 65504"):
        storage.encode(logits)


@formats
@pytest.mark.parametrize(
    "row",
    [
        [0, -MAX_RANGE],
        [32752, -32752],
        [3e38, 3e38],
        [-3.4e38, -3.4e38],
        [1e10, 1e10 - 2048],
        [1e-45, 0],
        [np.finfo(np.float32).max, np.finfo(np.float32).max],
        [np.finfo(np.float32).min, np.finfo(np.float32).min],
    ],
)
def test_the_extremes_that_fit_are_stored(storage, row):
    logits = np.array([row], np.float32)
    decoded = stored(storage, logits)
    assert np.isfinite(decoded).all()
    assert (np.abs(decoded.astype(np.float64) - logits) <= storage.error_bound(decoded)).all()
    assert decoded.max() == logits.max()


@formats
def test_nothing_and_equal_classes(storage):
    assert stored(storage, np.zeros((0, 3, 5), np.float32)).shape == (0, 3, 5)
    equal = np.full((2, 9), -7.25, np.float32)
    np.testing.assert_array_equal(stored(storage, equal), equal)
    np.testing.assert_array_equal(stored(storage, equal[:, :1]), equal[:, :1])
