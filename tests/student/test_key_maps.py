"""Key maps: a checkpoint with the original's names gives the original's outputs, and every key is accounted for.

What the originals compute is written here in plain functions of their state dicts, without torchvision's modules.
"""

import argparse

import pytest
import torch
from torchvision.models.video import mvit_v2_s
from torchvision.models.video.mvit import MSBlockConfig, MViT

from mmkd.data_manifests.errors import InputError
from mmkd.student.key_maps.key_maps import KEY_MAPS, map_weights
from mmkd.student.networks.networks import headed_network
from mmkd.student.networks.temporal_shift import TemporalShiftResNet
from tests.helpers.original_mvit import Block, draw_mvit, original_mvit
from tests.helpers.original_swin import draw_swin, original_swin
from tests.helpers.original_tsm import draw_tsm, original_tsm

HEADS = {"verb": 5, "noun": 3}


def loaded(name, heads, state, path):
    """Return our network with a checkpoint's parameters, every one of which must be used, and its classifiers."""
    mapped = map_weights(state, path)
    network = headed_network(name, heads=heads, channels=3).eval()
    own = network.backbone.state_dict()
    assert mapped.backbone.keys() == own.keys()
    network.backbone.load_state_dict(mapped.backbone)
    assert len(mapped.names) == len(state)
    assert set(mapped.names.values()) == set(state)
    for head, layer in mapped.classifiers.items():
        target = network.heads[head if head in heads else next(iter(heads))]
        target.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    return network, mapped


@pytest.mark.parametrize("form", ["repository", "mmaction", "authors"])
def test_video_swin_gives_the_originals_outputs(tmp_path, form, one_thread):
    backbone = draw_swin(seed=1)
    generator = torch.Generator().manual_seed(2)
    heads = {
        "repository": {"cls_head.fc_cls": 4},
        "mmaction": {"cls_head.fc_cls": 4},
        "authors": {f"classifiers.{head}": classes for head, classes in HEADS.items()},
    }[form]
    state = {f"backbone.{name}": value for name, value in backbone.items()}
    for head, classes in heads.items():
        state[f"{head}.weight"] = torch.randn(classes, 768, generator=generator)
        state[f"{head}.bias"] = torch.randn(classes, generator=generator)
    ours = HEADS if form == "authors" else {"action": 4}
    network, mapped = loaded("swin3d_t", ours, state, tmp_path)
    assert mapped.map.name == "video-swin"
    clips = torch.randn(1, 3, 20, 36, 32, generator=generator)  # 10 x 9 x 8 patches: padded, shifted, and neither
    features = original_swin(backbone, clips)
    with torch.inference_mode():
        outputs = network(clips)
    assert features.std() > 0.1  # drawn weights reach the output
    for head, layer in heads.items():
        expected = features @ state[f"{head}.weight"].T + state[f"{head}.bias"]
        found = outputs[head.removeprefix("classifiers.") if form == "authors" else "action"]
        assert found.shape == (1, layer)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


BLOCKS = (Block(16, 16, 1, 1, 4), Block(16, 32, 2, 2, 2), Block(32, 32, 2, 1, 2), Block(32, 64, 4, 2, 1))
"""As MViTv2-S, with fewer and narrower blocks: pooled, widened and neither."""


def small_mvit():
    """Return torchvision's MViT with those blocks, for 8 frames of 64 x 64."""
    settings = [
        MSBlockConfig(
            num_heads=block.heads,
            input_channels=block.width,
            output_channels=block.width_out,
            kernel_q=[3, 3, 3],
            kernel_kv=[3, 3, 3],
            stride_q=[1, block.stride_q, block.stride_q],
            stride_kv=[1, block.stride_kv, block.stride_kv],
        )
        for block in BLOCKS
    ]
    forms = {
        "residual_pool": True,
        "residual_with_cls_embed": False,
        "rel_pos_embed": True,
        "proj_after_attn": True,
    }
    return MViT((64, 64), 8, settings, **forms, num_classes=5).eval()  # as torchvision's mvit_v2_s


def test_slowfast_mvit_gives_the_originals_outputs(tmp_path, one_thread):
    generator = torch.Generator().manual_seed(3)
    backbone = draw_mvit(BLOCKS, size=16, frames=4, seed=2)
    head = {"head.projection.weight": torch.randn(5, 64, generator=generator)}
    head["head.projection.bias"] = torch.randn(5, generator=generator)
    mapped = map_weights({**backbone, **head}, tmp_path)
    assert mapped.map.name == "slowfast-mvit"
    assert set(mapped.names.values()) == backbone.keys() | head.keys()
    network = small_mvit()
    layer = mapped.classifiers["head"]
    network.load_state_dict(mapped.backbone | {"head.1.weight": layer.weight, "head.1.bias": layer.bias})
    clips = torch.randn(2, 3, 8, 64, 64, generator=generator)
    expected = original_mvit(backbone, clips, BLOCKS) @ layer.weight.T + layer.bias
    with torch.inference_mode():
        found = network(clips)
    assert expected.std() > 1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_names_of_slowfast_mvit_are_all_of_mvit_v2_s(tmp_path):
    widths = [96, 96, 192, 192, *[384] * 11, 768]
    out = [*widths[1:], 768]
    strides = {1: 2, 3: 2, 14: 2}
    kv = [8, 4, 4, *[2] * 11, 1, 1]
    blocks = tuple(Block(widths[n], out[n], out[n] // 96, strides.get(n, 1), kv[n]) for n in range(16))
    mapped = map_weights(draw_mvit(blocks, size=56, frames=8, seed=0), tmp_path)
    with torch.device("meta"):
        own = mvit_v2_s().state_dict()
    shapes = {name: value.shape for name, value in own.items() if not name.startswith("head.")}
    assert {name: value.shape for name, value in mapped.backbone.items()} == shapes


def test_the_absolute_positions_of_mvit_v1_lose_their_dimension_of_one(tmp_path):
    state = draw_mvit(BLOCKS, size=16, frames=4, seed=2)
    for name, count in (("spatial", 256), ("temporal", 4), ("class", 1)):
        state[f"pos_embed_{name}"] = torch.ones(1, count, 16)
    found = map_weights(state, tmp_path).backbone
    sizes = {name: tuple(found[f"pos_encoding.{name}_pos"].shape) for name in ("spatial", "temporal", "class")}
    assert sizes == {"spatial": (256, 16), "temporal": (4, 16), "class": (16,)}


@pytest.mark.parametrize("channels", [3, 10])
def test_epic_tsm_gives_the_originals_outputs_rgb_and_flow(tmp_path, channels, one_thread):
    state = draw_tsm(channels, 97 + 300, seed=6)
    mapped = map_weights(state, tmp_path)
    assert mapped.map.name == "tsm"
    assert set(mapped.names.values()) == state.keys()
    network = TemporalShiftResNet(channels).eval()
    network.load_state_dict(mapped.backbone)
    clips = torch.randn(2, 8, channels, 64, 64, generator=torch.Generator().manual_seed(7))
    expected = original_tsm(state, clips)
    with torch.inference_mode():
        features = network(clips.transpose(1, 2))
    assert (features.shape, expected.std() > 0.5) == ((2, 2048), True)
    assert {head: len(layer.weight) for head, layer in mapped.classifiers.items()} == {"verb": 97, "noun": 300}
    found = [
        features @ mapped.classifiers[head].weight.T + mapped.classifiers[head].bias for head in ("verb", "noun")
    ]
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-5, atol=1e-5 * float(expected.std()))
    reversed_in_time = network(clips.flip(1).transpose(1, 2))
    assert (reversed_in_time - features).abs().max() > 0.1  # it sees the order of frames


def test_the_one_classifier_of_another_tsm_is_not_cut(tmp_path):
    mapped = map_weights(draw_tsm(3, 174, seed=6), tmp_path)
    assert {head: len(layer.weight) for head, layer in mapped.classifiers.items()} == {"head": 174}


def test_training_starts_from_video_swins_own_names_for_flow_too(tmp_path):
    backbone = draw_swin(seed=1)
    state = {f"backbone.{name}": value for name, value in backbone.items()}
    state |= {"cls_head.fc_cls.weight": torch.ones(400, 768), "cls_head.fc_cls.bias": torch.ones(400)}
    torch.save({"state_dict": state, "meta": argparse.Namespace(epoch=30)}, tmp_path / "swin.pth")
    for channels in (3, 2):
        network = headed_network("swin3d_t", heads=HEADS, channels=channels, weights=tmp_path / "swin.pth")
        own = network.backbone.state_dict()
        assert torch.equal(own["features.4.5.mlp.3.weight"], backbone["layers.2.blocks.5.mlp.fc2.weight"])
        stem = backbone["patch_embed.proj.weight"]
        expected = stem if channels == 3 else stem.mean(1, keepdim=True).repeat(1, 2, 1, 1, 1)
        assert torch.equal(own["patch_embed.proj.weight"], expected)


def test_a_map_that_is_not_the_files_is_refused_and_the_files_own_named(tmp_path):
    state = {f"backbone.{name}": value for name, value in draw_swin(seed=0).items()}
    assert map_weights(state, tmp_path, "video-swin").map.name == "video-swin"
    with pytest.raises(InputError, match="choose among auto, video-swin"):
        map_weights(state, tmp_path, "swin")
    with pytest.raises(InputError, match="the key map is not 'video-swin' but 'same'"):
        map_weights({"fc.weight": torch.ones(2, 2)}, tmp_path, "video-swin")
    assert list(KEY_MAPS)[-1] == "same"


def test_a_classifier_that_is_not_whole_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no whole classifier: fc\.bias"):
        map_weights({"fc.bias": torch.ones(2)}, tmp_path)
    with pytest.raises(InputError, match="no whole classifier"):
        map_weights({"fc.bias": torch.ones(2), "fc.weight": torch.ones(3, 4)}, tmp_path)


def test_two_names_that_become_one_are_refused(tmp_path):
    state = {f"backbone.{name}": value for name, value in draw_swin(seed=0).items()}
    state["features.0.0.norm1.weight"] = torch.ones(96)
    with pytest.raises(InputError, match="hold two networks"):
        map_weights(state, tmp_path)
