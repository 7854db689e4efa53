"""Key maps: a checkpoint with the original's names gives the original's outputs, and every key is accounted for.

What the originals compute is written here in plain functions of their state dicts, without torchvision's modules.
"""

import pytest
import torch

from mmkd.data_manifests.errors import InputError
from mmkd.student.key_maps.key_maps import KEY_MAPS, map_weights
from mmkd.student.networks.networks import headed_network
from tests.helpers.original_swin import draw_swin, original_swin

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
