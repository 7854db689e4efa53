"""From annotations through a table to a cache: the expert and its logits are those without the table."""

import numpy as np

from mmkd.cache_tools.cache.reader import CacheReader
from tests.helpers.in_process import call_ok
from tests.helpers.tiny_data import stage_one


def test_teach_and_build_take_a_table(tiny, tmp_path):
    table = tmp_path / "boxes.h5"
    source = ("boxes", tiny.root / "bounding_boxes.json", "--form", "something-else")
    call_ok("mmkd-cache", *source, *tiny.data, "-o", table)
    options = stage_one(tiny, boxes=table)
    call_ok("mmkd-cache", "teach", "boxes", *options, "-o", tmp_path / "expert")
    before, after = (
        root / "weights.safetensors" for root in (tiny.root / "experts" / "boxes", tmp_path / "expert")
    )
    assert after.read_bytes() == before.read_bytes()
    call_ok("mmkd-cache", "build", *options, "--expert", tmp_path / "expert", "-o", tmp_path / "cache")
    expected, found = CacheReader(tiny.root / "cache"), CacheReader(tmp_path / "cache")
    for split in expected.layouts:
        assert found.usable(split, "boxes").all()
        logits = found.logits(split, "boxes")["action"]
        np.testing.assert_array_equal(logits, expected.logits(split, "boxes")["action"])
        assert np.ptp(logits) > 0.01
