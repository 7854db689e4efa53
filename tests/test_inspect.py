"""`inspect` looks into finished and unfinished caches."""

import json

from .in_process import call_ok


def test_an_unfinished_cache_says_what_is_there_and_what_is_missing(quick, tmp_path):
    whole = json.loads(call_ok("mmkd-cache", "inspect", quick.cache, "--json"))
    assert whole["missing"] == {}
    cache = quick.copy(tmp_path / "cache")
    (cache / "root.json").unlink()
    found = json.loads(call_ok("mmkd-cache", "inspect", cache, "--json"))
    assert found["fingerprint"] is None
    assert {key: found[key] for key in ("dataset", "experts", "splits", "missing")} == {
        key: whole[key] for key in ("dataset", "experts", "splits", "missing")
    }
    (record, *_) = sorted((cache / "commits" / "standard" / "rgb").rglob("*.json"))
    record.unlink()
    found = json.loads(call_ok("mmkd-cache", "inspect", cache, "--json"))
    assert found["missing"] == {"rgb": {"train": 0, "standard": 1}}
    shards = whole["splits"]["standard"]["shards"]
    text = call_ok("mmkd-cache", "inspect", cache)
    assert "fingerprint  none yet" in text
    assert (
        f"missing      rgb: shards 0 of {whole['splits']['train']['shards']} train, 1 of {shards} standard" in text
    )
