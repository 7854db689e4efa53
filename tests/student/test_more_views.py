"""Evaluating under any number of views of a clip: those that a cache holds, or others, decoded when asked for."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from mmkd.cache_tools.cache.reader import CacheReader
from mmkd.cache_tools.frames.clip_set import ClipSet, DataRecipe
from mmkd.cache_tools.views.canonical import canonical_view
from mmkd.cache_tools.views.drawing import evaluation_views
from mmkd.student.data.evaluation_views import EvaluationLook, seen_under
from mmkd.student.data.splits import CachedSplits
from mmkd.student.evaluation.evaluation_file import read_evaluation
from mmkd.student.evaluation.trained import load_student
from tests.helpers.evaluated import evaluated_logits
from tests.helpers.in_process import call, call_ok, refused
from tests.helpers.places import unpack_before

EVALUATE = ("mmkd-student", "evaluate", "run", "--device", "cpu")
TRAIN = ("mmkd-student", "train", "-c", "student.yaml", "--cache", "cache", "--node-copies", "copies", "-o", "run")
MANY = ("--set", "views.evaluation_clips=2", "--set", "views.evaluation_crops=3")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a trained `run`, its `cache` of one evaluation view, and `many`, a cache of 2 x 3 of them."""
    root = unpack_before(tmp_path_factory.mktemp("views"))
    shutil.rmtree(root / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        call_ok(*TRAIN, "--labels-only", "--set", "train.weights=null")
        call_ok("mmkd-cache", "teach", "rgb", "-c", "teacher.yaml", *MANY, "-o", "expert-many")
        call_ok("mmkd-cache", "build", "-c", "teacher.yaml", *MANY, "--expert", "expert-many", "-o", "many")
    return root


@pytest.fixture
def world(trained, tmp_path, monkeypatch):
    """A copy of that folder, as the current one."""
    root = tmp_path / "world"
    shutil.copytree(trained, root, symlinks=True)
    monkeypatch.chdir(root)
    return root


def clip_lines(path):
    """How the run did on each clip: rank, confidence and cross-entropy in full."""
    return [json.loads(line) for line in path.with_suffix(".clips.jsonl").read_text().splitlines()]


def newest(before):
    """The one evaluation file that is there now and was not."""
    (path,) = set(Path("run").glob("evaluation*.json")) - before
    return path


def files():
    return set(Path("run").glob("evaluation*.json"))


def test_asking_for_views_gives_to_the_last_bit_what_a_cache_of_these_views_does(world):
    own = Path("run/evaluation.json").read_bytes()
    before = files()
    asked = json.loads(call_ok(*EVALUATE, "--cache", "cache", "--views", 2, "--crops", 3, "--json"))
    decoded = newest(before)
    before = files()
    cached = json.loads(call_ok(*EVALUATE, "--cache", "many", "--json"))
    stored = newest(before)
    assert clip_lines(decoded) == clip_lines(stored) != clip_lines(Path("run/evaluation.json"))
    parts = [{key: value for key, value in own["standard"]["action"].items() if "teacher" not in key}
             for own in (asked, cached)]  # fmt: skip
    assert parts[0] == parts[1]
    assert (parts[0]["positions"], parts[0]["crops"], parts[0]["count"]) == (2, 3, 4)
    assert Path("run/evaluation.json").read_bytes() == own, "that of the cache's own views stays"


def test_without_a_cache_the_clips_of_the_manifest_are_seen_under_the_same_views(world):
    before = files()
    call_ok(*EVALUATE, "--cache", "cache", "--views", 2, "--crops", 3)
    cached = newest(before)
    before = files()
    call_ok(*EVALUATE, "--views", 2, "--crops", 3)
    assert clip_lines(newest(before)) == clip_lines(cached)


def test_views_that_the_cache_holds_are_its_own_evaluation(world):
    before, text = files(), Path("run/evaluation.clips.jsonl").read_bytes()
    call_ok(*EVALUATE, "--cache", "cache", "--views", 1, "--crops", 1)
    assert files() == before
    assert Path("run/evaluation.clips.jsonl").read_bytes() == text


def test_drawn_views_are_those_that_the_cache_stores_pixel_for_pixel(world):
    reader, clip_set = CacheReader(Path("many")), ClipSet(DataRecipe(manifest="manifest.jsonl", videos="videos"))
    stored = CachedSplits(reader, clip_set).open("standard", memory_bytes=0)
    drawn = seen_under(stored, clip_set.source, reader.heads, reader.init.policy)
    np.testing.assert_array_equal(drawn.table.drawn.frame_index, stored.table.drawn.frame_index)
    np.testing.assert_array_equal(drawn.table.drawn.crop_xywh, stored.table.drawn.crop_xywh)
    for row, view in ((0, 0), (1, 3), (3, 5)):
        np.testing.assert_array_equal(drawn.data.item(row, view)["rgb"], stored.data.item(row, view)["rgb"])
    assert (stored.data.item(1, 0)["rgb"] != stored.data.item(1, 5)["rgb"]).any()


def test_a_clip_counts_by_the_mean_logits_over_its_views(world):
    before = files()
    call_ok(*EVALUATE, "--cache", "cache", "--views", 3)
    found = {line["clip_id"]: line["heads"]["action"] for line in clip_lines(newest(before))}
    student = load_student(Path("run"))
    policy = student.policy.model_copy(update={"evaluation_clips": 3})
    clip_set = ClipSet(DataRecipe(manifest="manifest.jsonl", videos="videos", workers=0))
    for item in clip_set.probe(clip_set.manifest.split("standard")):
        views = evaluation_views(item.facts, policy)
        every = np.arange(item.video.frame_count)
        frames = clip_set.source.read(item.clip.video, every, item.video)
        pixels = np.stack([canonical_view(frames, view, policy.size_px) for view in views])
        mean = student.logits(pixels)["action"].astype(np.float64).mean(0)
        rank, confidence, nll = found[item.clip.clip_id]
        own = mean[item.clip.labels["action"]]
        log_sum = np.log(np.exp(mean).sum())
        assert len(views) == 3
        assert rank == (mean > own).sum()
        assert confidence == pytest.approx(np.exp(mean.max() - log_sum), rel=1e-4)
        assert nll == pytest.approx(log_sum - own, rel=1e-4)


def test_predict_has_the_logits_of_these_views_too_bit_for_bit(world, monkeypatch):
    paths, logits = evaluated_logits(monkeypatch, *EVALUATE, "--cache", "cache", "--views", 2, "--crops", 3)
    predict = ("mmkd-student", "predict", "run", "--device", "cpu", "--views", 2, "--crops", 3)
    clips = json.loads(call_ok(*predict, *paths, "--json"))["clips"]
    mean = logits.mean(1, dtype=np.float64).astype(np.float32)
    assert logits.shape[1] == 6
    assert [clip["heads"]["action"][0]["logit"] for clip in clips] == mean.max(1).tolist()


def test_asking_for_views_is_no_reason_for_a_warning_and_other_views_are(world):
    asked = call(*EVALUATE, "--cache", "cache", "--views", 2)
    other = call(*EVALUATE, "--cache", "many")
    assert "other views" not in asked.err
    assert "the student learned from other views than this cache's" in other.err
    assert logging.getLogger("mmkd").disabled is False


def test_the_evaluation_says_under_which_views_it_is_and_compare_keeps_to_the_caches(world):
    before = files()
    call_ok(*EVALUATE, "--cache", "cache", "--views", 2, "--crops", 3)
    stored = read_evaluation(newest(before), "")
    assert stored.cache.startswith("views:")
    compare = ("mmkd-student", "compare", "--cache", "cache", "--manifest", "manifest.jsonl", "--run", "mine=run")
    own = json.loads(Path("run/evaluation.json").read_bytes())["metrics"]["standard"]["action"]["top1"]
    table = json.loads(call_ok(*compare, "--json"))
    assert table["rows"]["mine"][0]["standard"]["action"]["top1"] == own


@pytest.mark.parametrize("options", [("--views", 0), ("--views", 33), ("--crops", 2), ("--views", "x")])
def test_views_that_there_are_not_are_refused(world, options):
    assert f"Invalid value for '{options[0]}'" in refused(*EVALUATE, "--cache", "cache", *options)


def test_a_look_changes_how_often_a_clip_is_seen_and_nothing_else(world):
    policy = load_student(Path("run")).policy
    changed = EvaluationLook(5, 3).of(policy)
    assert (changed.evaluation_clips, changed.evaluation_crops) == (5, 3)
    kept = {"evaluation_clips", "evaluation_crops"}
    assert changed.model_dump(exclude=kept) == policy.model_dump(exclude=kept)
    assert EvaluationLook().of(policy) == policy
