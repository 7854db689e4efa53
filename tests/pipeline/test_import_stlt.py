"""The authors' STLT as a boxes expert: their names, their numbers of categories, their epsilon."""

import json

import numpy as np
import pytest
import torch

from mmkd.cache_tools.cache.reader import CacheReader
from mmkd.pipeline.experts.expert import load_expert, read_card
from mmkd.pipeline.experts.stlt import STLT
from mmkd.student.key_maps.key_maps import map_weights
from tests.helpers.in_process import call_ok, refused
from tests.helpers.original_stlt import draw_stlt, original_stlt

HIDDEN, LAYERS, FRAMES = 32, 2, 6
OURS = torch.tensor([0, 2, 1])
"""Our number of each of the authors' categories: none, object, hand."""


def draw_inputs(seed: int):
    """Return inputs by the authors' numbers: 2 clips, 4 frames, 5 boxes; sides and states of hands alone."""
    generator = torch.Generator().manual_seed(seed)
    categories = torch.randint(0, 3, (2, 4, 5), generator=generator)
    categories[0, 1] = 0  # a frame without boxes
    hands = categories == 2
    return {
        "boxes": torch.rand(2, 4, 5, 4, generator=generator) * (categories > 0)[..., None],
        "scores": torch.rand(2, 4, 5, generator=generator) * (categories > 0),
        "categories": categories,
        "sides": torch.randint(1, 3, (2, 4, 5), generator=generator) * hands,
        "states": torch.randint(1, 6, (2, 4, 5), generator=generator) * hands,
    }


def ours(inputs):
    return {**inputs, "categories": OURS[inputs["categories"]]}


def test_the_authors_stlt_gives_the_originals_outputs(tmp_path):
    heads = {"verb": 7, "noun": 9}
    state = draw_stlt(HIDDEN, LAYERS, FRAMES, heads, seed=1)
    mapped = map_weights(state, tmp_path)
    assert mapped.map.name == "stlt"
    assert set(mapped.names.values()) == state.keys()
    sizes = {"hidden": HIDDEN, "spatial_layers": LAYERS, "temporal_layers": LAYERS, "max_frames": FRAMES}
    network = STLT(heads, **sizes, **mapped.map.layout).eval()
    layers = {
        f"heads.{head}.{part}": getattr(layer, part)
        for head, layer in mapped.classifiers.items()
        for part in ("weight", "bias")
    }
    network.load_state_dict(mapped.backbone | layers)
    inputs = draw_inputs(seed=2)
    expected = original_stlt(state, LAYERS, inputs)
    with torch.inference_mode():
        found = network(ours(inputs))
        default = STLT(heads, **sizes, sides=True, states=True).eval()
        default.load_state_dict(mapped.backbone | layers)
        of_another_epsilon = default(ours(inputs))
    for head in heads:
        assert expected[head].std() > 0.5
        torch.testing.assert_close(found[head], expected[head], rtol=1e-5, atol=1e-5)
        assert (of_another_epsilon[head] - expected[head]).abs().max() > 0.01  # the trap: PyTorch's 1e-5


def test_the_published_sizes_are_all_named(tmp_path):
    state = draw_stlt(768, 6, 16, {"ACTION": 174}, seed=0)
    assert len(state) == 160
    mapped = map_weights(state, tmp_path)
    with torch.device("meta"):
        own = STLT({"ACTION": 174}, max_frames=16, **mapped.map.layout).state_dict()
    assert {name: value.shape for name, value in mapped.backbone.items()} == {
        name: value.shape for name, value in own.items() if not name.startswith("heads.")
    }


@pytest.fixture(scope="module")
def original(quick, tmp_path_factory):
    """A checkpoint with its class list, and the command's options but for -o."""
    folder = tmp_path_factory.mktemp("stlt")
    classes = json.loads((quick.root / "manifest.jsonl").read_text().splitlines()[0])["heads"]["action"]
    state = draw_stlt(HIDDEN, LAYERS, FRAMES, {"ACTION": len(classes)}, seed=3)
    torch.save(state, folder / "stlt.pt")
    (folder / "labels.json").write_text(json.dumps({name: n for n, name in enumerate(reversed(classes))}))
    data = ("--manifest", quick.root / "manifest.jsonl", "--videos", quick.root / "videos", "--workers", 0)
    stage_one = ("-c", quick.root / "teacher.yaml", *data, "--boxes", quick.root / "bounding_boxes.json")
    stage_one = (*stage_one, "--set", "experts.boxes.layout.attention_heads=8")
    options = (folder / "stlt.pt", "--modality", "boxes", "--classes", folder / "labels.json")
    return state, stage_one, (*options, "--head", "action=ACTION")


def test_it_is_imported_with_its_own_sizes_and_built_like_a_taught_one(original, tmp_path):
    state, stage_one, options = original
    out = tmp_path / "boxes"
    said = call_ok("mmkd-cache", "import-expert", *options, *stage_one, "-o", out)
    assert f"stlt.pt: {len(state)} keys used, names of 'stlt'" in said
    layout = read_card(out).recipe["layout"]
    named = {
        key: layout[key] for key in ("hidden", "spatial_layers", "temporal_layers", "norm_eps", "sides", "states")
    }
    assert list(named.values()) == [HIDDEN, LAYERS, LAYERS, 0.1, True, True]
    inputs = draw_inputs(seed=4)
    expected = original_stlt(state, LAYERS, inputs)["ACTION"].flip(1)  # the list is the manifest's, reversed
    found = load_expert(out, torch.device("cpu")).logits(ours(inputs))["action"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    call_ok("mmkd-cache", "build", *stage_one, "--expert", out, "-o", tmp_path / "cache")
    stored = CacheReader(tmp_path / "cache").logits("train", "boxes")["action"]
    assert np.isfinite(stored).all()
    assert np.ptp(stored, axis=2).min() > 0.5


def test_views_of_more_frames_than_it_has_positions_are_refused(original, tmp_path):
    _, stage_one, options = original
    longer = ("--set", f"views.frames={FRAMES + 1}")
    text = refused("mmkd-cache", "import-expert", *options, *stage_one, *longer, "-o", tmp_path / "boxes")
    assert f"know the positions of {FRAMES} frames, and a view has {FRAMES + 1}" in text


def test_another_checkpoint_is_not_taken_for_boxes(original, tmp_path):
    _, stage_one, options = original
    classes = len(json.loads(options[4].read_text()))
    torch.save({"fc.weight": torch.ones(classes, 8), "fc.bias": torch.ones(classes)}, tmp_path / "w.pth")
    options = (tmp_path / "w.pth", *options[1:-2])
    text = refused("mmkd-cache", "import-expert", *options, *stage_one, "-o", tmp_path / "boxes")
    assert "are not those of STLT" in text
    assert not (tmp_path / "boxes").exists()
