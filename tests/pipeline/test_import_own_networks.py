"""Checkpoints of networks that are not ours: VideoMAE's for transformers, SlowFast's for its own class."""

import json

import numpy as np
import pytest
import torch

from mmkd.data_manifests.errors import InputError
from mmkd.pipeline.experts.expert import load_expert
from mmkd.pipeline.imports.import_expert import own_name
from mmkd.student.key_maps.key_maps import map_weights
from mmkd.student.networks.networks import build_network
from mmkd.student.recipes.train import TrainRecipe
from tests.helpers.epic_world import write_epic
from tests.helpers.in_process import call_ok, refused
from tests.helpers.original_slowfast import draw_slowfast
from tests.helpers.original_videomae import draw_videomae, original_videomae

CPU = torch.device("cpu")
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
OWN = """from transformers import VideoMAEConfig, VideoMAEForVideoClassification


class VideoMAE(VideoMAEForVideoClassification):
    def forward(self, clips):
        return {"action": super().forward(clips.transpose(1, 2)).logits}


def videomae(*, channels, frames, size_px, heads, **config):
    shape = {"num_frames": frames, "image_size": size_px, "num_labels": heads["action"], "layer_norm_eps": 1e-6}
    network = VideoMAE(VideoMAEConfig(**shape, **config))
    network.fc_norm.eps = 1e-6
    return network
"""
NETWORK = "own_videomae:videomae"


@pytest.fixture
def own_network(tmp_path, monkeypatch):
    """The module of a user's network, if transformers is there and has the names of its version 5."""
    pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "own_videomae.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    network = build(classes=4)
    if not any(name.endswith("attention.query.bias") for name in network.state_dict()):
        pytest.skip("this version of transformers has other names for the biases")
    return network


def build(classes, **train):
    recipe = TrainRecipe(network=NETWORK, network_options=SIZES, **train)
    return build_network(recipe, heads={"action": classes}, modality="rgb", frames=4, size_px=32).eval()


def drawn(classes):
    return draw_videomae(width=32, blocks=3, hidden=48, classes=classes, seed=1)


def test_every_key_of_videomae_is_one_of_transformers_and_all_of_them(own_network, tmp_path):
    state = drawn(4)
    mapped = map_weights(state, tmp_path)
    assert mapped.map.name == "videomae"
    assert set(mapped.names.values()) == state.keys()
    theirs = {own_name(name): value.shape for name, value in own_network.state_dict().items()}
    ours = {name: value.shape for name, value in mapped.backbone.items()}
    assert ours | {"classifier.weight": (4, 32), "classifier.bias": (4,)} == theirs


@pytest.mark.parametrize("container", ["module", "model"])
def test_videomae_becomes_an_expert_with_the_originals_logits(own_network, quick, tmp_path, container, one_thread):
    classes = json.loads((quick.root / "manifest.jsonl").read_text().splitlines()[0])["heads"]["action"]
    names = list(reversed(classes))
    state = drawn(len(names))
    torch.save({container: state}, tmp_path / "videomae.pth")
    (tmp_path / "classes.json").write_text(json.dumps(names))
    (tmp_path / "teacher.yaml").write_text(
        "views: {frames: 4, size_px: 32}\n"
        f"experts: {{mae: {{modality: rgb, train: {{network_options: {json.dumps(SIZES)}}}}}}}\n"
    )
    said = call_ok(
        *("mmkd-cache", "import-expert", tmp_path / "videomae.pth", "--modality", "rgb", "--network", NETWORK),
        *("--classes", tmp_path / "classes.json", "-c", tmp_path / "teacher.yaml", "--name", "mae"),
        *("--manifest", quick.root / "manifest.jsonl", "--videos", quick.root / "videos"),
        *("-o", tmp_path / "mae"),
    )
    assert f"{len(state)} keys used, names of 'videomae'" in said
    network = load_expert(tmp_path / "mae", CPU, [NETWORK]).network
    pixels = torch.randint(0, 256, (2, 4, 32, 32, 3), dtype=torch.uint8)
    mean, std = (torch.tensor(part).view(3, 1, 1) for part in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    clips = (pixels.permute(0, 1, 4, 2, 3) / 255 - mean) / std
    expected = original_videomae(state, clips.transpose(1, 2), heads=4)
    assert expected.std() > 0.3
    with torch.inference_mode():
        found = network({"rgb": pixels})["action"]
    torch.testing.assert_close(found, expected.flip(1), rtol=1e-4, atol=1e-5)


def test_training_starts_from_videomae_without_its_classifier(own_network, tmp_path):
    state = drawn(400)
    torch.save({"module": state}, tmp_path / "videomae.pth")
    network = build(4, weights=tmp_path / "videomae.pth").state_dict()
    key = next(name for name in network if name.endswith("layer.1.attention.attention.key.weight"))
    assert torch.equal(network[key], state["blocks.1.attn.qkv.weight"][32:64])
    del state["blocks.2.mlp.fc2.bias"]
    torch.save({"module": state}, tmp_path / "less.pth")
    with pytest.raises(InputError, match="are not those of own_videomae:videomae"):
        build(4, weights=tmp_path / "less.pth")


def test_epic_s_slowfast_becomes_an_expert_of_its_own_class_with_both_heads(tmp_path, one_thread):
    world, theirs = write_epic(tmp_path), draw_slowfast(seed=2)
    call_ok("mmkd-cache", "manifest", "epic-kitchens", tmp_path / "annotations", "-o", tmp_path / "m.jsonl")
    generator, heads = torch.Generator().manual_seed(3), {"verb": 97, "noun": 300}
    state = dict(theirs.state_dict())
    for head, classes in heads.items():
        state[f"head.projection_{head}.weight"] = torch.randn(classes, theirs.feature_count, generator=generator)
        state[f"head.projection_{head}.bias"] = torch.randn(classes, generator=generator)
    torch.save({"model_state": state, "epoch": 30, "cfg": "TRAIN: ..."}, tmp_path / "slowfast.pyth")
    (tmp_path / "teacher.yaml").write_text(
        "views: {sampling: dense, frames: 8, seconds_between_frames: 0.1, size_px: 32}\n"
        "experts: {slowfast: {modality: rgb}}\n"
    )
    name = "tests.helpers.original_slowfast:slowfast"
    classes = [f"{head}={tmp_path / 'annotations' / f'EPIC_100_{head}_classes.csv'}" for head in heads]
    options = ("--network", name, "--modality", "rgb", "--classes", classes[0], "--classes", classes[1])
    data = ("--manifest", tmp_path / "m.jsonl", "--videos", world.videos, "-c", tmp_path / "teacher.yaml")
    command = ("mmkd-cache", "import-expert", tmp_path / "slowfast.pyth", *options, *data, "--name", "slowfast")
    said = call_ok(*command, "-o", tmp_path / "slowfast")
    assert f"{len(state)} keys used, names of 'slowfast'" in said
    assert "left over" not in said
    network = load_expert(tmp_path / "slowfast", CPU, [name]).network
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 8, 32, 32, 3), np.uint8))
    with torch.inference_mode():
        found = network({"rgb": pixels})
        features = theirs((pixels.permute(0, 4, 1, 2, 3) / 255 - 0.45) / 0.225)
    for head in heads:
        expected = features @ state[f"head.projection_{head}.weight"].T + state[f"head.projection_{head}.bias"]
        torch.testing.assert_close(found[head], expected, rtol=1e-4, atol=1e-4)
    del state["s2.pathway1_res0.branch2.b.weight"]
    torch.save({"model_state": state}, tmp_path / "slowfast.pyth")
    error = refused(*command, "-o", tmp_path / "other")
    assert "s2.pathway1_res0.branch2.b.weight" in error
    assert not (tmp_path / "other").exists()
