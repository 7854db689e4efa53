"""Drift: a fresh cache passes in other batches, changed numbers are found and named, other teachers are refused."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from mmkd.cache_tools.cache.arrays import decode_block, encode_block
from mmkd.cache_tools.cache.commits import hash_objects, read_commit
from mmkd.cache_tools.cache.fingerprints import file_sha256
from mmkd.cache_tools.cache.init_record import read_init
from mmkd.cache_tools.cache.reader import CacheReader
from mmkd.cache_tools.layout import block_key, commit_key, group_key
from mmkd.cache_tools.recipes.recipe import load_recipe
from mmkd.cache_tools.storage.local_store import LocalStore
from mmkd.cache_tools.tasks.finish import finalize_cache
from mmkd.cache_tools.upkeep.verify import verify_cache
from mmkd.data_manifests.manifest import Clip, Head, Manifest
from mmkd.pipeline.drift.drift import measure_drift
from mmkd.pipeline.drift.sample import draw_sample
from mmkd.pipeline.experts.expert import Expert, load_expert, read_card, write_card
from mmkd.pipeline.recipe import TeacherRecipe
from tests.helpers.in_process import call, call_ok, refused
from tests.helpers.small_cache import write_cache
from tests.helpers.tiny_data import expert, stage_one

SAMPLE = 12


def republish(cache: Path, node: str, array: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Change an array of the split `train` with all its hashes and records: no checksum can tell."""
    store = LocalStore(cache)
    init = read_init(store)
    own = init.fingerprints()[node]
    for shard in init.layouts()["train"].shards():
        record = read_commit(store, shard, node, own)
        metadata = store.read(group_key(f"{array}/zarr.json"))
        key = block_key(array, shard, len(json.loads(metadata)["shape"]))
        start = shard.rows.start, shard.views.start
        region = slice(start[0], start[0] + shard.split.shard_rows), slice(start[1], shard.views.stop)
        block = decode_block(array, metadata, key, data=store.read(group_key(key)), region=region)
        objects = encode_block(array, metadata, start=start, block=change(block))
        for name, data in objects.items():
            store.write(group_key(name), data)
        changed = dataclasses.replace(record, objects={**record.objects, **hash_objects(objects)})
        store.write(commit_key(shard, node, own), changed.to_bytes())
    finalize_cache(store)


@pytest.fixture
def copy(tiny, tmp_path) -> Path:
    return Path(shutil.copytree(tiny.root / "cache", tmp_path / "cache"))


def drift_options(tiny, *names: str) -> list[object]:
    return [*stage_one(tiny), *expert(tiny, *names), "--sample", SAMPLE]


def test_a_fresh_cache_passes(tiny):
    options = drift_options(tiny, "rgb", "flow", "boxes")
    report = json.loads(call_ok("mmkd-cache", "drift", tiny.root / "cache", *options, "--json"))
    assert report["sample"] == SAMPLE
    assert report["pixels"] == {"views": SAMPLE, "rounded": [], "exchanged": []}
    assert list(report["experts"]) == ["rgb", "flow", "boxes"]
    for heads in report["experts"].values():
        assert heads["action"]["views"] == SAMPLE
        assert heads["action"]["max_kl_nats"] < 1e-5
        assert heads["action"]["max_kl_nats"] == heads["action"]["same_pixels_max_kl_nats"]


@dataclasses.dataclass(frozen=True)
class Recording(Expert):
    """An expert that notes the sizes of its batches."""

    sizes: list[int] = dataclasses.field(default_factory=list)

    def logits(self, inputs):
        self.sizes.append(len(next(iter(inputs.values()))))
        return super().logits(inputs)


def test_batches_are_others_than_those_of_the_build(tiny):
    paths = {"data.manifest": tiny.root / "manifest.jsonl", "data.videos": tiny.root / "videos", "data.workers": 0}
    named = {key: str(value) for key, value in paths.items()}
    recipe = load_recipe(TeacherRecipe, files=[tiny.root / "teacher.yaml", tiny.root / "tiny.yaml"], named=named)
    known = load_expert(tiny.root / "experts" / "rgb", torch.device("cpu"))
    recording = Recording(known.card, known.network, known.device)
    report = measure_drift(recipe, (recording,), tiny.root / "cache", sample=20, seed=1)
    assert sum(recording.sizes) == 20
    assert recipe.build.batch_views == 8 not in recording.sizes
    assert report.experts["rgb"]["action"].max_kl_nats < 1e-5
    report.check("cache")


def test_changed_logits_are_found_where_no_checksum_tells(tiny, copy):
    republish(copy, "rgb", "train/rgb/logits/action", lambda block: block * np.float16(3))
    assert not verify_cache(copy).damaged
    result = call("mmkd-cache", "drift", copy, *drift_options(tiny, "rgb", "boxes"))
    assert result.code == 4
    assert re.search(r"expert rgb, head action, drifted by \S+ nats in train/\S+, view \d", result.err)
    assert "Traceback" not in result.err
    assert call("mmkd-cache", "drift", copy, *drift_options(tiny, "boxes")).code == 0
    assert call("mmkd-cache", "drift", copy, *drift_options(tiny, "rgb"), "--max-kl", 1e3).code == 0


def test_pixels_that_differ_are_named_apart_from_networks(tiny, copy):
    republish(copy, "thumbprint", "train/thumbprint/hash", lambda block: block + np.uint64(1))
    options = drift_options(tiny, "rgb")
    report = json.loads(call_ok("mmkd-cache", "drift", copy, *options, "--json"))
    rounded = report["pixels"]["rounded"]
    assert 0 < len(rounded) < SAMPLE, "those of the split train alone"
    assert all(name.startswith("train/") and "mean difference 0.0" in name for name in rounded)
    republish(copy, "thumbprint", "train/thumbprint/thumbnail", lambda block: 255 - block)
    result = call("mmkd-cache", "drift", copy, *options)
    assert result.code == 4
    assert re.search(r"show another frame or crop than the teacher saw, first train/", result.err)


def test_other_data_and_other_experts_are_refused_field_by_field(tiny, tmp_path):
    arguments = ("mmkd-cache", "drift", tiny.root / "cache", *stage_one(tiny))
    error = refused(*arguments, *expert(tiny, "rgb"), "--set", "view_seed=1", code=5)
    assert "base.view_seed: cache 0, now 1" in error
    other = Path(shutil.copytree(tiny.root / "experts" / "rgb", tmp_path / "rgb"))
    weights = load_file(other / "weights.safetensors")
    name = next(name for name in weights if name.endswith("weight"))
    weights[name] = weights[name].copy()
    weights[name].view(np.uint8).flat[0] ^= 1  # the least bit of one weight
    save_file(weights, other / "weights.safetensors")
    card = replace(read_card(other), weights_sha256=file_sha256(other / "weights.safetensors"))
    write_card(other, card)
    assert "experts.rgb.weights: cache" in refused(*arguments, "--expert", other, code=5)
    write_card(other, replace(card, name="stranger"))
    assert "experts.stranger: only now" in refused(*arguments, "--expert", other, code=5)


def test_the_sample_is_a_function_of_its_seed_and_never_an_unusable_view(tmp_path):
    clips = tuple(Clip(f"{split}-{i}", "v.mp4", split, {"action": 0}) for split in ("a", "b") for i in range(9))
    manifest = Manifest("small", (Head("action", ("x", "y")),), clips)
    logits = {split: {"rgb": {"action": np.zeros((9, 2, 2), np.float32)}} for split in ("a", "b")}
    logits["a"]["rgb"]["action"][4] = np.nan
    reader = CacheReader(write_cache(tmp_path, manifest, logits))

    def drawn(sample: int, seed: int) -> list[tuple[str, int, int]]:
        found = draw_sample(reader, ["rgb"], sample=sample, seed=seed)
        return [(item.split, item.row, item.number) for item in found]

    usable = [(split, row, view) for split in "ab" for row in range(9) for view in range(2)]
    assert drawn(1000, 0) == [cell for cell in usable if cell[:2] != ("a", 4)]
    assert drawn(7, 0) == drawn(7, 0) != drawn(7, 1)
    assert len(set(drawn(7, 0))) == 7
