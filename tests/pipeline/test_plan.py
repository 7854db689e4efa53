"""Plan: bytes and objects before they are written, growth, times, tasks and the disk."""

import dataclasses
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmkd.cache_tools.cache.arrays import encode_block, encode_group, split_arrays
from mmkd.cache_tools.cache.logit_formats import FORMATS, bytes_per_row
from mmkd.cache_tools.layout import SplitLayout
from mmkd.data_manifests.errors import StorageError
from mmkd.pipeline.experts.expert import read_card, write_card
from mmkd.pipeline.forecast.forecast import SHARD_SECONDS, TASK_SHARDS, advise, better_shards
from mmkd.pipeline.forecast.rates import ClipCost, measure_folder
from mmkd.pipeline.forecast.report import Disk, PlanReport, Sizes, SplitForecast
from mmkd.pipeline.forecast.sizes import block_bound, raw_bytes, zstd_bound
from mmkd.pipeline.recipe import TeacherRecipe
from tests.helpers.in_process import call_ok, refused
from tests.helpers.tiny_data import expert, stage_one

MARGIN = 1.35
"""The bound over what the tiny cache takes: small chunks, padded rows of zeros and static numbers compress well."""


def plan(tiny, out: Path, *arguments: object, experts: tuple[str, ...] = ("rgb", "flow", "boxes")) -> dict:
    options = (*stage_one(tiny), *expert(tiny, *experts), "--sample-clips", 2, "-o", out, "--json", *arguments)
    return json.loads(call_ok("mmkd-cache", "plan", *options))


def test_a_folder_of_other_things_is_refused_as_by_build(tiny, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    options = (*stage_one(tiny), *expert(tiny, "rgb"), "-o", tmp_path)
    assert "is not empty and not a cache (it holds notes.txt)" in refused("mmkd-cache", "plan", *options)


def test_a_new_cache_is_predicted_and_not_begun(tiny, tmp_path):
    found = plan(tiny, tmp_path / "new")
    assert not list(tmp_path.iterdir()), "nothing is left behind"
    stored = [path for path in (tiny.root / "cache").rglob("*") if path.is_file()]
    journal = [path for path in stored if path.parent.name == "journal"]
    actual = sum(path.stat().st_size for path in stored)
    sizes = found["sizes"]
    assert sizes["objects_left"] == len(stored) - len(journal)
    assert actual <= sizes["bytes"] <= MARGIN * actual
    assert sizes["bytes_left"] == sizes["bytes"]
    classes, views = 14, (16 + 16 + 16) * 3
    logits = bytes_per_row(FORMATS["fp16"], classes)
    assert sizes["bytes_per_view"] == dict.fromkeys(("rgb", "flow", "boxes"), logits + 1)
    assert sizes["raw_bytes"] == views * (3 * (logits + 1) + 8 + 144)
    for split in ("train", "standard", "compositional"):
        forecast = found["splits"][split]
        assert {name: forecast[name] for name in ("clips", "views", "shards", "shards_left", "clips_left")} == {
            "clips": 14,
            "views": 3,
            "shards": 2,
            "shards_left": 2,
            "clips_left": 14,
        }
        assert forecast["clip_seconds"] == forecast["prepare_seconds"] + forecast["device_seconds"] > 0
        assert forecast["shard_seconds"] == 8 * forecast["clip_seconds"]
    assert found["seconds"] == pytest.approx(sum(14 * split["clip_seconds"] for split in found["splits"].values()))
    assert (found["tasks"], found["advice"], found["exists"]) == (1, [], False)
    assert found["disk"]["folder"] == str(tmp_path)
    assert found["disk"]["needed_bytes"] > sizes["bytes"]


def test_a_finished_cache_needs_nothing_and_growth_only_what_is_new(tiny, tmp_path):
    finished = plan(tiny, tiny.root / "cache")
    assert finished["exists"]
    assert (finished["seconds"], finished["sizes"]["bytes_left"], finished["sizes"]["objects_left"]) == (0, 0, 0)
    more_views = ("--views", 6, "--set", "build.shard_views=3")
    grown = plan(tiny, tiny.root / "cache", *more_views, experts=("boxes",))
    left = {name: (split["shards"], split["shards_left"]) for name, split in grown["splits"].items()}
    assert left == {"train": (4, 2), "standard": (2, 0), "compositional": (2, 0)}
    other = Path(shutil.copytree(tiny.root / "experts" / "boxes", tmp_path / "boxes2"))
    write_card(other, replace(read_card(other), name="boxes2"))
    one_more = plan(tiny, tiny.root / "cache", "--expert", other, experts=())
    assert {split["shards_left"] for split in one_more["splits"].values()} == {2}
    each = finished["sizes"]["bytes"] // 4  # thumbprints, static arrays and three experts
    assert 0 < one_more["sizes"]["bytes_left"] < 2 * each
    assert set(one_more["sizes"]["bytes_per_view"]) == {"rgb", "flow", "boxes", "boxes2"}


def test_what_the_build_would_refuse_is_refused(tiny, tmp_path):
    arguments = ("mmkd-cache", "plan", *stage_one(tiny), *expert(tiny, "rgb"))
    error = refused(*arguments, "-o", tiny.root / "cache", "--set", "view_seed=1", code=5)
    assert "base.view_seed: cache 0, now 1" in error
    (tmp_path / "file").write_text("in the way")
    assert "is a file" in refused(*arguments, "-o", tmp_path / "file" / "cache", "--sample-clips", 1)


@pytest.mark.parametrize("storage", FORMATS.values(), ids=FORMATS)
@given(
    rows=st.sampled_from([1, 7, 64, 128]),
    views=st.integers(1, 3),
    classes=st.integers(1, 300),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=10, deadline=None)
def test_no_object_is_larger_than_its_bound(storage, rows, views, classes, seed):
    layout = SplitLayout("train", rows, views, rows, views)
    specs = split_arrays(layout, {"rgb": storage}, {"action": classes}, thumbnail_size=144)
    objects = encode_group({}, [(spec, layout) for spec in specs], {"train": views})
    random = np.random.default_rng(seed)
    for spec in specs:
        noise = random.bytes(int(np.prod(spec.shape)) * np.dtype(spec.dtype).itemsize)  # cannot be compressed
        block = np.frombuffer(noise, spec.dtype).reshape(spec.shape)
        metadata = objects[f"{spec.name}/zarr.json"]
        (stored,) = encode_block(spec.name, metadata, start=(0, 0), block=block).values()
        assert raw_bytes(json.loads(metadata)) == block.nbytes
        assert len(stored) <= block_bound(json.loads(metadata)) <= 1.02 * block.nbytes + 200 * (1 + rows // 64)


def test_zstd_bound_is_that_of_the_header():
    # zstd.h: ZSTD_COMPRESSBOUND(n) = n + (n >> 8) + (n < 128 KiB ? (128 KiB - n) >> 11 : 0)
    assert [zstd_bound(n) - 4 for n in (0, 2048, 131072, 1 << 20)] == [64, 2048 + 8 + 63, 131584, 1052672]


def test_a_clip_costs_what_its_slowest_stage_costs():
    cost = ClipCost(prepare_seconds=0.4, device_seconds=0.1)
    assert cost.seconds(0, cores=8, device_threads=1) == 0.5
    assert cost.seconds(2, cores=8, device_threads=1) == 0.2, "the workers are the slowest"
    assert cost.seconds(16, cores=64, device_threads=1) == 0.1, "the device is"
    assert cost.seconds(16, cores=2, device_threads=1) == 0.25, "two cores share all the work"
    assert cost.seconds(16, cores=2, device_threads=2) == pytest.approx(0.3)


def forecast(clips: int, shard_rows: int, clip_seconds: float) -> SplitForecast:
    shards = -(-clips // shard_rows)
    return SplitForecast(
        clips, 8, shards, shards, clips, clip_seconds=clip_seconds, shard_seconds=shard_rows * clip_seconds
    )


def recipe(**build: object) -> TeacherRecipe:
    return TeacherRecipe.model_validate({"data": {"manifest": "m", "videos": "v"}, "build": build})


@pytest.mark.parametrize(
    ("clips", "clip_seconds", "tasks"),
    [(169_000, 2.0, 24), (20_000, 0.25, 2), (20_000, 3.0, 5), (20_000, 60.0, 84)],
)
def test_the_advised_layout_has_shards_of_ten_minutes_and_eight_for_each_task(clips, clip_seconds, tasks):
    asked = recipe(views=8, shard_rows=2048)
    splits = {"train": forecast(clips, 2048, clip_seconds)}
    (advice,) = advise(asked, splits, tasks=tasks, fixed=False)
    rows, views = better_shards(asked, splits, tasks=tasks)
    assert f"--set build.shard_rows={rows}" in advice
    assert rows % 64 == 0
    seconds = rows * clip_seconds * (views or 8) / 8
    assert seconds <= SHARD_SECONDS
    assert -(-clips // rows) * 8 // (views or 8) >= TASK_SHARDS * tasks
    assert (views is None) == (64 * clip_seconds <= SHARD_SECONDS)
    (told,) = advise(asked, splits, tasks=tasks, fixed=True)
    assert "the layout of a cache that was started stays" in told


def test_a_good_layout_is_left_alone():
    assert not advise(recipe(), {"train": forecast(40_000, 512, 0.5)}, tasks=2, fixed=False)
    assert not advise(recipe(), {"train": forecast(100, 512, 0.5)}, tasks=1, fixed=False)


def test_a_disk_that_is_too_small_is_refused(tmp_path):
    rate = measure_folder(tmp_path)
    assert not list(tmp_path.iterdir())
    assert rate.bytes_per_second > 0 < rate.object_seconds
    free = shutil.disk_usage(tmp_path).free
    disk = Disk(str(tmp_path), free, free, rate.bytes_per_second, rate.object_seconds, 0.0)
    sizes = Sizes({}, 0, 0, 0, 0)
    report = PlanReport("cache", False, {}, sizes, "cpu", 2, 0.0, 0.0, 0.0, 1, disk)
    report.check()
    larger = dataclasses.replace(report, disk=dataclasses.replace(disk, needed_bytes=free + 1))
    with pytest.raises(StorageError, match=r"cache needs up to .* more, and .* are free") as caught:
        larger.check()
    assert caught.value.exit_code == 74
