"""The live teacher of the benchmarks is the cache's teacher: the same targets for the same views."""

import dataclasses
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from mmkd.cache_tools.cache.logit_formats import FORMATS
from mmkd.cache_tools.views.drawing import random_views
from mmkd.pipeline.inputs.boxes import BoxFile
from mmkd.pipeline.missing import BoxesMissingError
from mmkd.student.networks.networks import build_network
from mmkd.student.recipes.loss import LossOptions
from mmkd.student.recipes.train import TrainRecipe
from mmkd.student.teacher.targets import fetch_targets
from mmkd.student.training.loop import fit
from tests.benchmarks.live_teacher import LiveTeacher, open_live
from tests.helpers.demo_place import Place, StageTwo, open_stage_two

ROUNDING = 1e-4
"""By how much a logit may move because its batch has another shape than the build's."""
RECIPE = TrainRecipe(network="small3d", epochs=2, warmup_epochs=0, batch_size=7, learning_rate=1e-3)


@dataclass(frozen=True)
class World(StageTwo):
    """A cache's targets and the live teacher's, of the same clips under the same views."""

    live: LiveTeacher


@pytest.fixture(scope="module")
def world(tiny, tmp_path_factory):
    place = Place(tiny.root, tiny.root / "cache", tiny.root / "experts", tmp_path_factory.mktemp("copies"))
    data = open_stage_two(place, clips=None, weights="rgb=1,flow=2,boxes=1")
    live = open_live(place, data, recipes=("teacher.yaml", "tiny.yaml"))
    return World(**vars(data), live=live)


def grid(world):
    """Every view of every clip, the views of one clip after another."""
    data = world.split.data
    return [part.ravel() for part in np.meshgrid(np.arange(data.rows), np.arange(data.views), indexing="ij")]


def of_stored_format(world, rows, views):
    """(B, classes): by how much the format lets the mixed logits differ from computed ones."""
    own, weights = world.split.rows[rows], world.live.mixtures["action"].weights
    bounds = 0.0
    for expert, weight in weights.items():
        decoded = world.reader.logits("train", expert, np.arange(world.split.table.rows))["action"][own, views]
        bounds = bounds + weight * FORMATS["fp16"].error_bound(decoded)
    return bounds


def test_the_live_teacher_gives_the_cache_s_targets_within_the_stored_format(world):
    rows, views = grid(world)
    live, cached = world.live.targets(rows, views)["action"], world.cached.targets(rows, views)["action"]
    allowed = of_stored_format(world, rows, views) + ROUNDING
    assert world.live.valid(rows, views).all()
    assert world.cached.valid(rows, views).all()
    assert (abs(live - cached) <= allowed).all()
    other = world.cached.targets(rows, (views + 1) % world.split.data.views)["action"]
    assert (abs(live - other) > allowed).any(axis=1).mean() > 0.9
    assert all(world.live.seconds[part] > 0 for part in ("decoding", "flow", "experts"))


def test_it_teaches_views_that_no_cache_holds(world):
    policy, manifest = world.reader.init.policy, world.clip_set.manifest

    class Fresh:
        def view(self, row, number):
            item = world.split.clips[row]
            drawn = {"dataset": manifest.dataset, "clip_id": item.clip.clip_id, "seed": world.reader.init.view_seed}
            return random_views(item.facts, policy, **drawn, flip_allowed=False, numbers=[number])[0]

    live = teacher_of(world, stream=Fresh())
    rows, views = np.arange(3), np.array([0, 1, 90])
    found, cached = live.targets(rows, views)["action"], world.cached.targets(rows[:2], views[:2])["action"]
    allowed = of_stored_format(world, rows[:2], views[:2]) + ROUNDING
    assert (abs(found[:2] - cached) <= allowed).all()
    assert np.isfinite(found).all()


@pytest.mark.parametrize("missing", ["renormalise", "drop"])
def test_what_an_expert_lacks_is_treated_as_the_cache_s(world, missing, monkeypatch):
    absent, second = world.split.clips[0], world.split.clips[1]
    facts = dataclasses.replace(absent.facts, width=absent.facts.width + 2)  # frames of another size come
    gone = dataclasses.replace(absent, facts=facts)
    live = teacher_of(world, missing=missing)
    live._clips = [gone, *world.split.clips[1:]]
    track = BoxFile.track

    def none_of_the_second(file, video):
        if video == second.clip.video:
            raise BoxesMissingError("none")
        return track(file, video)

    monkeypatch.setattr(BoxFile, "track", none_of_the_second)
    rows, views = np.arange(3), np.zeros(3, np.int64)
    found = fetch_targets(live, rows, views, device=torch.device("cpu"))
    assert found.valid.tolist() == [False, missing == "renormalise", True]
    assert found.logits["action"].isfinite().all(1).tolist() == found.valid.tolist()
    if missing == "renormalise":
        stored = {
            expert: world.reader.logits("train", expert, np.arange(14))["action"][world.split.rows[1], 0]
            for expert in ("rgb", "flow")
        }
        mixed = (stored["rgb"] + 2 * stored["flow"]) / 3
        np.testing.assert_allclose(found.logits["action"][1], mixed, atol=5e-3)


def test_the_loop_trains_on_either(world):
    losses = {}
    for name, source in {"cached": world.cached, "live": world.live, "none": None}.items():
        torch.manual_seed(0)
        network = build_network(RECIPE, heads={"action": 14}, modality="rgb")
        loss = LossOptions(temperature=4)
        found = fit(network, world.split.data, RECIPE, targets=source, loss=loss, progress=False)
        losses[name] = found.final_loss
    assert losses["live"] == pytest.approx(losses["cached"], rel=0.02)
    assert losses["none"] != pytest.approx(losses["cached"], rel=0.5)


def teacher_of(world, *, stream=None, missing="renormalise"):
    """The world's live teacher with something else in it."""
    live = world.live
    return LiveTeacher(
        live.recipe,
        live.experts,
        source=world.clip_set.source,
        clips=world.split.clips,
        stream=stream or live._stream,
        mixtures=live.mixtures,
        labels=live._labels,
        missing=missing,
    )
