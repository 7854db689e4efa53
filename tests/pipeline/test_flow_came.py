"""Flow files that come after a cache was built are computed, and no others; files that changed are refused."""

import hashlib
import json
import shutil
from unittest import mock

import cv2
import numpy as np
import pytest
import torch
import yaml

from mmkd.cache_tools.cache.reader import CacheReader
from mmkd.cache_tools.frames.clip_set import ClipSet
from mmkd.cache_tools.layout import Status
from mmkd.cache_tools.recipes.recipe import load_recipe
from mmkd.pipeline.build import work
from mmkd.pipeline.experts.expert import ExpertCard, make_network, save_expert
from mmkd.pipeline.experts.teach import expert_identity
from mmkd.pipeline.flow.flow_digests import BY_CONTENT, BY_SIZES
from mmkd.pipeline.flow.opened_flow import SAMPLED_FIELDS
from mmkd.pipeline.recipe import TeacherRecipe
from mmkd.student.training.checkpoint import encode_network
from tests.helpers.forked import contents
from tests.helpers.in_process import call, call_ok, refused

FLOW = {"modality": "flow", "train": {"network": "small3d", "epochs": 1, "warmup_epochs": 0}}


def picture(code):
    """A field's plane, whose size is the same for every code."""
    return cv2.imencode(".jpg", np.full((36, 48), code, np.uint8))[1].tobytes().ljust(400, b"\0")


class World:
    """The quick world with a flow expert, an untrained one, that reads files in `flow`."""

    def __init__(self, quick, root):
        self.quick, self.root, self.flow = quick, root, root / "flow"
        recipe = yaml.safe_load((quick.root / "teacher.yaml").read_text())
        recipe["experts"]["flow"] = FLOW
        (root / "teacher.yaml").write_text(yaml.safe_dump(recipe))
        self.data = ("-c", root / "teacher.yaml", "--manifest", quick.root / "manifest.jsonl")
        self.data += ("--videos", quick.root / "videos", "--workers", 0, "--device", "cpu")
        named = {f"data.{name}": str(quick.root / place) for name, place in self.places().items()}
        named |= {"flow.files.path": self.flow, "flow.files.layout": "denseflow", "flow.files.bound_px": 8}
        self.recipe = load_recipe(TeacherRecipe, files=[root / "teacher.yaml"], named=named)
        self.clips = ClipSet(self.recipe.data)
        for number, item in enumerate(self.clips.probe(self.clips.manifest.clips)):
            folder = self.folder(item.clip.video)
            folder.mkdir(parents=True)
            for field in range(item.video.frame_count - 1):
                for axis in "xy":
                    (folder / f"flow_{axis}_{field:05d}.jpg").write_bytes(picture(96 + number + field))
        self.save_expert()

    @staticmethod
    def places():
        return {"manifest": "manifest.jsonl", "videos": "videos"}

    def folder(self, video, root=None):
        return (root or self.flow) / video.rpartition(".")[0]

    def save_expert(self):
        torch.manual_seed(0)
        expert, heads = self.recipe.experts["flow"], {h.name: len(h.classes) for h in self.clips.manifest.heads}
        state = encode_network(make_network(expert, heads))
        seen = expert_identity(self.recipe, expert, self.clips)
        card = ExpertCard("flow", weights_sha256=hashlib.sha256(state).hexdigest(), training={}, **seen)
        save_expert(self.root / "expert", card, state)

    def options(self, out, flow=None, experts=("rgb", "flow")):
        chosen = {"rgb": self.quick.expert("rgb"), "flow": self.root / "expert"}
        files = ("--flow-files", flow or self.flow, "--flow-layout", "denseflow", "--flow-bound", 8)
        return (*self.data, *files, *(part for name in experts for part in ("--expert", chosen[name])), "-o", out)

    def build(self, out, *more, **options):
        return call("mmkd-cache", "build", *self.options(out, **options), *more)

    def without(self, root, *rows):
        """A copy of the flow without that of some clips (split, row), and where it is kept."""
        flow = shutil.copytree(self.flow, root / "flow")
        for split, row in rows:
            video = self.clips.manifest.split(split)[row].video
            self.folder(video, root / "kept").parent.mkdir(parents=True, exist_ok=True)
            self.folder(video, flow).rename(self.folder(video, root / "kept"))
        return flow

    def bring(self, root):
        shutil.copytree(root / "kept", root / "flow", dirs_exist_ok=True)


@pytest.fixture(scope="module")
def world(quick, tmp_path_factory):
    return World(quick, tmp_path_factory.mktemp("flow"))


@pytest.fixture(scope="module")
def whole(world):
    """A cache of all flow."""
    out = world.root / "whole"
    assert world.build(out).code == 0
    return out


LACKING = ("train", 1), ("standard", 8)


def as_earlier(rules):
    """Builds as earlier versions did, whose hash is over sizes."""
    return mock.patch.object(work, "BY_CONTENT", rules)


@pytest.mark.parametrize("rules", [BY_CONTENT, BY_SIZES])
def test_flow_that_came_is_computed_and_nothing_else(world, tmp_path, rules):
    flow, out = world.without(tmp_path, *LACKING), tmp_path / "cache"
    with as_earlier(rules):
        assert world.build(tmp_path / "all").code == 0
        assert world.build(out, flow=flow).code == 3
    reader = CacheReader(out)
    assert reader.status("train", "flow")[1, 0] == Status.FLOW_FAILED
    assert reader.init.experts["flow"]["flow_files"].startswith(BY_CONTENT) == (rules == BY_CONTENT)
    assert world.build(out, flow=flow).code == 3, "a cache of earlier stays the same one"
    world.bring(tmp_path)
    before = contents(out)
    error = refused("mmkd-cache", "build", *world.options(out, flow=flow), code=5)
    assert "If flow was missing and has come since, --retry-unusable computes what lacked it" in error
    assert contents(out) == before
    done = world.build(out, "--retry-unusable", "--json", flow=flow, experts=("flow",))
    assert done.code == 0, done.err
    assert "2 unusable clips can be read now, and computed again" in done.err
    assert json.loads(done.out)["shards"] == 2
    assert contents(out) == contents(tmp_path / "all")
    again = world.build(out, "--retry-unusable", flow=flow)
    assert "no clip that is recorded as unusable can be read now" in again.err
    assert world.build(out, flow=flow).code == 0


@pytest.mark.parametrize("came", [False, True])
def test_flow_that_changed_is_refused_whatever_else_came(world, tmp_path, came):
    flow, out = world.without(tmp_path, *LACKING), tmp_path / "cache"
    assert world.build(out, flow=flow).code == 3
    if came:
        world.bring(tmp_path)
    place = world.folder(world.clips.manifest.split("train")[0].video, flow) / "flow_x_00000.jpg"
    before, size = contents(out), place.stat().st_size
    place.write_bytes(picture(40))
    assert place.stat().st_size == size, "sizes tell nothing"
    for more in ((), ("--retry-unusable",)):
        error = refused("mmkd-cache", "build", *world.options(out, flow=flow), *more, code=5)
        assert "experts.flow.flow_files: cache" in error
    assert contents(out) == before


def test_a_damaged_field_that_was_repaired_is_computed(world, whole, tmp_path):
    flow, out = world.without(tmp_path), tmp_path / "cache"
    folder = world.folder(world.clips.manifest.split("train")[2].video, flow)
    fields = len(list(folder.iterdir())) // 2
    covered = np.linspace(0, fields - 1, SAMPLED_FIELDS).round().astype(int).tolist()
    kept = {
        path: path.read_bytes()
        for path in (folder / f"flow_x_{number:05d}.jpg" for number in set(range(fields)) - set(covered))
    }
    for path in kept:
        path.write_bytes(b"\xff\xd8")
    assert world.build(out, flow=flow).code == 3
    for path, data in kept.items():
        path.write_bytes(data)
    assert world.build(out, "--retry-unusable", flow=flow).code == 0
    assert contents(out) == contents(whole)


def test_flow_that_came_survives_being_killed_at_any_step(world, whole, quick, tmp_path):
    flow, first = world.without(tmp_path, *LACKING), tmp_path / "first"
    assert world.build(first, flow=flow).code == 3
    world.bring(tmp_path)
    steps = ("deleted root.json", "placed commits/train/flow.*", "opened init.json", "synced init.json")
    for step in (*steps, "deleted commits/train/flow.*"):
        out = shutil.copytree(first, tmp_path / "cache")
        build = ("build", *world.options(out, flow=flow), "--retry-unusable")
        stopped = quick.run(*build, faults={"acts": [{"match": step, "do": "kill"}]})
        assert stopped.code == -9, (step, stopped.err)
        result = world.build(out, "--retry-unusable", flow=flow)
        assert result.code == 0, (step, result.err)
        assert contents(out) == contents(whole), step
        shutil.rmtree(out)


def test_a_finished_flow_expert_knows_the_files_that_it_learned_from(world, tmp_path):
    flow, out = world.without(tmp_path, *LACKING), tmp_path / "expert"
    files = ("--flow-files", flow, "--flow-layout", "denseflow", "--flow-bound", 8)
    teach = ("mmkd-cache", "teach", "flow", *world.data, *files, "-o", out)
    call_ok(*teach)
    assert "was there already" in call_ok(*teach)
    held = json.loads((out / "expert.json").read_text())["training"]["flow_files"]
    assert held.startswith(BY_CONTENT)
    world.bring(tmp_path)
    assert "made with other flow files" in refused(*teach)
    for split, row in LACKING:
        shutil.rmtree(world.folder(world.clips.manifest.split(split)[row].video, flow))
    assert "was there already" in call_ok(*teach)
    (world.folder(world.clips.manifest.split("train")[0].video, flow) / "flow_y_00000.jpg").write_bytes(picture(40))
    assert "made with other flow files" in refused(*teach)
