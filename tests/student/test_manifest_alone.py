"""Training, evaluating and comparing from a manifest alone: the same bits as from a cache of the same views."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from mmkd.cache_tools.cache.reader import CacheReader
from mmkd.cache_tools.frames.clip_set import ClipSet
from mmkd.cache_tools.recipes.recipe import load_recipe
from mmkd.cache_tools.views.drawing import ViewPolicy
from mmkd.student.data.held_out_clips import held_out_mask
from mmkd.student.data.splits import CachedSplits, ManifestSplits
from mmkd.student.recipes.student import StudentRecipe
from mmkd.student.recipes.train import TrainRecipe
from mmkd.student.training.checkpoint import checkpoints
from tests.helpers.faulty_source import FaultySource
from tests.helpers.held_out_nll import measured
from tests.helpers.in_process import call, call_ok, refused
from tests.helpers.places import unpack_before

VIEWS = """
views: {frames: 4, size_px: 32, evaluation_crops: 3, evaluation_clips: 2, scale: [1.1, 1.5]}
view_seed: 7
"""
"""For both commands, in the same words."""
TRAIN = ("mmkd-student", "train", "-c", "student.yaml", "--manifest", "own.jsonl", "--set", "train.weights=null")
CACHE = ("--cache", "cache-of-own")
FRESH = ("--labels-only", "--fresh-views")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Clips of several kinds, a cache of them, and recipes of the same views."""
    root = unpack_before(tmp_path_factory.mktemp("alone"))
    header, *clips = [json.loads(line) for line in (root / "manifest.jsonl").read_text().splitlines()]
    header["flip_allowed"] = True
    for number, clip in enumerate(clips):
        clip["groups"] = ["late"] if clip["split"] == "standard" and number % 2 else []
    clips[1] |= {"start_seconds": 0.1, "end_seconds": 0.6}
    clips.append(clips[0] | {"clip_id": "broken", "video": "broken.webm"})
    clips.append(clips[4] | {"clip_id": "lost", "video": "broken.webm"})
    clips.append(clips[4] | {"clip_id": "unlabelled", "split": "test", "labels": {"action": None}})
    (root / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (header, *clips)))
    (root / "videos" / "broken.webm").write_bytes(b"no video")
    (root / "views.yaml").write_text(VIEWS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        options = ("-c", "teacher.yaml", "-c", "views.yaml", "--manifest", "own.jsonl")
        call_ok("mmkd-cache", "teach", "rgb", *options, "--set", "held_out.fraction=0", "-o", "own-rgb")
        call_ok("mmkd-cache", "build", *options, "--expert", "own-rgb", "--max-unusable", 2, "-o", CACHE[1])
        yield root


def weights(run):
    return (run / "model.safetensors").read_bytes()


def single_clips(run, name="evaluation"):
    return (run / f"{name}.clips.jsonl").read_bytes()


def metrics(run, name="evaluation"):
    found = json.loads((run / f"{name}.json").read_text())["metrics"]
    for heads in found.values():
        for values in heads.values():
            values.pop("teacher_agreement", None), values.pop("teacher_kl", None)
    return found


@pytest.fixture(scope="module")
def cached(world):
    call_ok(*TRAIN, *CACHE, *FRESH, "-o", "cached")
    return world / "cached"


@pytest.fixture(scope="module")
def alone(world):
    done = call(*TRAIN, "-c", "views.yaml", "-o", "alone")
    assert done.code == 0, done.err
    assert "no --cache: learning from labels alone, under fresh views of 4 frames of 32 x 32 pixels" in done.err
    assert "split 'test' is left out: none of its clips has a label" in done.err
    assert "2 of 10 clips, in 1 of 9 videos, cannot be used" in done.err
    return world / "alone"


def test_a_run_without_a_cache_is_the_baseline_of_fresh_views_to_the_same_bits(cached, alone):
    assert weights(alone) == weights(cached)
    assert single_clips(alone) == single_clips(cached)
    assert metrics(alone) == metrics(cached)
    own = metrics(alone)
    assert set(own) == {"standard", "standard/late"}
    assert {name: own["standard"]["action"][name] for name in ("count", "left_out", "positions", "crops")} == {
        "count": 4, "left_out": 1, "positions": 2, "crops": 3,
    }  # fmt: skip
    one, other = (json.loads((run / "run.json").read_text()) for run in (alone, cached))
    assert one["input"] == other["input"]
    assert (one["labels_only"], one["fresh_views"], one["weights"]) == (True, True, None)


def splits_of(*, views):
    recipe = load_recipe(
        StudentRecipe, files=[Path("student.yaml"), Path("views.yaml")], named={"data.manifest": "own.jsonl"}
    )
    if not views:
        return CachedSplits(CacheReader(CACHE[1]), ClipSet(recipe.data))
    return ManifestSplits(ClipSet(recipe.data), recipe.policy(), train_split="train", view_seed=recipe.view_seed)


@pytest.mark.parametrize("split", ["train", "standard"])
def test_pixels_labels_and_rows_are_those_of_the_cache(world, split):
    """For training fresh views, some of them flipped; for evaluation six of each clip."""
    fresh = split == "train"
    assert CacheReader(CACHE[1]).split(split).drawn.flip.any() == fresh
    one, other = (splits_of(views=views).open(split, memory_bytes=0, fresh_views=fresh) for views in (0, 1))
    assert one.table.clip_ids == other.table.clip_ids
    assert np.array_equal(one.rows, other.rows)
    assert one.left_out == other.left_out == 1
    assert np.array_equal(one.data.labels["action"], other.data.labels["action"])
    for row in range(one.data.rows):
        for view in range(6):
            assert np.array_equal(one.data.item(row, view)["rgb"], other.data.item(row, view)["rgb"])


@pytest.fixture(scope="module")
def student(world):
    call_ok(*TRAIN, *CACHE, "--node-copies", "copies", "-o", "student")
    return world / "student"


def other_evaluation(run):
    (found,) = run.glob("evaluation-*[0-9a-f].json")
    return found.stem


def test_a_student_of_a_cache_is_evaluated_from_the_manifest_alone_with_the_same_numbers(student):
    done = call("mmkd-student", "evaluate", "student", "--json")
    assert done.code == 0, done.err
    assert "agreement with the teacher is left out: give --cache for it" in done.err
    name = other_evaluation(student)
    assert single_clips(student, name) == single_clips(student)
    assert metrics(student, name) == metrics(student) == json.loads(done.out)


def test_a_run_without_a_cache_is_evaluated_on_one_and_on_its_manifest(world, alone, cached):
    copy = shutil.copytree(alone, world / "alone-copy")
    (copy / "evaluation.json").unlink()
    call_ok("mmkd-student", "evaluate", copy)
    assert metrics(copy) == metrics(alone)
    call_ok("mmkd-student", "evaluate", copy, *CACHE)
    assert metrics(copy, other_evaluation(copy)) == metrics(cached)
    assert "with manifest " in call_ok("mmkd-student", "show", copy)


def test_a_stopped_run_without_a_cache_ends_with_the_same_bits(world, alone):
    copy = shutil.copytree(alone, world / "stopped-copy")
    shutil.rmtree(checkpoints(copy)[0])
    (copy / "model.safetensors").unlink()
    call_ok(*TRAIN, "-c", "views.yaml", "-o", copy)
    assert weights(copy) == weights(alone)


def test_other_views_or_videos_are_another_run(world, alone):
    error = refused(*TRAIN, "-c", "views.yaml", "--set", "view_seed=8", "-o", alone, code=5)
    assert "extra.fresh_views: checkpoint" in error
    copy = shutil.copytree(alone, world / "videos-copy")
    kept = (world / "videos" / "1.webm").read_bytes()
    try:
        shutil.copy(world / "videos" / "2.webm", world / "videos" / "1.webm")
        error = refused(*TRAIN, "-c", "views.yaml", "--set", "data.facts=other", "-o", copy, code=5)
    finally:
        (world / "videos" / "1.webm").write_bytes(kept)
    assert "extra.videos: checkpoint" in error


def test_held_out_clips_tell_the_best_epoch_without_a_cache_as_with_one(world):
    half = ("--set", "train.held_out=0.5", "--set", "train.epochs=1")
    call_ok(*TRAIN, "-c", "views.yaml", *half, "-o", "half-alone")
    call_ok(*TRAIN, *CACHE, *FRESH, *half, "-o", "half-cached")
    assert weights(world / "half-alone") == weights(world / "half-cached")
    lines = [(world / name / "metrics.jsonl").read_text().splitlines() for name in ("half-alone", "half-cached")]
    one, other = ([json.loads(line)["held_out"] for line in own] for own in lines)
    assert one == other
    clip_set = splits_of(views=True).clip_set
    clips = clip_set.manifest.split("train")
    mask = held_out_mask(clips, TrainRecipe(held_out=0.5), clip_set.manifest.dataset)
    held = [clip for clip, out in zip(clips, mask, strict=True) if out]
    assert len(held) == one[0]["action"]["clips"] == 3
    assert measured(world / "half-alone", clip_set, held)[0] == pytest.approx(one[0]["action"]["nll"], rel=1e-5)


def test_a_video_that_breaks_off_stops_the_run_and_is_named(world, monkeypatch):
    def broken(root, limits, links, rates):
        return FaultySource(root, limits, links, rates, video="4.webm", fault="broken", marks=str(world / "marks"))

    monkeypatch.setattr("mmkd.cache_tools.frames.clip_set.open_data_frames", broken)
    error = refused(*TRAIN, "-c", "views.yaml", "-o", "broken")
    assert error.startswith("error: clip '4', view 0: a fault of the test")
    assert "leave it out, or replace its video" in error


def test_settings_of_a_teacher_without_a_cache_are_refused_in_one_line(world):
    before = sorted(world.rglob("*"))
    flags = ("--weights", "rgb=1", "--temperature", "4", "--missing", "drop", "--node-copies", "copies")
    error = refused(*TRAIN, *flags, "--set", "teacher.weights_temperature=2", "-o", "none")
    told = "--weights, --temperature, --missing, --node-copies, teacher.weights_temperature"
    assert error.startswith(f"error: {told} need a teacher: give --cache, or --labels-only")
    assert "\n" not in error
    error = refused(*TRAIN, "--labels-only", "--weights", "rgb=1", "-o", "none")
    assert error == "error: --weights needs a teacher: give --cache, or leave that out"
    error = refused(*TRAIN, "--fresh-views", "--set", "loss.temperature=4", "-o", "none")
    assert "loss.temperature needs a teacher: give --cache, or --labels-only to train without one" in error
    assert sorted(world.rglob("*")) == before


def test_a_recipe_for_a_teacher_trains_the_baseline_where_labels_only_are_asked_for(world, alone):
    call_ok(*TRAIN, "-c", "views.yaml", "--labels-only", "--set", "loss.temperature=4", "-o", "named")
    assert weights(world / "named") == weights(alone)


def test_views_beside_a_cache_are_its_own_or_refused(world, student):
    call_ok(*TRAIN, *CACHE, "--node-copies", "copies", "-c", "views.yaml", "-o", "with-views")
    assert weights(world / "with-views") == weights(student)
    other = ("--set", "views.size_px=48", "--set", "view_seed=8")
    error = refused(*TRAIN, *CACHE, "--node-copies", "copies", *other, "-o", "none")
    assert "views.size_px is 48, and the cache's 32; view_seed is 8, and the cache's 7: leave them out" in error
    error = refused("mmkd-student", "evaluate", student, "--set", "views.frames=8")
    assert "views.frames is 8, and the run's 4: leave them out" in error
    assert "views" not in json.loads((student / "run.json").read_text())["recipe"]


def test_views_by_seconds_train_and_are_read_back(world):
    views = "views={sampling: dense, frames: 4, size_px: 32, seconds_between_frames: 0.05}"
    call_ok(*TRAIN, "--set", views, "--set", "train.epochs=1", "-o", "timed")
    call_ok("mmkd-student", "evaluate", "timed")
    recipe = json.loads((world / "timed" / "run.json").read_text())["recipe"]
    assert recipe["views"]["seconds_between_frames"] == 0.05
    assert "stride" not in recipe["views"]


def test_runs_are_compared_over_the_manifest_alone(world, alone, student):
    call_ok("mmkd-student", "evaluate", student)
    compare = ("mmkd-student", "compare", "--manifest", "own.jsonl")
    runs = ("--run", f"alone={alone}", "--run", f"student={student}")
    table = json.loads(call_ok(*compare, *runs, "--common", "--json"))
    assert list(table["rows"]) == ["alone", "student"]
    shown = {name: value[0]["standard"]["action"]["top1"] for name, value in table["rows"].items()}
    assert shown == {run.name: metrics(run)["standard"]["action"]["top1"] for run in (alone, student)}
    assert table["rows"]["alone"][0].keys() == {"standard", "standard/late"}
    error = refused(*compare[:2], "--manifest", "manifest.jsonl", *runs)
    assert f"{alone} was evaluated with a cache or another manifest; run `mmkd-student evaluate {alone}" in error
    assert "--weights is for the teacher's row, which needs --cache" in refused(
        *compare, *runs, "--weights", "rgb=1"
    )
    assert "give --run NAME=DIR" in refused(*compare)
    error = refused(*compare, *runs, "--train-split", "standard")
    assert "no split is left to compare on: standard, train are left out" in error


@pytest.mark.parametrize("data_set", ["demo", "epic-kitchens", "something-something"])
def test_examples_name_the_views_of_the_teacher_for_runs_without_a_cache(data_set):
    student, teacher = (
        call_ok(program, "config", "example", data_set) for program in ("mmkd-student", "mmkd-cache")
    )
    (line,) = [line for line in student.splitlines() if line.startswith("# views:")]
    named = yaml.safe_load(line.removeprefix("# "))["views"]
    assert ViewPolicy(**named).identity() == ViewPolicy(**yaml.safe_load(teacher)["views"]).identity()
