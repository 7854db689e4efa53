"""What an earlier version wrote opens: experts, a cache and runs of commit cc9a7f6, made by data/make_before.sh."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from tests.helpers.in_process import call, call_ok
from tests.helpers.places import unpack_before


@pytest.fixture
def before(tmp_path, monkeypatch):
    """A copy of the old files that may be written into; recipes name them from there."""
    monkeypatch.chdir(unpack_before(tmp_path))
    return tmp_path


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and "journal" not in path.parts
    }


def test_an_old_cache_verifies_and_is_described(before):
    assert "0 damaged" in call_ok("mmkd-cache", "verify", "cache")
    assert json.loads(call_ok("mmkd-cache", "inspect", "cache", "--json"))["experts"].keys() == {"rgb", "boxes"}


def test_a_build_with_old_experts_finds_an_old_cache_finished(before):
    there = hashes(before / "cache")
    experts = ("--expert", "experts/rgb", "--expert", "experts/boxes")
    report = json.loads(call_ok("mmkd-cache", "build", "-c", "teacher.yaml", *experts, "-o", "cache", "--json"))
    assert (report["shards"], report["skipped_shards"], report["left_shards"]) == (0, 2, 0)
    assert hashes(before / "cache") == there


def test_a_build_today_writes_the_bytes_of_an_old_cache(before):
    # thumbprints and static arrays: an expert's logits depend on the versions of the libraries
    experts = ("--expert", "experts/rgb", "--expert", "experts/boxes")
    call_ok("mmkd-cache", "build", "-c", "teacher.yaml", *experts, "-o", "again")
    old, new = hashes(before / "cache"), hashes(before / "again")
    same = [key for key in old if "/thumbprint/" in key or "/frame_index/" in key or "/facts/" in key]
    assert len(same) > 10
    assert {key: new.get(key) for key in same} == {key: old[key] for key in same}


def test_old_experts_show_no_drift(before):
    experts = ("--expert", "experts/rgb", "--expert", "experts/boxes")
    call_ok("mmkd-cache", "drift", "cache", "-c", "teacher.yaml", *experts)


def test_an_old_run_evaluates_to_its_old_metrics(before):
    old = json.loads((before / "run" / "evaluation.json").read_bytes())["metrics"]["standard"]["action"]
    new = json.loads(call_ok("mmkd-student", "evaluate", "run", "--cache", "cache", "--json"))["standard"]["action"]
    assert (new["count"], new["top1"], new["left_out"]) == (old["count"], old["top1"], old["left_out"])
    assert new["nll"] == pytest.approx(old["nll"], rel=1e-5)
    assert new["teacher_kl"] == pytest.approx(old["teacher_kl"], rel=1e-4)


def test_an_old_stopped_run_continues_or_is_refused_by_name(before):
    shutil.rmtree(before / "run")
    train = ("mmkd-student", "train", "-c", "student.yaml", "--set", "train.epochs=30", "--cache", "cache")
    result = call(*train, "-o", "stopped", "--node-copies", "copies", "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["steps"] == 60
