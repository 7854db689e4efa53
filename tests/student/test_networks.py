"""Networks by name: shapes, determinism, weights from a file, and what is refused."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file

from mmkd.data_manifests.errors import InputError
from mmkd.student.networks.networks import VideoClassifier, build_network, headed_network
from mmkd.student.recipes.augment import JitterRecipe
from mmkd.student.recipes.loop import LoopRecipe
from mmkd.student.recipes.train import TrainRecipe

HEADS = {"verb": 5, "noun": 7}


def small(channels=3, **options):
    return headed_network("small3d", heads=HEADS, channels=channels, **options)


@pytest.mark.parametrize(
    ("name", "size_px", "features"), [("small3d", 56, 128), ("swin3d_t", 32, 768), ("r3d_18", 32, 512)]
)
def test_forward_gives_float32_logits_per_head(name, size_px, features):
    network = headed_network(name, heads=HEADS, channels=3).eval()
    with torch.inference_mode():
        logits = network(torch.zeros(1, 3, 4, size_px, size_px))
    assert {head: tuple(value.shape) for head, value in logits.items()} == {"verb": (1, 5), "noun": (1, 7)}
    assert network.heads["verb"].in_features == features


def test_published_sizes_hold_for_swin():
    network = headed_network("swin3d_t", heads={"action": 174}, channels=3)
    millions = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    assert millions == pytest.approx(27.9 + 0.1, abs=0.1)  # METHOD: 27.9 M, and 174 x 768 for the head
    flow = headed_network("swin3d_t", heads={"action": 174}, channels=2)
    assert flow.backbone.patch_embed.proj.in_channels == 2


def test_drop_path_reaches_swin_and_is_refused_elsewhere():
    swin = headed_network("swin3d_t", heads=HEADS, channels=3, drop_path=0.4)
    rates = [module.p for module in swin.modules() if type(module).__name__ == "StochasticDepth"]
    assert max(rates) == pytest.approx(0.4)
    with pytest.raises(InputError, match="no stochastic depth"):
        small(drop_path=0.1)


def test_heads_are_float32_under_autocast():
    network = small()
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(torch.randn(2, 3, 8, 32, 32))
    assert all(value.dtype == torch.float32 for value in logits.values())


def test_flow_is_scaled_and_clipped_and_channel_0_stays_horizontal():
    classifier = VideoClassifier(small(channels=2), "flow", flow_scale_px=10.0)
    flow = torch.zeros(1, 4, 2, 8, 8)
    flow[:, :, 0], flow[:, :, 1] = 5.0, -40.0
    clips = classifier.prepare_flow(flow)
    assert clips.shape == (1, 2, 4, 8, 8)
    assert clips[:, 0].unique().tolist() == [0.5]
    assert clips[:, 1].unique().tolist() == [-1.0]


def test_build_network_depends_on_the_seed_and_on_nothing_drawn_before():
    recipe = TrainRecipe(network="small3d", seed=3, jitter=JitterRecipe(hue=0.0))
    first = build_network(recipe, heads=HEADS, modality="flow")
    torch.rand(7)
    state = torch.get_rng_state()
    second = build_network(recipe, heads=HEADS, modality="flow")
    assert torch.equal(torch.get_rng_state(), state)
    other = build_network(recipe.model_copy(update={"seed": 4}), heads=HEADS, modality="flow")
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))
    assert first.augment.jitter.hue == 0.0
    assert first({"flow": torch.zeros(1, 8, 2, 56, 56)}).keys() == HEADS.keys()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_are_loaded_all_but_the_classifier(tmp_path, suffix):
    donor, path = small(), tmp_path / f"weights{suffix}"
    state = {name: value.contiguous() for name, value in donor.state_dict().items()}
    save_file(state, path) if suffix == ".safetensors" else torch.save({"state_dict": state}, path)
    taker = headed_network("small3d", heads={"action": 3}, channels=3, weights=path)
    for name, value in taker.backbone.state_dict().items():
        assert torch.equal(value, donor.backbone.state_dict()[name]), name


def test_torchvision_names_are_understood_and_flow_averages_rgb(tmp_path):
    from torchvision.models.video import r3d_18

    donor, path = r3d_18(weights=None), tmp_path / "r3d.pth"
    torch.save(donor.state_dict(), path)
    taker = headed_network("r3d_18", heads=HEADS, channels=2, weights=path)
    expected = donor.state_dict()["stem.0.weight"].mean(1)
    for channel in range(2):
        assert torch.equal(taker.backbone.state_dict()["stem.0.weight"][:, channel], expected)
    assert torch.equal(taker.backbone.state_dict()["layer4.1.conv1.0.weight"], donor.layer4[1].conv1[0].weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("layers.3.conv.weight"), r"1 missing \(layers.3.conv.weight\)"),
        (lambda state: state.update(extra=torch.zeros(1)), r"1 unexpected \(extra\)"),
        (
            lambda state: state.update({"layers.3.conv.weight": torch.zeros(2)}),
            r"1 of another shape \(layers.3.conv.weight\)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, change, message):
    state = dict(small().backbone.state_dict())
    change(state)
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(InputError, match=message):
        small(weights=tmp_path / "weights.pth")


@pytest.mark.parametrize(
    "prefix",
    ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module.", "network._orig_mod.backbone.", "model."],
)
def test_the_prefixes_of_wrappers_are_dropped_in_any_order(tmp_path, prefix):
    donor = small().backbone
    torch.save({f"{prefix}{name}": value for name, value in donor.state_dict().items()}, tmp_path / "w.pth")
    taker = small(weights=tmp_path / "w.pth")
    for name, value in donor.state_dict().items():
        assert torch.equal(taker.backbone.state_dict()[name], value)


def test_weights_whose_parts_were_compiled_one_by_one_are_read(tmp_path):
    donor = small().backbone
    donor.layers[3] = torch.compile(donor.layers[3])
    assert "layers.3._orig_mod.conv.weight" in donor.state_dict()
    torch.save({"state_dict": donor.state_dict()}, tmp_path / "w.pth")
    small(weights=tmp_path / "w.pth")


def test_a_file_with_two_networks_is_refused(tmp_path):
    state = small().backbone.state_dict()
    torch.save(state | {f"module.{name}": value for name, value in state.items()}, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"hold two networks: layers\.0\.0\.weight and module\.layers\.0"):
        small(weights=tmp_path / "w.pth")


def test_the_command_for_a_file_with_a_whole_network_takes_the_weights_out(tmp_path):
    donor = small().backbone
    path = tmp_path / "it's a checkpoint.pth"
    torch.save(donor, path)
    with pytest.raises(InputError, match=r"it holds more than tensors: a whole network") as caught:
        small(weights=path)
    message = str(caught.value)
    assert "\n" not in message
    arguments = shlex.split(message.partition(" instead: ")[2])
    assert arguments[:2] == ["python", "-c"]
    exec(arguments[2], {})  # as `python -c` does
    named = re.search(r"name (.*) instead", message)[1]
    taker = small(weights=Path(named))
    assert torch.equal(
        taker.backbone.state_dict()["layers.3.conv.weight"], donor.state_dict()["layers.3.conv.weight"]
    )


class Code:
    def __reduce__(self):
        return (print, ("code was run",))


def test_a_weights_file_that_is_none_or_holds_code_is_refused(tmp_path, capsys):
    torch.save({"layers": Code()}, tmp_path / "evil.pth")
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "text.safetensors").write_text("no weights")
    torch.save([1, 2], tmp_path / "list.pth")
    for name in ("evil.pth", "text.pth", "text.safetensors", "list.pth", "absent.pth"):
        with pytest.raises(InputError, match=name) as caught:
            small(weights=tmp_path / name)
        assert "\n" not in str(caught.value)
    assert "code was run" not in capsys.readouterr().out


def test_impossible_requests_are_refused():
    with pytest.raises(InputError, match="choose among small3d"):
        headed_network("resnet", heads=HEADS, channels=3)
    with pytest.raises(InputError, match="at least one head"):
        headed_network("small3d", heads={}, channels=3)
    with pytest.raises(InputError, match="must be rgb, flow or audio"):
        VideoClassifier(small(), "boxes")
    with pytest.raises(InputError, match="must be positive"):
        VideoClassifier(small(), "flow", flow_scale_px=0)


@pytest.mark.parametrize(
    "bad",
    [
        {"epochs": 0},
        {"epochs": 3, "warmup_epochs": 3},
        {"learning_rate": 0},
        {"clip_norm": float("inf")},
        {"seed": -1},
        {"drop_path": 1.0},
        {"network": "swin"},
        {"jitter": {"hue": 0.7}},
        {"lr": 0.1},
    ],
)
def test_recipe_refuses_bad_values_and_unknown_keys(bad):
    with pytest.raises(ValidationError):
        TrainRecipe.model_validate(bad)


def test_recipe_defaults_are_the_authors():
    recipe = LoopRecipe()
    assert (recipe.epochs, recipe.batch_size, recipe.learning_rate) == (30, 16, 1e-4)
    assert (recipe.weight_decay, recipe.warmup, recipe.clip_norm) == (0.02, 3.0, 5.0)
