"""Merging caches over disjoint clips: what one cache over all holds, byte for byte, or a refusal by name."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest

from mmkd.cache_tools.cache.commits import CommitRecord
from mmkd.cache_tools.cache.reader import CacheReader
from mmkd.cache_tools.upkeep.merge import merge_caches
from mmkd.cache_tools.upkeep.verify import verify_cache
from mmkd.data_manifests.errors import FingerprintError, InputError
from mmkd.data_manifests.manifest import Manifest
from mmkd.data_manifests.manifest_file import save_manifest
from tests.helpers.in_process import call_ok, refused
from tests.helpers.many_clips import files_of, logits_of, manifest_of
from tests.helpers.small_cache import write_cache

WHOLE = manifest_of(range(23))
PARTS = [manifest_of(range(0, 23, 2)), manifest_of([1, 21, 5, 7, 9, 11, 13, 15, 17, 19, 3])]
"""Every second clip; and the others, in another order."""


@pytest.fixture(scope="module", autouse=True)
def no_waiting_for_the_disk():
    """Thousands of small files: what survives a power cut is not what these tests are about."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


def write(root, manifest, **options):
    write_cache(root, manifest, logits_of(manifest), **({"shard_rows": 4, "shard_views": 2} | options))
    return root


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    return [write(folder / str(number), part) for number, part in enumerate(PARTS)]


@pytest.mark.parametrize("blocks", [{}, {"shard_rows": 5, "shard_views": 4}, {"precision": "12-bit"}])
def test_merged_parts_are_the_whole_byte_for_byte(parts, blocks, tmp_path):
    """Also when the second cache has other blocks of rows and views."""
    sources = list(parts)
    if "precision" in blocks:
        sources = [write(tmp_path / str(number), part, **blocks) for number, part in enumerate(PARTS)]
    elif blocks:
        sources[1] = write(tmp_path / "1", PARTS[1], **blocks)
    precision = {key: value for key, value in blocks.items() if key == "precision"}
    whole = write(tmp_path / "whole", WHOLE, **precision)
    report = merge_caches(sources, tmp_path / "merged", WHOLE)
    assert files_of(tmp_path / "merged") == files_of(whole)
    assert report.clips == {"test": 8, "train": 15}
    assert report.fingerprint == CacheReader(whole).fingerprint
    assert not verify_cache(tmp_path / "merged").damaged


def test_a_split_that_one_cache_has_and_any_order_of_the_manifest(tmp_path):
    tests, trains = manifest_of(range(0, 12, 3)), manifest_of([1, 2, 4, 5, 7])
    whole = Manifest("demo", WHOLE.heads, (*reversed(trains.clips), *tests.clips), True)
    sources = [write(tmp_path / "a", tests), write(tmp_path / "b", trains)]
    merge_caches(sources, tmp_path / "merged", whole)
    assert files_of(tmp_path / "merged") == files_of(write(tmp_path / "whole", whole))


def test_the_largest_error_and_the_reasons_come_along(parts, tmp_path):
    sources = [tmp_path / "0", parts[1]]
    write(sources[0], PARTS[0])
    for path in (sources[0] / "commits").rglob("*.json"):
        record = CommitRecord.from_bytes(path.read_bytes(), "")
        if record.node == "flow":
            record = CommitRecord(**{**vars(record), "worst_kl": {"verb": 3e-7, "noun": 1e-7}})
            path.write_bytes(record.to_bytes())
    call_ok("mmkd-cache", "finalize", sources[0])
    merge_caches(sources, tmp_path / "merged", WHOLE)
    merged = CacheReader(tmp_path / "merged")
    flow = [record for record in merged.records if record.node == "flow"]
    assert all(record.worst_kl == {"verb": 3e-7, "noun": 1e-7} for record in flow)
    status = merged.status("train", "flow")
    clips = WHOLE.split("train")
    for item in merged.unusable("train")["flow"]:
        assert item.clip_id == clips[item.row].clip_id
        assert item.reason == "as the test wants it"
    assert {item.row for item in merged.unusable("train")["flow"]} == set(np.flatnonzero(status.any(1)).tolist())


def test_what_does_not_belong_together_is_refused_field_by_field(parts, tmp_path):
    other = write(tmp_path / "coarse", PARTS[1], precision="8-bit")
    with pytest.raises(FingerprintError, match=r"experts\.flow\.precision: cache \"fp16"):
        merge_caches([parts[0], other], tmp_path / "out", WHOLE)
    renamed = Manifest("another", WHOLE.heads, WHOLE.clips, True)
    with pytest.raises(FingerprintError, match='dataset: cache "demo", now "another"'):
        merge_caches(parts, tmp_path / "out", renamed)
    assert not (tmp_path / "out").exists()


def test_clips_are_refused_by_name(parts, tmp_path):
    out = tmp_path / "out"
    overlapping = write(tmp_path / "overlapping", manifest_of([1, 3, 4, 5]))
    with pytest.raises(InputError, match="clip 'clip-4' is in both"):
        merge_caches([parts[0], overlapping], out, WHOLE)
    with pytest.raises(InputError, match="in none of the caches, the first is 'clip-3'"):
        merge_caches(parts[:1], out, WHOLE)
    with pytest.raises(InputError, match="clip 'clip-22' is of split 'train', the manifest lacks it"):
        merge_caches(parts, out, manifest_of(range(22)))
    with pytest.raises(InputError, match=r"the views of clip .* are not those that this manifest gives"):
        merge_caches(parts, out, manifest_of(range(23), flip_allowed=False))
    wrong = replace(WHOLE.clips[2], labels={**WHOLE.clips[2].labels, "verb": 0})
    clips = (*WHOLE.clips[:2], wrong, *WHOLE.clips[3:])
    with pytest.raises(InputError, match="clip 'clip-2' has verb label 2, the manifest 0"):
        merge_caches(parts, out, Manifest("demo", WHOLE.heads, clips, True))
    with pytest.raises(InputError, match="is one of the caches to merge"):
        merge_caches(parts, parts[0], WHOLE)
    with pytest.raises(InputError, match="holds a cache already"):
        merge_caches(parts, overlapping, WHOLE)
    assert not out.exists()


def test_a_stopped_merge_is_no_cache_and_goes_on(parts, tmp_path, monkeypatch):
    calls = iter(range(6))
    from mmkd.cache_tools.upkeep import merge as module

    publish = module.publish

    def dying(*arguments):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        publish(*arguments)

    monkeypatch.setattr(module, "publish", dying)
    with pytest.raises(KeyboardInterrupt):
        merge_caches(parts, tmp_path / "merged", WHOLE)
    with pytest.raises(InputError, match="is not finished"):
        CacheReader(tmp_path / "merged")
    monkeypatch.setattr(module, "publish", publish)
    merge_caches(parts, tmp_path / "merged", WHOLE)
    assert files_of(tmp_path / "merged") == files_of(write(tmp_path / "whole", WHOLE))


def test_commands(parts, tmp_path):
    save_manifest(WHOLE, tmp_path / "all.jsonl")
    options = ["--manifest", tmp_path / "all.jsonl", "-o", tmp_path / "merged"]
    found = json.loads(call_ok("mmkd-cache", "merge", *parts, *options, "--json"))
    assert found["clips"] == {"test": 8, "train": 15}
    call_ok("mmkd-cache", "inspect", tmp_path / "merged")
    assert "in none of the caches" in refused("mmkd-cache", "merge", parts[0], *options[:3], tmp_path / "x")
