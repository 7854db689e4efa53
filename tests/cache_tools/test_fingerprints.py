"""Fingerprints: one text for a value, and every difference is found and named."""

import hashlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmkd.cache_tools.cache.fingerprints import canonical_json, differences, file_sha256, fingerprint, require_same
from mmkd.data_manifests.errors import FingerprintError

quick = settings(deadline=None, database=None, derandomize=True, max_examples=150)
keys = st.text("abc", min_size=1, max_size=2)
leaves = st.none() | st.booleans() | st.integers(-3, 3) | st.floats(-2, 2) | st.text("äb", max_size=2)
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(keys, inner, max_size=3), max_leaves=6
)
fields = st.dictionaries(keys, values, max_size=3)


def test_the_fingerprint_is_the_sha256_of_one_text():
    text = '{"a":[1,2.5,null],"b":{"c":"ä","d":true}}'
    value = {"b": {"d": True, "c": "ä"}, "a": (1, 2.5, None)}
    assert canonical_json(value) == text
    assert fingerprint(value) == hashlib.sha256(text.encode()).hexdigest()


@quick
@given(fields)
def test_order_of_keys_and_a_trip_through_json_change_nothing(value):
    assert fingerprint(dict(reversed(list(value.items())))) == fingerprint(value)
    assert fingerprint(json.loads(json.dumps(value))) == fingerprint(value)


@quick
@given(fields, fields)
def test_fields_differ_exactly_when_their_fingerprints_do(stored, current):
    assert bool(list(differences(stored, current))) == (fingerprint(stored) != fingerprint(current))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, b"bytes", object()])
def test_what_json_cannot_say_is_refused(value):
    with pytest.raises((TypeError, ValueError)):
        fingerprint({"a": value})


def test_each_differing_field_is_named_with_both_values():
    stored = {"views": {"size_px": 224, "frames": 16}, "seed": 0, "flow": None}
    current = {"views": {"size_px": 112, "frames": 16}, "seed": 0, "flow": {"step": 1}}
    assert list(differences(stored, current)) == [
        'flow: cache null, now {"step":1}',
        "views.size_px: cache 224, now 112",
    ]


def test_a_field_that_one_side_lacks_differs_even_from_null():
    assert list(differences({"a": {"b": None}}, {"a": {}})) == ["a.b: only in the cache"]
    assert list(differences({}, {"a": None})) == ["a: only now"]


def test_long_values_that_begin_and_end_alike_can_be_told_apart():
    stored, current = ({"classes": ["x" * 40, middle, "x" * 40]} for middle in ("one", "two"))
    (line,) = differences(stored, current)
    assert len(line) < 150
    cache, now = line.removeprefix("classes: cache ").split(", now ")
    assert cache != now


def test_require_same_says_what_differs_and_what_to_do():
    require_same({"a": 1}, {"a": 1}, what="the teacher", advice="unused")
    with pytest.raises(FingerprintError) as caught:
        require_same({"a": 1, "b": 2}, {"a": 3, "b": 4}, what="the teacher", advice="Build elsewhere")
    assert str(caught.value) == "the teacher differs: a: cache 1, now 3; b: cache 2, now 4. Build elsewhere"


def test_the_hash_of_a_file_is_that_of_its_bytes(tmp_path):
    data = bytes(range(256)) * 5000
    (tmp_path / "file").write_bytes(data)
    assert file_sha256(tmp_path / "file") == hashlib.sha256(data).hexdigest()
