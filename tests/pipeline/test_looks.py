"""Experts with frames, size and stacks of their own: one cache, each logit as computed by hand."""

import cv2
import numpy as np
import pytest
import torch
from pydantic import ValidationError

from mmkd.cache_tools.cache.reader import CacheReader
from mmkd.cache_tools.frames.clip_set import ClipSet
from mmkd.cache_tools.frames.records import ClipFacts
from mmkd.cache_tools.recipes.recipe import load_recipe
from mmkd.pipeline.experts.expert import load_expert, read_card
from mmkd.pipeline.flow.clip_flow import all_pairs, clip_flow, stack_starts
from mmkd.pipeline.inputs.boxes import boxes_at, open_boxes
from mmkd.pipeline.recipe import ExpertRecipe, TeacherRecipe
from tests.helpers.commands import run_ok

LOOKS = """
experts:
  wide: {modality: rgb, look: {frames: 16, size_px: 40}, train: {epochs: 1, warmup_epochs: 0, batch_size: 8,
    normalisation: {mean: [0.5, 0.4, 0.3], std: [0.25]}}}
  stack: {modality: flow, flow_stack: 3, look: {size_px: 40}, train: {epochs: 1, warmup_epochs: 0, batch_size: 8}}
  laid: {modality: boxes, look: {frames: 12}, layout: {hidden: 32, attention_heads: 4, spatial_layers: 1,
    temporal_layers: 1}, train: {epochs: 1, warmup_epochs: 0, batch_size: 8}}
"""
NAMES = ("wide", "stack", "laid")
ROW, VIEW = 9, 2


@pytest.fixture(scope="module")
def looked(tiny, tmp_path_factory):
    """A cache of the canonical rgb expert and three with looks of their own."""
    root = tmp_path_factory.mktemp("looks")
    (root / "looks.yaml").write_text(LOOKS)
    options = [*tiny.stage_one, "-c", root / "looks.yaml"]
    for name in NAMES:
        run_ok("mmkd-cache", "teach", name, *options, "-o", root / name)
    experts = [part for name in NAMES for part in ("--expert", root / name)]
    experts += ["--expert", tiny.root / "experts" / "rgb"]
    run_ok("mmkd-cache", "build", *options, *experts, "-o", root / "cache")
    run_ok("mmkd-cache", "drift", root / "cache", *options, *experts)
    return root


class Sample:
    """One view of one clip, with every frame decoded by OpenCV."""

    def __init__(self, tiny, looked):
        named = {
            "data.manifest": str(tiny.root / "manifest.jsonl"),
            "data.videos": str(tiny.root / "videos"),
            "data.workers": 0,
            "boxes.files": [str(tiny.root / "bounding_boxes.json")],
        }
        files = [tiny.root / "teacher.yaml", tiny.root / "tiny.yaml", looked / "looks.yaml"]
        self.recipe = load_recipe(TeacherRecipe, files=files, named=named)
        self.reader = CacheReader(looked / "cache")
        table = self.reader.split("train")
        self.view = table.view(ROW, VIEW)
        self.clip_set = ClipSet(self.recipe.data)
        clips = [c for c in self.clip_set.manifest.split("train") if c.clip_id == table.clip_ids[ROW]]
        (self.item,) = self.clip_set.probe(clips)
        capture = cv2.VideoCapture(str(tiny.root / "videos" / self.item.clip.video))
        self.frames = []
        while (read := capture.read())[0]:
            self.frames.append(cv2.cvtColor(read[1], cv2.COLOR_BGR2RGB))
        assert len(self.frames) == self.item.facts.frame_count

    def look(self, frames):
        own = self.view.frame_indices
        at = ((np.arange(frames) + 0.5) * len(own) / frames - 0.5).clip(0, len(own) - 1)
        return np.rint(np.interp(at, np.arange(len(own)), own)).astype(int)

    def pixels(self, frames, size):
        left, top, width, height = self.view.crop_xywh
        method = cv2.INTER_AREA if size < width else cv2.INTER_LINEAR
        windows = [self.frames[i][top : top + height, left : left + width] for i in self.look(frames)]
        seen = np.stack([cv2.resize(window, (size, size), interpolation=method) for window in windows])
        return seen[:, :, ::-1].copy() if self.view.flip else seen


@pytest.fixture(scope="module")
def sample(tiny, looked):
    return Sample(tiny, looked)


def network(folder):
    return load_expert(folder, torch.device("cpu")).network


def check(sample, name, logits):
    expected = logits["action"][0].detach().numpy()
    assert np.ptp(expected) > 0.01, "the comparison must not be between constants"
    np.testing.assert_allclose(sample.reader.logits("train", name)["action"][ROW, VIEW], expected, atol=5e-3)


@pytest.mark.parametrize("name", ["rgb", "wide"])
def test_rgb_logits_are_those_of_the_look_by_hand(tiny, looked, sample, name):
    policy = sample.recipe.views
    frames, size = (16, 40) if name == "wide" else (policy.frames, policy.size_px)
    clips = torch.from_numpy(sample.pixels(frames, size)).permute(3, 0, 1, 2)[None].float() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    if name == "wide":  # its recipe has numbers of its own
        mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.25, 0.25, 0.25])
    clips = (clips - mean.view(3, 1, 1, 1)) / std.view(3, 1, 1, 1)
    folder = looked / "wide" if name == "wide" else tiny.root / "experts" / "rgb"
    check(sample, name, network(folder).network(clips))


def test_stacked_flow_logits_are_those_of_the_stack_by_hand(looked, sample):
    facts, recipe, view = sample.item.facts, sample.recipe.flow, sample.view
    frames = sample.clip_set.source.read(sample.item.clip.video, np.arange(facts.frame_count), sample.item.video)
    fields = clip_flow(frames, facts, all_pairs(facts, recipe.step), recipe=recipe, device="cpu").fields
    left, top, width, height = view.crop_xywh
    steps = (np.arange(40) + 0.5) / 40
    rows, columns = fields.shape[2:]
    x = ((left + steps * width) / facts.width * columns - 0.5).astype(np.float32)
    y = ((top + steps * height) / facts.height * rows - 0.5).astype(np.float32)
    at = np.meshgrid(x, y)
    channels = []
    for frame in view.frame_indices:
        for shift in (-1, 0, 1):
            pair = min(max(frame + shift, 0), len(fields) - 1)
            for part in (0, 1):
                seen = cv2.remap(fields[pair, part], *at, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
                if view.flip:
                    seen = seen[:, ::-1] * (-1 if part == 0 else 1)
                channels.append(seen)
    stacked = np.stack(channels).reshape(len(view.frame_indices), 6, 40, 40).transpose(1, 0, 2, 3)
    scale = sample.recipe.experts["stack"].train.flow_scale_px
    clips = torch.from_numpy((stacked / scale).clip(-1, 1).astype(np.float32))[None]
    check(sample, "stack", network(looked / "stack").network(clips))


def test_boxes_are_those_at_the_looks_times(looked, sample):
    facts, times_seconds = sample.item.facts, sample.item.video.times_seconds[sample.look(12)]
    track = open_boxes(sample.recipe.boxes, {sample.item.clip.video}).track(sample.item.clip.video)
    found = boxes_at(track, times_seconds, width=facts.width, height=facts.height)
    named = {"boxes": found.boxes, "categories": found.categories, "scores": found.scores}
    check(sample, "laid", network(looked / "laid")({k: torch.from_numpy(v)[None] for k, v in named.items()}))


def test_a_student_trains_on_that_cache_at_the_canonical_view(tiny, looked):
    options = ["-c", tiny.root / "student.yaml", *tiny.data, "--cache", looked / "cache"]
    short = ["--set", "train.epochs=1", "--set", "train.warmup_epochs=0"]
    run_ok("mmkd-student", "train", *options, *short, "-o", looked / "run")
    assert CacheReader(looked / "cache").split("train").view(0, 0).frame_indices.shape == (8,)


def test_only_a_look_of_its_own_is_in_the_fingerprint(tiny, looked):
    fields = {name: read_card(looked / name).fingerprint_fields(None) for name in NAMES}
    further = ("look", "stack", "normalisation")
    keys = {name: {key for key in own if any(word in key for word in further)} for name, own in fields.items()}
    assert keys == {
        "wide": {"look.frames", "look.rule", "look.size_px", "normalisation"},
        "stack": {"flow_stack", "look.size_px"},
        "laid": {"look.frames", "look.rule"},
    }
    canonical = read_card(tiny.root / "experts" / "rgb").fingerprint_fields(None)
    assert not {key for key in canonical if any(word in key for word in further)}


def test_a_stack_is_around_its_frame_and_inside_the_clip():
    facts = ClipFacts(first_frame=10, frame_count=9, width=8, height=8)
    starts = stack_starts(np.array([10, 14, 18]), facts, 1, 3).reshape(3, 3)
    assert starts.tolist() == [[10, 10, 11], [13, 14, 15], [17, 17, 17]]
    assert stack_starts(np.array([14]), facts, 2, 4).tolist() == [13, 14, 15, 16]


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"modality": "rgb", "flow_stack": 2}, "flow_stack 2 is for flow experts"),
        ({"modality": "flow", "train": {"permute_channels": 0.5}}, "train.permute_channels is for rgb experts"),
        ({"modality": "boxes", "train": {"erasing": {}}}, "train.erasing is for rgb experts; this one sees boxes"),
        ({"modality": "boxes", "look": {"size_px": 32}}, "boxes have no size"),
        ({"modality": "boxes", "look": {"frames": 65}}, "takes 64 at most"),
        ({"modality": "rgb", "look": {"size_px": 1025}}, "less than or equal to 1024"),
    ],
)
def test_a_look_that_cannot_be_is_refused_with_the_recipe(fields, told):
    with pytest.raises(ValidationError, match=told):
        ExpertRecipe.model_validate(fields)
