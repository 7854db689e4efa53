"""`inspect` looks into finished and unfinished caches."""

import json

from mmkd.cache_tools.upkeep.inspect import LISTED, describe_cache, describe_lines
from mmkd.data_manifests.manifest_file import load_manifest
from mmkd.pipeline.build.work import cached_splits
from mmkd.pipeline.recipe import TeacherRecipe
from tests.helpers.in_process import call_ok


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


def test_clips_without_a_label_are_counted(tmp_path, caplog):
    element = {"id": "1", "label": "a", "template": "A [b]", "placeholders": []}
    files = {"train": [element], "test": [{"id": "2"}, {"id": "3"}], "labels": {"A b": "0", "C": "1"}}
    for name, value in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    splits = [part for name in ("train", "test") for part in ("--split", f"{name}={tmp_path / name}.json")]
    manifest = tmp_path / "m.jsonl"
    options = ["--labels", tmp_path / "labels.json", "-o", manifest]
    said = call_ok("mmkd-cache", "manifest", "something-something", *splits, *options)
    assert "clips train 1, test 2 (2 without a label); classes action 2" in said
    recipe = TeacherRecipe.model_validate({"data": {"manifest": manifest, "videos": tmp_path}})
    caplog.set_level("INFO")
    assert cached_splits(load_manifest(manifest), recipe) == ("train",)
    assert "split test: 2 clips are left out, without a label" in caplog.text


def test_many_unusable_clips_are_counted_by_reason(quick):
    found = describe_cache(quick.cache)
    found["splits"]["train"]["unusable"] = {
        "rgb": [
            {"clip_id": f"{i}", "status": "decode_failed", "reason": f"{kind} {i}.5 s; this clips it"}
            for kind, count in (("video not found:", 2), ("segment outside the video: it ends at", LISTED + 3))
            for i in range(count)
        ]
    }
    lines = describe_lines(found)
    end = lines.index("    ... 5 more; --json lists all; of all clips:")
    assert lines[end + 1 : end + 3] == ["    23 clips: segment outside the video", "    2 clips: video not found"]
