"""Held-out training clips: they are not trained on, tell the best epoch, and change nothing where nobody asks."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from mmkd.cache_tools.frames.clip_set import ClipSet, DataRecipe
from mmkd.cache_tools.views.held_out import HeldOut
from mmkd.data_manifests.errors import InputError
from mmkd.data_manifests.manifest import Clip
from mmkd.student.data.held_out_clips import held_out_mask
from mmkd.student.recipes.train import TrainRecipe
from mmkd.student.training.checkpoint import checkpoints
from tests.helpers.held_out_nll import measured
from tests.helpers.in_process import call, call_ok, refused
from tests.helpers.places import unpack_before

TRAIN = ("mmkd-student", "train", "-c", "student.yaml", "--cache", "cache", "--node-copies", "copies")
TRAIN += ("--set", "train.weights=null")
HALF = ("--set", "train.held_out=0.5")
WILD = ("--set", "train.epochs=5", "--set", "train.learning_rate=0.3", "--set", "train.clip_norm=1e6")
"""Rates at which weights jump about, so that the last epoch is not the best one."""


def chosen(clips, share, seed=0):
    mask = held_out_mask(clips, TrainRecipe(held_out=share, held_out_seed=seed), "any")
    return {clip.clip_id for clip, out in zip(clips, mask, strict=True) if out}


def made(count, *, per_video=1, classes=7):
    """Clips of classes of very different sizes, some videos of several clips."""
    labels = np.minimum(np.random.default_rng(0).geometric(0.4, count) - 1, classes - 1).tolist()
    return [Clip(f"c{i}", f"v{i // per_video}.webm", "train", {"action": label}) for i, label in enumerate(labels)]


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_each_class_gives_its_share_rounded_up_or_down(share):
    clips = made(400)
    held = chosen(clips, share)
    assert abs(len(held) - share * 400) < 1
    sizes = Counter(clip.labels["action"] for clip in clips)
    found = Counter(clip.labels["action"] for clip in clips if clip.clip_id in held)
    assert len(sizes) == 7
    assert min(sizes.values()) < 20 < 100 < max(sizes.values())
    assert all(abs(found[label] - share * size) < 1 for label, size in sizes.items())


def test_the_choice_depends_on_the_seed_and_not_on_the_order_of_clips():
    clips = made(200)
    assert chosen(clips, 0.2) == chosen(clips[::-1], 0.2)
    others = [chosen(clips, 0.2, seed) for seed in range(1, 6)]
    assert all(len(chosen(clips, 0.2) & other) < 25 for other in others)


def test_clips_of_one_video_stay_together():
    clips = made(600, per_video=6)
    held = chosen(clips, 0.2)
    of_videos = Counter(clip.video for clip in clips if clip.clip_id in held)
    assert len(of_videos) == 20
    assert set(of_videos.values()) == {6}


def test_clips_that_no_label_could_judge_are_not_held_out():
    clips = [replace(clip, labels={"action": None}) if i % 2 else clip for i, clip in enumerate(made(100))]
    assert all(int(clip_id[1:]) % 2 == 0 for clip_id in chosen(clips, 0.5))
    with pytest.raises(InputError, match=r"holds none of 2 training clips out, which are of 1 labelled video: set"):
        chosen([clips[0], clips[1]], 0.01)
    said = []
    for seed in range(20):
        with pytest.raises(InputError) as fault:
            chosen([clips[0]], 0.5, seed)
        said.append(str(fault.value))
    assert {text.split()[2] for text in said} == {"all", "none"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Four clips to train on, a cache of them, and recipes."""
    root = unpack_before(tmp_path_factory.mktemp("held"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        yield root


def opened(share=0.5):
    """The data set, and the training clips that a run holds out."""
    clip_set = ClipSet(DataRecipe(manifest=Path("manifest.jsonl"), videos=Path("videos"), workers=0))
    clips = clip_set.manifest.split("train")
    mask = held_out_mask(clips, TrainRecipe(held_out=share), clip_set.manifest.dataset)
    return clip_set, [clip for clip, out in zip(clips, mask, strict=True) if out]


def epochs(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def identity(run):
    return json.loads(max(run.glob("checkpoint-*/state.json")).read_text())["identity"]


@pytest.fixture(scope="module")
def best(world):
    done = call(*TRAIN, *HALF, *WILD, "-o", "best")
    assert done.code == 0, done.err
    assert "held-out action" in done.err
    return world / "best"


def test_held_out_clips_are_not_trained_on_and_the_best_epoch_by_them_is_kept(best):
    clip_set, held = opened()
    assert len(held) == 2
    assert identity(best)["clips"]["count"] == 2
    found = [line["held_out"]["action"] for line in epochs(best)]
    assert [line["clips"] for line in found] == [2] * 5
    wanted = max(range(5), key=lambda epoch: (found[epoch]["top1"], -found[epoch]["nll"]))
    assert wanted < 4, "the last epoch is the best: this would show nothing"
    nll, top1 = measured(best, clip_set, held)
    assert nll == pytest.approx(found[wanted]["nll"], rel=1e-5)
    assert top1 == found[wanted]["top1"]


def test_the_last_epoch_is_kept_where_the_recipe_says_so(best, world):
    call_ok(*TRAIN, *HALF, *WILD, "--set", "train.keep=last", "-o", "last")
    assert [line["held_out"] for line in epochs(world / "last")] == [line["held_out"] for line in epochs(best)]
    last = epochs(best)[-1]["held_out"]["action"]
    assert measured(world / "last", *opened())[0] == pytest.approx(last["nll"], rel=1e-5)


def test_a_run_stops_early_by_its_held_out_clips(world, best):
    call_ok(*TRAIN, *HALF, *WILD, "--set", "train.patience_epochs=1", "-o", "early")
    assert 1 < len(epochs(world / "early")) < 5
    assert epochs(world / "early")[0]["held_out"] == epochs(best)[0]["held_out"]


def test_a_resumed_run_has_the_same_held_out_clips_and_the_same_best_epoch(best, world):
    copy = shutil.copytree(best, world / "resumed")
    newest, before = checkpoints(copy)
    shutil.rmtree(newest)
    (copy / "model.safetensors").unlink()
    call_ok(*TRAIN, *HALF, *WILD, "-o", copy)
    assert int(before.name[-9:]) == 4
    assert [line["held_out"] for line in epochs(copy)] == [line["held_out"] for line in epochs(best)]
    assert (copy / "model.safetensors").read_bytes() == (best / "model.safetensors").read_bytes()


def test_without_a_held_out_part_a_run_is_what_it_was(world):
    call_ok(*TRAIN, "-o", "plain")
    own = identity(world / "plain")
    newer = {"keep", "held_out", "held_out_seed"}
    assert not newer & own["recipe"].keys()
    assert not newer & json.loads((world / "plain" / "run.json").read_text())["recipe"]["train"].keys()
    assert all("held_out" not in line for line in epochs(world / "plain"))


def test_another_held_out_part_is_another_run(best):
    other = ("--set", "train.held_out=0.5", "--set", "train.held_out_seed=6")
    error = refused(*TRAIN, *other, *WILD, "-o", best, code=5)
    assert "recipe.held_out_seed: only now" in error


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("train.patience_epochs=2",), "patience_epochs=2 needs clips that tell the best epoch: set held_out"),
        (("train.keep=best",), "keep=best needs clips that tell the best epoch: set held_out"),
        (("train.held_out=0.01",), "train.held_out=0.01 holds none of 4 training clips out"),
        (("train.held_out=0.9",), "train.held_out"),
    ],
)
def test_what_cannot_be_held_out_is_refused_in_one_line(world, settings, said):
    before = sorted(world.rglob("*"))
    options = [part for text in settings for part in ("--set", text)]
    assert said in refused(*TRAIN, *options, "-o", "refused")
    assert sorted(world.rglob("*")) == before


EXPERT = "experts.rgb.train."
WEIGHTS = HeldOut(0.3, 1)
TEACH = ("mmkd-cache", "teach", "rgb", "-c", "teacher.yaml", "--set", "held_out={fraction: 0.3, seed: 1}")


def test_an_expert_keeps_its_best_epoch_by_clips_that_are_not_those_for_weights(world):
    jumps = [part.replace("train.", EXPERT) for part in (*HALF, *WILD)]
    for name, keep in (("kept", ()), ("final", ("--set", f"{EXPERT}keep=last"))):
        call_ok(*TEACH, *jumps, *keep, "-o", f"taught/{name}")
    found = [line["held_out"]["action"] for line in epochs(world / "taught/kept/training")]
    assert found == [line["held_out"]["action"] for line in epochs(world / "taught/final/training")]
    best = max(range(5), key=lambda epoch: (found[epoch]["top1"], -found[epoch]["nll"]))
    assert best < 4, "the last epoch is the best: this would show nothing"
    weights = [load_file(world / "taught" / name / "weights.safetensors") for name in ("kept", "final")]
    assert any(not np.array_equal(weights[0][key], weights[1][key]) for key in weights[0])
    clip_set, _ = opened()
    clips = clip_set.manifest.split("train")
    mask = WEIGHTS.mask(clip_set.manifest.dataset, [clip.clip_id for clip in clips])
    card = json.loads((world / "taught/kept/expert.json").read_text())
    assert card["training"]["held_out"]["action"]["clips"] == mask.sum() > 0
    assert card["training"]["clips"] + found[0]["clips"] == 4 - mask.sum()


def test_an_expert_without_a_held_out_part_cannot_keep_the_best_epoch(world):
    error = refused(*TEACH, "--set", f"{EXPERT}keep=best", "-o", "taught/none")
    assert "keep=best needs clips that tell the best epoch: set held_out" in error
