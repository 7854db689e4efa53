"""The table of networks: held against torchvision's own models and what its published weights ask for."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torchvision.models import video

from mmkd.data_manifests.errors import InputError
from mmkd.pipeline.experts.expert import load_expert, numbers_of, read_card
from mmkd.pipeline.experts.teach import run_identity
from mmkd.pipeline.recipe import ExpertRecipe
from mmkd.student.network_table import AS_IT_IS, IMAGENET, NETWORKS, check_input, own_normalisation
from mmkd.student.networks.networks import build_network
from mmkd.student.networks.own_networks import find_factory
from mmkd.student.recipes.train import TrainRecipe
from tests.helpers.in_process import call, call_ok, refused
from tests.helpers.places import ROOT, unpack_before

HEADS = {"action": 4}
ENUMS = {
    "swin3d_t": "Swin3D_T", "swin3d_s": "Swin3D_S", "swin3d_b": "Swin3D_B", "mvit_v1_b": "MViT_V1_B",
    "mvit_v2_s": "MViT_V2_S", "s3d": "S3D", "r3d_18": "R3D_18", "mc3_18": "MC3_18", "r2plus1d_18": "R2Plus1D_18",
}  # fmt: skip
SMALLEST = {
    "swin3d_t": (4, 32), "r3d_18": (4, 32), "mc3_18": (4, 32), "r2plus1d_18": (4, 32), "s3d": (14, 224),
    "mvit_v2_s": (16, 224),
}  # fmt: skip
"""Frames and size at which a forward pass takes little."""


@pytest.mark.parametrize(("name", "weights"), ENUMS.items())
def test_numbers_are_those_that_torchvision_s_published_weights_ask_for(name, weights):
    published = getattr(video, f"{weights}_Weights").DEFAULT
    asks, network = published.transforms(), NETWORKS[name]
    assert network.normalisation.mean == tuple(asks.mean)
    assert network.normalisation.std == tuple(asks.std)
    assert [network.size_px] * 2 == list(asks.crop_size)
    assert network.million_parameters == pytest.approx(published.meta["num_params"] / 1e6, abs=0.06)
    if "min_temporal_size" in published.meta:
        least = published.meta["min_temporal_size"]
        assert (network.frames if network.exact_frames else network.least_frames) in (least, 1) or least == 16
    assert network.kinetics_top1 is not None


@pytest.mark.parametrize("name", SMALLEST)
def test_logits_are_torchvision_s_own_on_the_same_frames(name, tmp_path):
    frames, size_px = SMALLEST[name]
    torch.manual_seed(0)
    theirs = getattr(video, name)(weights=None, num_classes=4).eval()
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    recipe = TrainRecipe(network=name, weights=tmp_path / "weights.pth")
    ours = build_network(recipe, heads=HEADS, modality="rgb", frames=frames, size_px=size_px).eval()
    head = [module for module in theirs.modules() if isinstance(module, nn.Linear | nn.Conv3d)][-1]
    ours.network.heads["action"].weight.data = head.weight.data.reshape(4, -1)
    ours.network.heads["action"].bias.data = head.bias.data
    pixels = torch.randint(0, 256, (1, frames, size_px, size_px, 3), dtype=torch.uint8)
    asks = getattr(video, f"{ENUMS[name]}_Weights").DEFAULT.transforms()
    mean, std = (torch.tensor(part).view(1, 3, 1, 1, 1) for part in (asks.mean, asks.std))
    with torch.inference_mode():
        expected = theirs((pixels.permute(0, 4, 1, 2, 3) / 255 - mean) / std)
        torch.testing.assert_close(ours({"rgb": pixels})["action"], expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_takes_flow_and_stacks_of_it(name):
    with torch.device("meta"):
        for stack in (1, 5):
            recipe = TrainRecipe(network=name)
            network = build_network(recipe, heads=HEADS, modality="flow", flow_stack=stack)
            weight = dict(network.network.backbone.named_parameters())[NETWORKS[name].first_conv]
            assert weight.shape[1] == 2 * stack


@pytest.mark.parametrize(
    ("name", "frames", "size_px", "message"),
    [
        ("mvit_v2_s", 8, 224, "mvit_v2_s takes exactly 16 frames, the views have 8; set views.frames=16"),
        ("mvit_v1_b", 16, 200, "mvit_v1_b takes views of 224 px, they have 200; set views.size_px=224"),
        ("s3d", 8, 224, "s3d takes at least 14 frames, the views have 8"),
        ("s3d", 16, 112, "at least 224 px, they have 112"),
        ("no_such", 16, 224, "there is no network 'no_such'; choose among small3d"),
    ],
)
def test_views_that_a_network_cannot_see_are_refused(name, frames, size_px, message):
    with pytest.raises(InputError, match=message):
        check_input(name, frames=frames, size_px=size_px)


def test_teach_and_train_refuse_before_they_probe_a_video(tiny, tmp_path):
    options = ("--set", "experts.rgb.train.network=mvit_v2_s", "-o", tmp_path / "rgb")
    said = refused("mmkd-cache", "teach", "rgb", *tiny.stage_one, *options)
    assert "mvit_v2_s takes exactly 16 frames, the views have 8" in said
    assert "probing" not in said
    run = ("--set", "train.network=mvit_v2_s", "-o", tmp_path / "run")
    assert "takes exactly 16 frames" in refused("mmkd-student", "train", *tiny.stage_two, *run)
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_recipe_s_numbers_replace_the_network_s():
    own = {"mean": [0.5], "std": [0.25]}
    network = build_network(TrainRecipe(network="small3d", normalisation=own), heads=HEADS, modality="rgb").eval()
    grey = torch.full((1, 2, 8, 8, 3), 255, dtype=torch.uint8)
    assert network.prepare_rgb(grey).unique().tolist() == [2.0]
    wrong = TrainRecipe(network="small3d", normalisation={"mean": [0.5, 0.5], "std": [0.25]})
    with pytest.raises(InputError, match=r"normalisation.mean has 2 numbers; rgb has 3 channels"):
        build_network(wrong, heads=HEADS, modality="rgb")
    with pytest.raises(ValidationError):
        TrainRecipe(normalisation={"mean": [0.5], "std": [0]})


def test_tsm_is_normalised_as_epic_s_models_were():
    assert own_normalisation("tsm_resnet50", "rgb").std == IMAGENET.mean
    flow = build_network(TrainRecipe(network="tsm_resnet50", flow_scale_px=8), heads=HEADS, modality="flow")
    codes = torch.tensor([0.0, 128.0, 255.0])  # theirs: (code / 255 - .5) / .226, of codes 255 (v + b) / 2b
    pixels = (codes / 255 * 16 - 8).view(1, 1, 1, 1, 3).expand(1, 1, 2, 1, 3)
    expected = (codes / 255 - 0.5) / 0.226
    torch.testing.assert_close(flow.prepare_flow(pixels)[0, 0, 0, 0], expected, atol=1e-6, rtol=1e-6)
    assert own_normalisation("swin3d_t", "flow") == AS_IT_IS


def test_an_expert_of_before_keeps_the_numbers_that_it_was_trained_with(tmp_path):
    root = unpack_before(tmp_path)
    folder = next(path.parent for path in root.rglob("expert.json") if path.parent.name == "rgb")
    card = read_card(folder)
    assert card.normalisation == {"mean": list(IMAGENET.mean), "std": list(IMAGENET.std)}
    assert "normalisation" not in card.fingerprint_fields(None)
    value = json.loads((folder / "expert.json").read_text())
    value["recipe"]["train"]["network"] = "r3d_18"  # as if it had been one: only the card is read here
    value["schema"] = "mmkd-expert-1"
    value.pop("seal", None)
    (folder / "expert.json").write_text(json.dumps(value))
    old = read_card(folder)
    assert old.normalisation["mean"] == list(IMAGENET.mean)
    assert "normalisation" not in old.fingerprint_fields(None)


OWN = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, channels, heads, width=4):
        super().__init__()
        self.conv = nn.Conv3d(channels, width, 1)
        self.outs = nn.ModuleDict({name: nn.Linear(width, count) for name, count in heads.items()})

    def forward(self, clips):
        features = self.conv(clips).mean((2, 3, 4))
        return {name: out(features) for name, out in self.outs.items()}

class Features(nn.Module):
    feature_count = 3
    def forward(self, clips):
        return clips.mean((2, 3, 4))

def net(*, channels, frames, size_px, heads, width=4):
    return Net(channels, heads, width)

def features(*, channels, frames, size_px, heads):
    return Features()

def wrong(*, channels, frames, size_px, heads):
    return Net(channels, {"other": 3})

def fails(*, channels, frames, size_px, heads):
    raise RuntimeError("no such\\nlayer")

def text(*, channels, frames, size_px, heads):
    return "a network"
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of one's own, importable in this process."""
    (tmp_path / "kitchen_nets.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    return "kitchen_nets"


@pytest.mark.parametrize(("function", "options"), [("net", {"width": 6}), ("features", {})])
def test_any_module_and_factory_is_a_network(own, function, options):
    recipe = TrainRecipe(network=f"{own}:{function}", network_options=options)
    network = build_network(recipe, heads=HEADS, modality="rgb", frames=4, size_px=8)
    logits = network({"rgb": torch.zeros(2, 4, 8, 8, 3, dtype=torch.uint8)})
    assert logits["action"].shape == (2, 4)
    assert logits["action"].dtype == torch.float32


def test_its_weights_come_from_a_file(own, tmp_path):
    network = find_factory(f"{own}:net")(channels=3, frames=4, size_px=8, heads=HEADS)
    torch.save(network.state_dict(), tmp_path / "w.pth")
    recipe = TrainRecipe(network=f"{own}:net", weights=tmp_path / "w.pth")
    built = build_network(recipe, heads=HEADS, modality="rgb", frames=4, size_px=8)
    torch.testing.assert_close(built.network.network.conv.weight, network.conv.weight)
    wider = recipe.model_copy(update={"network_options": {"width": 9}})
    with pytest.raises(InputError, match=r"are not those of kitchen_nets:net: .* of another shape"):
        build_network(wider, heads=HEADS, modality="rgb", frames=4, size_px=8)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:net", "module 'no_such_module' cannot be imported"),
        ("kitchen_nets:absent", "has no function 'absent'"),
        ("kitchen_nets:wrong", "gives logits of shapes {'other': (1, 3)}; the heads need {'action': (1, 4)}"),
        ("kitchen_nets:fails", "cannot be built: RuntimeError: no such layer"),
        ("kitchen_nets:text", "gave str where a torch.nn.Module is expected"),
    ],
)
def test_a_factory_that_is_none_is_one_line(own, name, message):
    with pytest.raises(InputError) as caught:
        build_network(TrainRecipe(network=name), heads=HEADS, modality="rgb", frames=4, size_px=8)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_options_are_for_networks_of_ones_own():
    with pytest.raises(ValidationError, match="network_options: swin3d_t takes none"):
        TrainRecipe(network="swin3d_t", network_options={"width": 1})
    with pytest.raises(ValidationError, match="or your own as module:factory"):
        TrainRecipe(network="swin3d_x")
    assert "network_options" not in TrainRecipe().model_dump()
    assert "normalisation" not in ExpertRecipe(modality="rgb").model_dump()["train"]


def test_a_file_that_names_code_runs_it_only_when_it_is_trusted(own, tiny, tmp_path):
    name = f"{own}:net"
    short = ("--set", "experts.rgb.train.epochs=1", "--set", "experts.rgb.train.warmup_epochs=0")
    taught = ("mmkd-cache", "teach", "rgb", *tiny.stage_one, *short, "--set", f"experts.rgb.train.network={name}")
    call_ok(*taught, "-o", tmp_path / "rgb")
    with pytest.raises(
        InputError, match=rf"is a network whose code is not mmkd's, {name}: allow it with --trust-network"
    ):
        load_expert(tmp_path / "rgb", torch.device("cpu"))
    build = ("mmkd-cache", "build", *tiny.stage_one, "--expert", tmp_path / "rgb", "-o", tmp_path / "cache")
    assert f"--trust-network {name}" in refused(*build)
    call_ok(*build, "--trust-network", name)
    run = ("--cache", tmp_path / "cache", "--set", f"train.network={name}", "--weights", "uniform")
    train = ("mmkd-student", "train", "-c", tiny.root / "student.yaml", *tiny.data, *run)
    call_ok(*train, "--set", "train.epochs=1", "--set", "train.warmup_epochs=0", "-o", tmp_path / "run")
    evaluate = ("mmkd-student", "evaluate", tmp_path / "run", "--cache", tmp_path / "cache")
    assert f"--trust-network {name}" in refused(*evaluate)
    call_ok(*evaluate, "--trust-network", name)
    copied = Path(shutil.copytree(tmp_path / "rgb", tmp_path / "copied"))
    assert call("mmkd-cache", "build", *tiny.stage_one, "--expert", copied, "-o", tmp_path / "other").code == 2


def test_a_checkpoint_of_before_is_that_of_the_same_recipe_now(tmp_path):
    """What an unfinished `teach` is checked against has no key that an earlier version could not write."""
    root = unpack_before(tmp_path)
    for path in root.rglob("expert.json"):
        raw = json.loads(path.read_text())
        recipe = ExpertRecipe.model_validate(raw["recipe"])
        numbers = None if recipe.modality == "boxes" else numbers_of(recipe.train.normalised(recipe.modality))
        now = run_identity({"recipe": recipe.model_dump(mode="json"), "normalisation": numbers})
        assert now == {"recipe": raw["recipe"]}


def test_the_readme_s_network_of_one_s_own_is_transformers_own(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    text = (ROOT / "student" / "README.md").read_text()
    (example,) = re.findall(r"```python\n# kitchen_networks\.py\n(.*?)```", text, re.DOTALL)
    (tmp_path / "kitchen_networks.py").write_text(example)
    monkeypatch.syspath_prepend(tmp_path)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.VideoMAEConfig(num_frames=4, image_size=32, num_labels=4, **sizes)
    torch.manual_seed(3)
    theirs = transformers.VideoMAEForVideoClassification(config).eval()
    theirs.save_pretrained(tmp_path / "published")
    again = transformers.VideoMAEForVideoClassification.from_pretrained(tmp_path / "published")
    torch.save(again.state_dict(), tmp_path / "videomae.pth")
    recipe = TrainRecipe(
        network="kitchen_networks:videomae",
        network_options=sizes,
        weights=tmp_path / "videomae.pth",
    )
    ours = build_network(recipe, heads=HEADS, modality="rgb", frames=4, size_px=32).eval()
    pixels = torch.randint(0, 256, (2, 4, 32, 32, 3), dtype=torch.uint8)
    mean, std = (torch.tensor(part).view(3, 1, 1) for part in (IMAGENET.mean, IMAGENET.std))
    with torch.inference_mode():
        expected = theirs((pixels.permute(0, 1, 4, 2, 3) / 255 - mean) / std).logits
        torch.testing.assert_close(ours({"rgb": pixels})["action"], expected, atol=1e-5, rtol=1e-4)


def test_the_readme_names_every_network():
    text = (ROOT / "student" / "README.md").read_text()
    for name, network in NETWORKS.items():
        (row,) = [line for line in text.splitlines() if line.startswith(f"| `{name}` |")]
        cells = [cell.strip() for cell in row.split("|")[1:-1]]
        frames = f"{network.frames} exactly" if network.exact_frames else f"{network.frames}"
        assert cells[1].startswith(frames)
        assert cells[2].startswith(f"{network.size_px}")
        assert cells[3] == f"{network.million_parameters:g}"
