"""What of a view reaches a network: fewer and smaller frames, differences, and networks on timm's backbones."""

import json
import sys

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from mmkd.data_manifests.errors import InputError
from mmkd.pipeline.recipe import ExpertRecipe
from mmkd.student.evaluation.trained import load_student
from mmkd.student.network_table import DIFFERENCES, Normalisation, check_input, known_network, own_normalisation
from mmkd.student.networks.blocks import blocks
from mmkd.student.networks.networks import build_network
from mmkd.student.networks.seen import Downscale, differences
from mmkd.student.recipes.seen import InputRecipe
from mmkd.student.recipes.train import TrainRecipe
from tests.helpers.in_process import call_ok, refused

timm = pytest.importorskip("timm")
HEADS = {"action": 4}


def pixels(frames=8, size=32, clips=2, seed=0):
    drawn = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (clips, frames, size, size, 3), dtype=torch.uint8, generator=drawn)


def awake(network):
    """Return a network whose residual branches count: timm begins with 0 as the last factor of each."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return network


def student(**fields):
    return build_network(TrainRecipe(**fields), heads=HEADS, modality="rgb", frames=8, size_px=32).eval()


@pytest.mark.parametrize(("size", "to"), [(32, 16), (48, 31), (224, 160)])
def test_downscaled_pictures_are_torch_s_antialiased_ones(size, to):
    clips = torch.rand(2, 3, 2, size, size)
    wanted = nn.functional.interpolate(clips.flatten(0, 2)[None], size=(to, to), mode="bilinear", antialias=True)
    found = Downscale(size, to)(clips)
    torch.testing.assert_close(found, wanted.view(2, 3, 2, to, to), atol=1e-6, rtol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(Downscale(size, to)(clips), found)


def test_a_cheaper_look_is_the_plain_network_on_fewer_and_smaller_frames():
    cheaper = student(network="small3d", input={"every": 2, "size_px": 24})
    plain = build_network(TrainRecipe(network="small3d"), heads=HEADS, modality="rgb", frames=4, size_px=24).eval()
    plain.load_state_dict(cheaper.state_dict())
    views = pixels()
    small = nn.functional.interpolate(
        views[:, ::2].permute(0, 1, 4, 2, 3).flatten(0, 1).float(), size=24, mode="bilinear", antialias=True
    )
    small = small.unflatten(0, (2, 4)).permute(0, 1, 3, 4, 2)
    with torch.inference_mode():
        torch.testing.assert_close(cheaper({"rgb": views}), plain({"rgb": small}), atol=1e-5, rtol=1e-4)
        last = views.clone()
        last[:, 1::2] = 0  # frames that it does not see
        assert torch.equal(cheaper({"rgb": last})["action"], cheaper({"rgb": views})["action"])


@pytest.mark.parametrize(("frames", "every", "seen"), [(8, 2, 4), (8, 3, 3), (9, 2, 5)])
def test_a_network_is_held_to_the_frames_that_it_sees(frames, every, seen):
    assert InputRecipe(every=every).shape(frames, 32) == (seen, 32)
    recipe = TrainRecipe(network="mvit_v2_s", input=InputRecipe(every=2))
    recipe.check_views(frames=32, size_px=224)
    with pytest.raises(InputError, match="exactly 16 frames, the views have 8"):
        recipe.check_views(frames=16, size_px=224)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"every": 8}, r"input.every=8 leaves one frame of a view: choose a smaller one"),
        ({"size_px": 32}, r"input.size_px=32 is not below the views' 32 px"),
    ],
)
def test_a_look_that_leaves_nothing_or_all_is_refused(fields, said):
    with pytest.raises(InputError, match=said):
        TrainRecipe(network="small3d", input=fields).check_views(frames=8, size_px=32)


def test_looks_without_effect_or_of_an_expert_are_refused():
    with pytest.raises(ValidationError, match=r"set every \(2, say\), size_px, or both"):
        TrainRecipe(input={})
    with pytest.raises(ValidationError, match=r"train.input is for students; say look.frames"):
        ExpertRecipe(modality="rgb", train={"input": {"every": 2}})
    with pytest.raises(ValidationError, match=r"train.stem is for rgb experts; this one sees flow"):
        ExpertRecipe(modality="flow", train={"stem": "differences"})


def test_differences_are_numpy_s_and_the_last_one_stands_twice():
    clips = torch.rand(2, 3, 5, 4, 4)
    steps = np.diff(clips.numpy(), axis=2)
    assert np.array_equal(differences(clips).numpy(), np.concatenate([steps, steps[:, :, -1:]], 2))
    assert differences(clips[:, :, :1]).abs().max() == 0


def test_a_stem_of_differences_sees_motion_alone_five_times_as_large():
    network = student(network="small3d", stem="differences")
    assert network.normalisation == DIFFERENCES
    views = pixels()
    seen = network.prepare_rgb(views)
    frames = views.permute(0, 4, 1, 2, 3).double() / 255
    torch.testing.assert_close(seen[:, :, :-1].double(), 5 * frames.diff(dim=2), atol=1e-6, rtol=1e-5)
    still = views[:, :1].expand(-1, 8, -1, -1, -1)
    assert network.prepare_rgb(still).abs().max() == 0
    brighter = (views // 2 + 60).to(torch.uint8)
    torch.testing.assert_close(network.prepare_rgb(brighter), network.prepare_rgb((views // 2).to(torch.uint8)))


def test_a_run_trains_evaluates_and_is_read_with_its_look_and_stem(tiny, tmp_path):
    run = tmp_path / "run"
    look = ("--set", "train.input={every: 2, size_px: 24}", "--set", "train.stem=differences")
    short = ("--set", "train.epochs=1", "--set", "train.warmup_epochs=0")
    call_ok("mmkd-student", "train", *tiny.stage_two, *look, *short, "-o", run)
    trained = load_student(run)
    assert (trained.network.every, trained.network.of_differences) == (2, True)
    recipe = json.loads((run / "run.json").read_bytes())["recipe"]["train"]
    assert recipe["input"] == {"every": 2, "size_px": 24}
    plain = build_network(
        TrainRecipe(network=recipe["network"], stem="differences"),
        heads=HEADS,
        modality="rgb",
        frames=4,
        size_px=24,
    )
    assert {name: value.shape for name, value in plain.state_dict().items() if "heads" not in name} == {
        name: value.shape for name, value in trained.network.state_dict().items() if "heads" not in name
    }
    said = refused("mmkd-student", "train", *tiny.stage_two, "--set", "train.input.every=64", "-o", tmp_path / "no")
    assert "leaves one frame" in said
    evaluate, before = ("evaluate", run, "--cache", tiny.root / "cache"), (run / "evaluation.json").read_bytes()
    call_ok("mmkd-student", *evaluate)
    assert "train.input is not what the student" in refused("mmkd-student", *evaluate, "--set", "train.input=null")
    assert "train.stem is not what" in refused("mmkd-student", *evaluate, "--set", "train.stem=frames")
    assert (run / "evaluation.json").read_bytes() == before


def test_a_network_s_own_numbers_are_read_from_its_factory(tmp_path, monkeypatch):
    (tmp_path / "own_numbers.py").write_text(
        "from torch import nn\n"
        "def network(*, channels, frames, size_px, heads):\n"
        "    return nn.Identity()\n"
        "def half(**kwargs): pass\n"
        "def wrong(**kwargs): pass\n"
        "network.mean, network.std = (0.5, 0.4, 0.3), [0.25]\n"
        "half.mean = (0.5,)\n"
        "wrong.mean, wrong.std = (0.5,), (0.0,)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    wanted = Normalisation((0.5, 0.4, 0.3), (0.25,))
    assert own_normalisation("own_numbers:network", "rgb") == wanted
    assert TrainRecipe(network="own_numbers:network").normalised("rgb") == wanted
    assert own_normalisation("own_numbers:network", "flow") == Normalisation((0.0,), (1.0,))
    for name in ("half", "wrong"):
        with pytest.raises(InputError, match=rf"network own_numbers:{name}: its factory's mean and std must be"):
            own_normalisation(f"own_numbers:{name}", "rgb")
    sys.modules.pop("own_numbers")


def test_shifts_on_timm_s_resnet_50_are_our_tsm_s(tmp_path):
    torch.manual_seed(0)
    theirs = awake(timm.create_model("resnet50", pretrained=False))
    torch.save(theirs.state_dict(), tmp_path / "resnet50.pth")
    weights = tmp_path / "resnet50.pth"
    ours, other = (student(network=name, weights=weights) for name in ("tsm/resnet50", "tsm_resnet50"))
    clips = torch.randn(2, 3, 8, 32, 32)
    with torch.inference_mode():
        found = ours.network.backbone(clips)
        torch.testing.assert_close(found, other.network.backbone(clips), atol=1e-5, rtol=1e-4)
        still = clips[:, :, :1].expand(-1, -1, 8, -1, -1)
        assert not torch.allclose(found, ours.network.backbone(clips.flip(2)), atol=1e-3)  # time counts
    theirs.reset_classifier(0)
    with torch.inference_mode():  # without shifts it is timm's own mean over frames
        for module in ours.network.backbone.modules():
            if isinstance(module, nn.Conv2d):
                module._forward_pre_hooks.clear()
        wanted = theirs.eval()(still[:, :, 0])
        torch.testing.assert_close(ours.network.backbone(still), wanted, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("model", "shifts"),
    [
        ("mobilenetv3_small_100", 6),
        ("efficientnet_b0", 9),
        ("convnext_atto", 12),
        ("regnety_002", 13),
        ("mobilenetv4_conv_small", 10),
    ],
)
def test_edge_networks_take_timm_s_weights_and_see_time(model, shifts, tmp_path):
    theirs = awake(timm.create_model(model, pretrained=False))
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    network = student(network=f"tsm/{model}", weights=tmp_path / "weights.pth")
    backbone = network.network.backbone
    state = theirs.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in backbone.state_dict().items())
    hooked = [m for m in backbone.modules() if isinstance(m, nn.Conv2d) and m._forward_pre_hooks]
    assert len(hooked) == shifts
    with torch.inference_mode():
        assert network({"rgb": pixels()})["action"].shape == (2, 4)
        clips = torch.randn(1, 3, 8, 32, 32, dtype=torch.float64)
        forwards, backwards = (backbone.double()(part) for part in (clips, clips.flip(2)))
    assert (forwards - backwards).abs().max() > 1e-10  # rounding is 1e-16
    assert network.normalisation == Normalisation(
        tuple(theirs.pretrained_cfg["mean"]), tuple(theirs.pretrained_cfg["std"])
    )
    if "regnet" not in model:  # whose stages are no lists
        assert len(blocks(network)) > 2


def test_flow_and_gradients_pass_through_shifted_networks():
    network = build_network(
        TrainRecipe(network="tsm/mobilenetv3_small_100"), heads=HEADS, modality="flow", frames=4, flow_stack=2
    )
    network({"flow": torch.randn(2, 4, 4, 32, 32)})["action"].sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_models_that_cannot_be_shifted_or_do_not_exist_are_refused():
    with pytest.raises(InputError, match=r"timm has no model 'resnet19'; it has .*resnet"):
        student(network="tsm/resnet19")
    with pytest.raises(InputError, match=r"timm's vit_tiny_patch16_224 has no residual block that can be shifted"):
        student(network="tsm/vit_tiny_patch16_224")
    with pytest.raises(InputError, match=r"there is no network 'tsm/\.\./x'"):
        known_network("tsm/../x")
    check_input("tsm/resnet18", frames=3, size_px=40)


def test_without_timm_one_line_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match=r"network tsm/resnet18 needs timm.*pip install 'mmkd\[timm\]'"):
        own_normalisation("tsm/resnet18", "rgb")
