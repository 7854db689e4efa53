"""The README's Something-Something commands on nine real clips with real boxes, cut down to tiny networks."""

import json
from dataclasses import dataclass
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from mmkd.cache_tools.cache.reader import CacheReader
from mmkd.cache_tools.frames.clip_set import ClipSet
from mmkd.cache_tools.layout import Status
from mmkd.cache_tools.recipes.recipe import load_recipe
from mmkd.cache_tools.views.canonical import pixel_hash, thumbnail
from mmkd.data_manifests.manifest_file import load_manifest
from mmkd.pipeline.flow.scratch import FlowStore
from mmkd.pipeline.recipe import TeacherRecipe
from tests.helpers.in_process import call, call_ok
from tests.helpers.places import DATA, needs_data

REAL = DATA / "something_something"
BOXES = REAL / "bounding_box_annotations.json"
pytestmark = needs_data

TRAIN, VALIDATION = ("80962", "2", "13201"), ("57082", "3201")
LABELS = {
    "80962": "Poking something so it slightly moves",
    "2": "Pretending to pick something up",
    "13201": "Pretending to sprinkle air onto something",
    "57082": "Dropping something into something",
    "3201": "Moving away from something with your camera",
}
TINY_TEACHER = """
views: {frames: 8, size_px: 56}
held_out: {fraction: 0}
flow: {preset: fast, short_side_px: 64}
experts:
  rgb: {train: {network: small3d, epochs: 1, warmup_epochs: 0}}
  flow: {train: {network: small3d, epochs: 1, warmup_epochs: 0}}
  boxes:
    layout: {hidden: 32, attention_heads: 4, spatial_layers: 1, temporal_layers: 1}
    train: {epochs: 1, warmup_epochs: 0}
build: {views: 4, shard_rows: 2}
"""
TINY_STUDENT = "train: {network: small3d, epochs: 3, warmup_epochs: 0, batch_size: 2}\n"


@dataclass(frozen=True)
class Real:
    """What the README's commands made."""

    root: Path
    said: str
    """stdout of inspect."""
    trained: str
    """stdout of train --json."""
    warned: str
    """stderr of train."""

    @property
    def data(self) -> list[object]:
        return ["--manifest", self.root / "manifest.jsonl", "--videos", REAL, "--workers", 1]

    @property
    def recipe(self) -> TeacherRecipe:
        files = (self.root / "teacher.yaml", self.root / "tiny-teacher.yaml")
        named = {"data.manifest": self.root / "manifest.jsonl", "data.videos": REAL, "data.workers": 0}
        return load_recipe(TeacherRecipe, files=files, named=named, environ={})


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    root = tmp_path_factory.mktemp("real")
    splits = [
        part for name in ("train", "validation", "test") for part in ("--split", f"{name}={REAL / name}.json")
    ]
    call_ok(
        *("mmkd-cache", "manifest", "something-something", *splits, "--labels", REAL / "labels.json"),
        *("--videos", REAL, "-o", root / "manifest.jsonl"),
    )
    for stage, program, tiny in (
        ("teacher", "mmkd-cache", TINY_TEACHER),
        ("student", "mmkd-student", TINY_STUDENT),
    ):
        (root / f"{stage}.yaml").write_text(call_ok(program, "config", "example", "something-something"))
        (root / f"tiny-{stage}.yaml").write_text(tiny)
    made = Real(root, "", "", "")
    recipe = ["-c", root / "teacher.yaml", "-c", root / "tiny-teacher.yaml", *made.data]
    for name, more in (("rgb", []), ("flow", []), ("boxes", ["--boxes", BOXES])):
        call_ok("mmkd-cache", "teach", name, *recipe, *more, "-o", root / "experts" / name)
    experts = [part for name in ("rgb", "flow", "boxes") for part in ("--expert", root / "experts" / name)]
    call_ok("mmkd-cache", "build", *recipe, "--boxes", BOXES, *experts, "-o", root / "cache")
    said = call_ok("mmkd-cache", "inspect", root / "cache")
    student = ["-c", root / "student.yaml", "-c", root / "tiny-student.yaml", *made.data, "--cache", root / "cache"]
    trained = call("mmkd-student", "train", *student, "-o", root / "student", "--json")
    assert trained.code == 0, trained.err[-2000:]
    call_ok("mmkd-student", "train", *student, "-o", root / "baseline", "--labels-only")
    return Real(root, said, trained.out, trained.err)


def test_the_manifest_has_all_classes_and_the_published_labels(real):
    manifest = load_manifest(real.root / "manifest.jsonl")
    (head,) = manifest.heads
    assert len(head.classes) == 174
    assert {clip.clip_id for clip in manifest.split("train")} == set(TRAIN)
    assert {clip.clip_id for clip in manifest.split("validation")} == set(VALIDATION)
    published = json.loads((REAL / "labels.json").read_text())
    for clip in (*manifest.split("train"), *manifest.split("validation")):
        assert head.classes[clip.labels["action"]] == LABELS[clip.clip_id]
        assert clip.labels["action"] == int(published[LABELS[clip.clip_id]])
    assert [clip.labels["action"] for clip in manifest.split("test")] == [None] * 4
    assert manifest.flip_allowed is False, "labels carry direction"


def test_the_cache_holds_finite_logits_of_every_expert_for_every_view(real):
    reader = CacheReader(real.root / "cache")
    assert reader.experts == ("rgb", "flow", "boxes")
    assert list(reader.layouts) == ["train", "validation"], "the test split has no labels"
    for split, ids, views in (("train", TRAIN, 4), ("validation", VALIDATION, 1)):
        table = reader.split(split)
        assert table.clip_ids == ids
        seen = []
        for name in reader.experts:
            assert (reader.status(split, name) == Status.OK).all()
            logits = reader.logits(split, name)["action"]
            assert logits.shape == (len(ids), views, 174)
            assert np.isfinite(logits).all()
            assert logits.std(-1).min() > 0
            seen.append(logits)
        for one, other in ((0, 1), (0, 2), (1, 2)):
            assert not np.allclose(seen[one], seen[other], atol=1e-3), "two experts say the same"
        assert not table.drawn.flip.any()
        assert np.array_equal(table.facts[:, 1], np.full(len(ids), 240))


def test_a_view_shows_the_pixels_that_an_independent_decode_shows(real):
    reader = CacheReader(real.root / "cache")
    table = reader.split("train")
    hashes, thumbnails = reader.thumbprints("train")
    for row, clip_id in enumerate(table.clip_ids):
        with av.open(str(REAL / f"{clip_id}.webm")) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert len(frames) == table.facts[row, 3]
        for number in range(table.views):
            view = table.view(row, number)
            left, top, side, height = view.crop_xywh
            assert side == height
            assert 240 / 1.43 - 1 <= side <= 240 / 1.15 + 1
            segments = view.frame_indices * 8 // len(frames)
            assert np.abs(segments - np.arange(8)).max() <= 1, "one frame from each of 8 equal segments"
            window = [frames[i][top : top + side, left : left + side] for i in view.frame_indices]
            pixels = np.stack([cv2.resize(one, (56, 56), interpolation=cv2.INTER_AREA) for one in window])
            assert pixel_hash(pixels) == int(hashes[row, number])
            assert np.array_equal(thumbnail(pixels), thumbnails[row, number])


def test_real_flow_carries_one_frame_to_the_next(real):
    """Warped by its flow, the next frame is nearer to this one than it is as it stands."""
    recipe = real.recipe
    clip_set = ClipSet(recipe.data)
    store = FlowStore(real.root / "manifest.jsonl.flow", recipe.flow)
    for item in clip_set.probe(clip_set.manifest.split("train")):
        flow = store.read(item, np.arange(item.facts.frame_count - 1))
        height, width = flow.shape[2:]
        assert (min(height, width), flow.shape[1]) == (64, 2)
        with av.open(str(REAL / item.clip.video)) as container:
            grey = [frame.to_ndarray(format="gray") for frame in container.decode(video=0)]
        small = [cv2.resize(one, (width, height), interpolation=cv2.INTER_AREA).astype(np.float32) for one in grey]
        x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
        moved = warped = 0.0
        for (u, v), first, second in zip(flow, small[:-1], small[1:], strict=True):
            back = cv2.remap(second, x + u, y + v, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
            moved += float(np.abs(second - first).mean())
            warped += float(np.abs(back - first).mean())
        assert warped < 0.75 * moved, item.clip.clip_id


def test_inspect_says_what_is_in_the_cache(real):
    assert "data set     something-something-v2: action (174 classes)" in real.said
    assert "split        train: 3 clips x 4 views, 2 shards" in real.said
    assert "split        validation: 2 clips x 1 view, 1 shard" in real.said
    assert "without" not in real.said


def test_student_and_baseline_train_and_are_evaluated(real):
    report = json.loads(real.trained)
    assert report["steps"] == 6
    found = report["metrics"]["validation"]["action"]
    assert (found["count"], found["left_out"]) == (2, 0)
    assert 0 < found["nll"] < 20
    assert "no held-out part of the training split: uniform weights are used" in real.warned
    losses = [
        json.loads(line)["loss"] for line in (real.root / "student" / "metrics.jsonl").read_text().splitlines()
    ]
    assert len(losses) == 3
    assert np.isfinite(losses).all()
    runs = [part for name in ("baseline", "student") for part in ("--run", f"{name}={real.root / name}")]
    manifest = ["--cache", real.root / "cache", "--manifest", real.root / "manifest.jsonl"]
    rows = json.loads(call_ok("mmkd-student", "compare", *manifest, *runs, "--json"))["rows"]
    assert list(rows) == ["rgb expert", "flow expert", "boxes expert", "teacher", "baseline", "student"]


def test_something_else_labels_make_another_manifest(real, tmp_path):
    """Its numbers differ from V2's: the class lists in order tell them apart, and the cache refuses the mix-up."""
    splits = [part for name in ("train", "validation") for part in ("--split", f"{name}={REAL / name}.json")]
    made = call(
        *("mmkd-cache", "manifest", "something-else", *splits),
        *("--labels", REAL / "something_else_compositional_labels.json", "-o", tmp_path / "m.jsonl"),
    )
    assert made.code == 0
    assert "has SEEN videos of this evaluation" in made.err
    other, own = load_manifest(tmp_path / "m.jsonl"), load_manifest(real.root / "manifest.jsonl")
    assert sorted(other.heads[0].classes) == sorted(own.heads[0].classes)
    assert other.heads[0].classes != own.heads[0].classes
    names = [manifest.heads[0].classes[manifest.split("train")[0].labels["action"]] for manifest in (other, own)]
    assert names[0] == names[1] == LABELS[TRAIN[0]]
