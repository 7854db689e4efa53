"""`init.json` as a type: written as it always was, and refused by the name of the field that is wrong."""

import dataclasses
import json
import tarfile

import pytest

from mmkd.cache_tools.cache.init_record import CacheInit
from mmkd.cache_tools.cache.sealed import seal, unsealed
from mmkd.cache_tools.layout import SCHEMA
from mmkd.data_manifests.errors import InputError, VerificationError
from tests.helpers.places import BEFORE


@pytest.fixture(scope="module")
def written():
    """The bytes of init.json that commit cc9a7f6 wrote."""
    with tarfile.open(BEFORE) as archive:
        return archive.extractfile("./cache/init.json").read()


def changed(data, change):
    """The record with a field changed and a seal that holds."""
    fields = unsealed(data, "here")
    change(fields)
    return json.dumps(seal(fields)).encode()


def test_an_old_record_is_written_again_byte_for_byte(written):
    assert CacheInit.from_bytes(written, "here").to_bytes() == written


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda v: v.pop("splits"), "splits: Field required"),
        (lambda v: v.update(more=1), "more: Unexpected keyword argument"),
        (lambda v: v["base"].pop("view_seed"), r"base\.view_seed: Field required"),
        (lambda v: v["base"].update(view_seed="1"), r"base\.view_seed: should be a valid integer"),
        (lambda v: v["base"]["heads"].update(action=["a", "a"]), r"base\.head 'action' lists class 'a' twice"),
        (lambda v: v["base"]["views"].update(frames=10**9), r"base\..*frames"),
        (lambda v: v["splits"][0].update(rows=True), r"splits\.0\.rows: should be a valid integer"),
        (lambda v: v["splits"][1].update(name="train"), "splits: there is none, or one is there twice"),
        (lambda v: v["experts"]["rgb"].update(precision="fp3"), r"experts\.rgb\..*fp3"),
        (lambda v: v["held_out"].pop("rgb"), "held_out: its experts are not those"),
    ],
)
def test_a_sealed_record_with_a_wrong_field_is_refused_by_the_fields_name(written, change, reason):
    with pytest.raises(VerificationError, match=rf"^here is damaged \({reason}") as caught:
        CacheInit.from_bytes(changed(written, change), "here")
    assert "\n" not in str(caught.value)


def test_a_record_of_another_schema_says_who_reads_it(written):
    with pytest.raises(InputError, match=f"schema 'mmkd-cache-9'; this version reads '{SCHEMA}'"):
        CacheInit.from_bytes(changed(written, lambda v: v.update(schema="mmkd-cache-9")), "here")


def test_each_expert_and_split_is_wanted_once(written):
    init = CacheInit.from_bytes(written, "here")
    wanted = [(shard.name, node) for shard, node, _ in init.wanted()]
    assert wanted == [(s, n) for s in ("train/0-0", "standard/0-0") for n in ("thumbprint", "rgb", "boxes")]
    other = dataclasses.replace(init, experts={**init.experts, "rgb": {**init.experts["rgb"], "weights": "other"}})
    old, new = init.fingerprints(), other.fingerprints()
    assert {node for node in old if old[node] != new[node]} == {"rgb"}
