"""Weights files: used with the experts that they were fitted on, refused with any other, never trusted blindly."""

import dataclasses
import json
from pathlib import Path

import pytest

from mmkd.cache_tools.cache.reader import CacheReader
from mmkd.cache_tools.cache.sealed import open_seal, seal
from mmkd.cache_tools.views.held_out import HeldOut
from mmkd.data_manifests.errors import FingerprintError, InputError, MmkdError
from mmkd.data_manifests.manifest import Head
from mmkd.student.teacher.cached_teacher import choose_mixtures
from mmkd.student.teacher.mixing import Mixture
from mmkd.student.teacher.mixture_file import load_mixtures, mixture_file_for, mixtures_from_file, split_spec
from tests.helpers.random_logits import draw_logits, draw_manifest
from tests.helpers.small_cache import write_cache

EXPERT = {"modality": "flow", "weights": "0", "precision": "fp16-minus-row-maximum"}
SCHEMES = {
    "uniform": {head: Mixture({"rgb": 0.5, "flow": 0.5}) for head in ("verb", "noun")},
    "calibrated": {
        "verb": Mixture({"rgb": 0.25, "flow": 0.75}, {"rgb": 0.5, "flow": 2.0}),
        "noun": Mixture({"rgb": 1.0}, {"rgb": 0.7}),
    },
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    directory = tmp_path_factory.mktemp("weights") / "cache"
    manifest = draw_manifest((Head("verb", tuple("abc")), Head("noun", tuple("defghi"))), {"train": 4, "test": 2})
    write_cache(directory, manifest, draw_logits(manifest, {"rgb": 1.0, "flow": 1.0}, {"train": 3, "test": 1}))
    return directory


@pytest.fixture
def reader(root):
    """A reader whose experts have fields, as a real build's have."""
    opened = CacheReader(root)
    for name in ("rgb", "flow"):
        set_expert(opened, name, weights=f"{name}-1", flow={"step": 1})
    return opened


def set_expert(reader, name, **fields):
    """Give a reader's expert other fields, as if another one had been cached."""
    experts = {**reader.init.experts, name: {**reader.init.experts.get(name, EXPERT), **fields}}
    set_experts(reader, experts)


def set_experts(reader, experts):
    held_out = dict.fromkeys(experts, HeldOut(0.0, 0))
    reader.init = dataclasses.replace(reader.init, experts=experts, held_out=held_out)


@pytest.fixture
def path(reader, tmp_path):
    file = tmp_path / "w.json"
    file.write_bytes(mixture_file_for(reader, SCHEMES, {"split": "train"}).to_bytes())
    return file


def changed(path, change):
    """Rewrite the file as a program would that knows the seal."""
    value = open_seal(path.read_bytes())
    change(value)
    path.write_text(json.dumps(seal(value)))
    return path


def test_every_scheme_comes_back(reader, path):
    for scheme, mixtures in SCHEMES.items():
        assert mixtures_from_file(reader, path, scheme) == mixtures
    file = load_mixtures(path)
    assert file.notes == {"split": "train"}
    assert mixture_file_for(reader, SCHEMES, file.notes) == file


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("a/w.json", (Path("a/w.json"), "calibrated")),
        ("a/w.json:softmin", (Path("a/w.json"), "softmin")),
        ("a.json:b/w.json:x", (Path("a.json:b/w.json"), "x")),
        ("uniform", None),
        ("rgb=1,flow=2", None),
    ],
)
def test_a_file_and_its_scheme_are_told_from_other_weights(spec, expected):
    assert split_spec(spec) == expected


def test_weights_are_chosen_from_a_file(reader, path):
    for spec, scheme in ((str(path), "calibrated"), (f"{path}:uniform", "uniform")):
        assert choose_mixtures(reader, spec, weights_temperature=1, train_split="train") == (SCHEMES[scheme], None)


def test_weights_per_sample_are_chosen_by_name(reader):
    expected = Mixture({"rgb": 0.5, "flow": 0.5}, sample_temperature=2.5)
    found, warning = choose_mixtures(reader, "per-sample", weights_temperature=2.5, train_split="train")
    assert (found, warning) == ({"verb": expected, "noun": expected}, None)


def test_another_expert_is_refused_with_what_differs(reader, path):
    set_expert(reader, "flow", weights="flow-2", flow={"step": 2})
    for scheme in SCHEMES:
        with pytest.raises(FingerprintError, match=r"w\.json .*'flow' .*differing: flow\.step, weights.*weigh"):
            mixtures_from_file(reader, path, scheme)


def test_an_expert_that_weighs_nothing_may_be_another(reader, path):
    changed(path, lambda value: value["schemes"].update(alone={"verb": {"rgb": 1}, "noun": {"rgb": 1}}))
    set_expert(reader, "flow", weights="flow-2")
    assert mixtures_from_file(reader, path, "alone")["verb"] == Mixture({"rgb": 1.0})
    set_experts(reader, {"rgb": reader.init.experts["rgb"]})
    assert mixtures_from_file(reader, path, "alone")["verb"] == Mixture({"rgb": 1.0})
    with pytest.raises(FingerprintError, match="'flow', which the cache does not hold"):
        mixtures_from_file(reader, path, "uniform")


def test_a_cache_that_holds_one_expert_more_takes_the_old_weights(reader, path):
    set_expert(reader, "boxes", modality="boxes")
    assert mixtures_from_file(reader, path, "uniform") == SCHEMES["uniform"]


def test_a_cache_of_other_views_or_clips_is_refused(reader, path):
    reader.init = dataclasses.replace(reader.init, base={**reader.init.base, "view_seed": 1})
    with pytest.raises(FingerprintError, match="other clips, classes, views or decoding"):
        mixtures_from_file(reader, path, "uniform")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda v: v.update(schema="mmkd-expert-2"), "is not a weights file; it is the card of an expert"),
        (lambda v: v.update(schema="mmkd-weights-3"), "has schema 'mmkd-weights-3'; this version reads"),
        (lambda v: v.pop("teacher"), "is damaged"),
        (lambda v: v.update(schemes=[]), "is damaged"),
        (lambda v: v["schemes"]["uniform"].update(verb={"rgb": 0.5}), "do not sum to 1"),
        (lambda v: v["schemes"]["uniform"].pop("noun"), r"has weights for verb, the cache's heads are verb, noun"),
        (lambda v: v["schemes"].pop("uniform"), "has no scheme 'uniform'; it has: calibrated"),
        (lambda v: v["schemes"]["uniform"].update(verb={"boxes": 1}), "'boxes', which the cache does not hold"),
        (lambda v: v["teacher"]["experts"].pop("rgb"), "weighs 'rgb' without saying which expert"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line_that_names_it(reader, path, change, reason):
    with pytest.raises((InputError, FingerprintError), match=reason) as caught:
        mixtures_from_file(reader, changed(path, change), "uniform")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "3", '{"schema": 1, "schema": 2}'])
def test_what_is_no_weights_file_is_refused(reader, tmp_path, text):
    (tmp_path / "w.json").write_text(text)
    with pytest.raises(InputError, match=r"w\.json"):
        mixtures_from_file(reader, tmp_path / "w.json", "uniform")
    with pytest.raises(InputError, match="cannot read"):
        mixtures_from_file(reader, tmp_path / "absent.json", "uniform")


def read_or_error(path):
    try:
        return load_mixtures(path)
    except MmkdError as error:
        return error


def test_no_flipped_bit_of_a_weights_file_changes_a_meaning(path, caplog):
    data = path.read_bytes()
    whole = load_mixtures(path)
    for place in range(0, len(data), 3):
        for bit in (0, 1, 5):
            flipped = bytearray(data)
            flipped[place] ^= 1 << bit
            path.write_bytes(bytes(flipped))
            read = read_or_error(path)
            assert read == whole or str(path) in str(read)  # whole: white space may change
    assert not caplog.records


def test_a_weights_file_from_before_the_seal_is_read_with_a_warning(path, caplog):
    value = open_seal(path.read_bytes())
    path.write_text(json.dumps({**value, "schema": "mmkd-weights-1"}))
    assert load_mixtures(path).schemes == SCHEMES
    assert "w.json has no seal" in caplog.text


def test_notes_that_json_cannot_hold_become_null(reader, path):
    path.write_bytes(mixture_file_for(reader, SCHEMES, {"bound": float("inf")}).to_bytes())
    assert load_mixtures(path).notes == {"bound": None}
