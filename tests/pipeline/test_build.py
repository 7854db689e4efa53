"""The build on a tiny data set: what it stores is what the experts say, and stopping it changes no byte."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from mmkd.cache_tools.cache.commits import CommitRecord, read_verified
from mmkd.cache_tools.cache.reader import CacheReader
from mmkd.cache_tools.cache.softmax import kl_divergence
from mmkd.cache_tools.frames.clip_set import ClipSet
from mmkd.cache_tools.layout import group_key
from mmkd.cache_tools.recipes.recipe import load_recipe
from mmkd.cache_tools.upkeep.verify import verify_cache
from mmkd.cache_tools.views.canonical import canonical_view, pixel_hash
from mmkd.data_manifests.errors import InputError, VerificationError
from mmkd.pipeline.experts.expert import load_expert
from mmkd.pipeline.flow.clip_flow import all_pairs, clip_flow, crop_flow, pair_starts
from mmkd.pipeline.recipe import TeacherRecipe
from tests.helpers.commands import ENVIRONMENT, run_command, run_ok
from tests.helpers.in_process import refused


def files_of(cache: Path) -> dict[str, bytes]:
    """All bytes of a cache but the journal's."""
    return {
        path.relative_to(cache).as_posix(): path.read_bytes()
        for path in sorted(cache.rglob("*"))
        if path.is_file() and path.parent.name != "journal"
    }


def recipe_of(tiny) -> TeacherRecipe:
    named = {
        "data.manifest": str(tiny.root / "manifest.jsonl"),
        "data.videos": str(tiny.root / "videos"),
        "data.workers": 0,
        "boxes.files": [str(tiny.root / "bounding_boxes.json")],
    }
    return load_recipe(TeacherRecipe, files=[tiny.root / "teacher.yaml", tiny.root / "tiny.yaml"], named=named)


def test_stored_logits_are_those_of_the_experts_on_that_view(tiny):
    reader, recipe = CacheReader(tiny.root / "cache"), recipe_of(tiny)
    clip_set = ClipSet(recipe.data)
    table = reader.split("train")
    (item,) = clip_set.probe(
        [clip for clip in clip_set.manifest.split("train") if clip.clip_id == table.clip_ids[9]]
    )
    view = table.view(9, 2)
    facts = item.facts
    frames = clip_set.source.read(item.clip.video, np.arange(facts.frame_count), item.video)
    pixels = canonical_view(frames, view, recipe.views.size_px)
    flow = clip_flow(frames, facts, all_pairs(facts, 1), recipe=recipe.flow, device="cpu")
    window = crop_flow(
        flow.select(pair_starts(view.frame_indices, facts, 1)), view, facts, size_px=recipe.views.size_px
    )
    for name, inputs in (("rgb", {"rgb": pixels}), ("flow", {"flow": window})):
        expert = load_expert(tiny.root / "experts" / name, torch.device("cpu"))
        batch = {key: torch.from_numpy(value)[None] for key, value in inputs.items()}
        expected = expert.logits(batch)["action"][0]
        stored = reader.logits("train", name)["action"][9, 2]
        np.testing.assert_allclose(stored, expected, atol=2e-3)
        assert np.ptp(expected) > 0.05, "the comparison must not be between constants"
    assert int(reader.thumbprints("train")[0][9, 2]) == pixel_hash(pixels)


def test_every_row_of_every_split_is_there(tiny):
    reader = CacheReader(tiny.root / "cache")
    assert {name: (layout.rows, layout.views) for name, layout in reader.layouts.items()} == {
        "train": (14, 3),
        "standard": (14, 3),
        "compositional": (14, 3),
    }
    for split in reader.layouts:
        for expert in ("rgb", "flow", "boxes"):
            assert reader.usable(split, expert).all()
            assert np.isfinite(reader.logits(split, expert)["action"]).all()
    assert reader.experts == ("rgb", "flow", "boxes")
    assert max(value for record in reader.records for value in record.worst_kl.values()) < 1e-6


def test_held_out_clips_are_those_that_no_expert_saw(tiny):
    reader = CacheReader(tiny.root / "cache")
    held = reader.held_out.mask(reader.dataset, reader.split("train").clip_ids)
    card = json.loads((tiny.root / "experts" / "rgb" / "expert.json").read_text())
    assert 0 < held.sum() < 14
    assert card["training"]["clips"] == 14 - held.sum()


def test_a_second_build_does_nothing_and_another_worker_count_gives_the_same_bytes(tiny, tmp_path):
    before = files_of(tiny.root / "cache")
    out = run_ok("mmkd-cache", "build", *tiny.stage_one, *tiny.experts, "-o", tiny.root / "cache")
    assert "0 shards built" in out
    assert files_of(tiny.root / "cache") == before
    run_ok("mmkd-cache", "build", *tiny.stage_one, *tiny.experts, "--workers", 2, "-o", tmp_path / "again")
    assert files_of(tmp_path / "again") == before


def start_build(tiny, out: Path) -> subprocess.Popen[str]:
    program = Path(sys.executable).with_name("mmkd-cache")
    command = [program, "build", *tiny.stage_one, "--workers", 1, *tiny.experts, "-o", out]
    return subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)


def wait_for_commits(out: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while len(list(out.glob("commits/*/*/*/*.json"))) < count:
        assert time.monotonic() < deadline, "the build made no progress"
        time.sleep(0.005)


@pytest.mark.parametrize("commits", [1, 5, 9])
def test_a_killed_build_resumes_to_the_same_bytes(tiny, tmp_path, commits):
    process = start_build(tiny, tmp_path / "cache")
    wait_for_commits(tmp_path / "cache", commits)
    process.kill()
    process.communicate()
    assert not (tmp_path / "cache" / "root.json").exists(), "killed too late to mean anything"
    assert "not finished" in refused("mmkd-cache", "export", tmp_path / "cache", tmp_path / "cache.h5")
    run_ok("mmkd-cache", "build", *tiny.stage_one, *tiny.experts, "-o", tmp_path / "cache")
    assert files_of(tmp_path / "cache") == files_of(tiny.root / "cache")


def test_sigterm_stops_cleanly_with_exit_75_and_leaves_no_process(tiny, tmp_path):
    process = start_build(tiny, tmp_path / "cache")
    wait_for_commits(tmp_path / "cache", 1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert "run the same command again" in err
    assert "Traceback" not in err
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(tmp_path) not in listed


def test_any_flipped_bit_is_detected_and_mended_by_repair_and_build(tiny, tmp_path):
    cache = tmp_path / "cache"
    whole = files_of(tiny.root / "cache")
    for name, data in whole.items():
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).write_bytes(data)
    words = np.random.Generator(np.random.Philox(7))
    left = 200
    while left:
        flipped = {}
        for name in words.permutation(sorted(whole))[:left].tolist():
            data = bytearray(whole[name])
            data[words.integers(len(data))] ^= 1 << int(words.integers(8))
            (cache / name).write_bytes(data)
            with pytest.raises((VerificationError, InputError), match=r"build|damaged"):
                read_one(cache, name)
            if "/" not in name:  # root, init or index: nothing below them can be told
                assert name in verify_cache(cache).damaged
            else:
                flipped[name] = data
            (cache / name).write_bytes(whole[name])
        for prefix in ("commits/", "targets.zarr/"):  # what a damaged record vouches for is not looked at
            part = {name: data for name, data in flipped.items() if name.startswith(prefix)}
            for name, data in part.items():
                (cache / name).write_bytes(data)
            damaged = verify_cache(cache).damaged
            assert part.keys() <= damaged.keys()
            assert all("vouches" in damaged[name] for name in damaged.keys() - part.keys())
            for name in part:
                (cache / name).write_bytes(whole[name])
        left -= min(left, len(whole))
    read_everything(cache)
    (cache / "targets.zarr/train/rgb/logits/action/c/0/0/0").write_bytes(b"torn")
    damaged = run_command("mmkd-cache", "verify", cache)
    assert damaged.code == 4
    assert re.search(
        r"targets\.zarr/train/rgb/logits/action/c/0/0/0: its hash .*rgb, train rows 0\.\.7", damaged.out
    )
    assert "shards built" in run_ok("mmkd-cache", "build", *tiny.stage_one, *tiny.experts, "-o", cache)
    assert "compute train/0-0 again" in run_ok("mmkd-cache", "verify", cache, "--repair")
    assert ": 1 shard built" in run_ok("mmkd-cache", "build", *tiny.stage_one, *tiny.experts, "-o", cache)
    assert files_of(cache) == files_of(tiny.root / "cache")
    run_ok("mmkd-cache", "verify", cache)


def read_one(cache: Path, name: str) -> None:
    """Read an object as whoever needs it does; commit records are never served, but built upon."""
    if name.startswith("commits/"):
        CommitRecord.from_bytes((cache / name).read_bytes(), name)
        return
    reader = CacheReader(cache)
    key = name.removeprefix("targets.zarr/")
    read_verified(reader.store, name, reader.objects[key])


def read_everything(cache: Path) -> None:
    reader = CacheReader(cache)
    for key, sha256 in reader.objects.items():
        read_verified(reader.store, group_key(key), sha256)


def test_a_cache_of_other_views_is_refused_field_by_field(tiny, tmp_path):
    arguments = (*tiny.stage_one, *tiny.experts, "-o", tiny.root / "cache", "--set", "view_seed=1")
    result = run_command("mmkd-cache", "build", *arguments)
    assert result.code == 5
    assert re.search(r"base\.view_seed: cache 0, now 1", result.err)
    assert "Traceback" not in result.err


def test_logits_are_stored_as_exactly_as_asked_for_or_the_build_stops(tiny, tmp_path):
    boxes = (*tiny.stage_one, "--expert", tiny.root / "experts" / "boxes")
    stopped = run_command(
        "mmkd-cache", "build", *boxes, "-o", tmp_path / "c", "--precision", "8-bit", "--max-kl", 1e-9
    )
    assert stopped.code == 2
    assert re.search(r"train/0-0, expert boxes, head action: storing logits as 8-bit costs .* choose", stopped.err)
    run_ok("mmkd-cache", "build", *boxes, "-o", tmp_path / "d", "--precision", "9-bit", "--max-kl", 1e-3)
    coarse, fine = CacheReader(tmp_path / "d"), CacheReader(tiny.root / "cache")
    assert coarse.array("train/boxes/logits/action").dtype == np.uint8
    exact, stored = (reader.logits("train", "boxes")["action"] for reader in (fine, coarse))
    ok = fine.usable("train", "boxes")
    error = kl_divergence(exact[ok], stored[ok]).max()
    worst = max(record.worst_kl.get("action", 0) for record in coarse.records)
    assert 0 < error < 1e-3
    assert error <= worst * 1.01 + 1e-6
    assert np.isnan(stored[~ok]).all()


def test_a_full_disk_ends_with_exit_74_and_a_resumable_cache(tiny, tmp_path):
    def limit_file_size() -> None:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1200, 1200))

    program = Path(sys.executable).with_name("mmkd-cache")
    data = ["--facts", tmp_path / "facts"]
    command = [program, "build", *tiny.stage_one, *data, *tiny.experts, "-o", tmp_path / "cache"]
    options = {"capture_output": True, "text": True, "env": ENVIRONMENT, "check": False}
    done = subprocess.run(list(map(str, command)), preexec_fn=limit_file_size, **options)
    assert done.returncode == 74, done.stderr[-500:]
    assert "Traceback" not in done.stderr
    assert str(tmp_path) in done.stderr
    run_ok("mmkd-cache", "build", *tiny.stage_one, *tiny.experts, "-o", tmp_path / "cache")
    assert files_of(tmp_path / "cache") == files_of(tiny.root / "cache")
