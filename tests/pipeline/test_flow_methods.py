"""DIS and RAFT behind TV-L1's call: shapes, known motion, independence of pairs, weights files."""

import pickle

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torchvision.models.optical_flow import raft_large, raft_small
from torchvision.transforms._presets import OpticalFlow

from mmkd.data_manifests.errors import InputError
from mmkd.pipeline.flow.flow_method import PRESETS, FlowMethod
from mmkd.pipeline.flow.methods import DIS_PRESETS, dis_flow, pair_flow, sequence_flow
from mmkd.pipeline.flow.raft import pad_images, padding, raft_flow
from mmkd.pipeline.tvl1 import TVL1Params, tvl1_flow
from tests.helpers.flow_videos import texture
from tests.helpers.places import DATA, needs_data

FAST = FlowMethod(preset="fast")
MIDDLEBURY = DATA / "middlebury"


def grey(frames, **more):
    return torch.from_numpy(texture(frames, **more).mean(-1).astype(np.uint8))


# ---- DIS


@pytest.mark.parametrize("preset", DIS_PRESETS)
def test_dis_finds_a_known_shift_and_no_motion_at_all(preset):
    frames = grey(2, size=(160, 120), shift=(2, 1))
    flow = dis_flow(frames[:1], frames[1:], preset=preset)
    assert flow.shape == (1, 2, 120, 160)
    assert flow.dtype == torch.float32
    error = (flow[0, :, 16:-16, 16:-16] - torch.tensor([2.0, 1.0])[:, None, None]).norm(dim=0)
    assert error.mean() < 0.15
    assert dis_flow(frames[:1], frames[:1], preset=preset).abs().max() == 0


def test_a_pair_s_dis_flow_does_not_depend_on_the_pairs_around_it():
    frames = grey(5, size=(96, 64), shift=(3, -1))
    together = dis_flow(frames[:-1], frames[1:])
    alone = torch.cat([dis_flow(frames[i : i + 1], frames[i + 1 : i + 2]) for i in range(4)])
    assert torch.equal(together, alone)
    assert torch.equal(dis_flow(frames[:-1].float(), frames[1:].float()), together)


@pytest.mark.parametrize("size", [(16, 16), (17, 33), (16, 200), (341, 19)])
def test_dis_takes_small_and_odd_images(size):
    frames = grey(2, size=size, shift=(0, 0))
    assert dis_flow(frames[:1], frames[1:]).shape == (1, 2, size[1], size[0])


def test_dis_refuses_what_it_cannot_take():
    frames = grey(2, size=(15, 40))
    with pytest.raises(ValueError, match="at least 16"):
        dis_flow(frames[:1], frames[1:])
    with pytest.raises(ValueError, match="one shape"):
        dis_flow(grey(1, size=(32, 32)), grey(1, size=(33, 32)))


@needs_data
def test_dis_errors_are_those_that_are_documented():
    """Mean endpoint error over four pairs: .66, .53 and .34 px, as `DIS_PRESETS` and the README say."""
    errors = {preset: [] for preset in DIS_PRESETS}
    for folder in sorted(MIDDLEBURY.iterdir()):
        raw = (folder / "flow10.flo").read_bytes()
        width, height = np.frombuffer(raw, "<i4", 2, 4)
        truth = np.frombuffer(raw, "<f4", -1, 12).reshape(height, width, 2).transpose(2, 0, 1)
        known = (np.abs(truth) < 1e9).all(0)
        first, second = (
            torch.from_numpy(cv2.imread(str(folder / f"frame{number}.png"), cv2.IMREAD_GRAYSCALE))[None]
            for number in (10, 11)
        )
        for preset, found in errors.items():
            found.append(np.hypot(*(dis_flow(first, second, preset=preset)[0].numpy() - truth))[known].mean())
    means = {preset: float(np.mean(found)) for preset, found in errors.items()}
    assert means == pytest.approx({"ultrafast": 0.656, "fast": 0.534, "medium": 0.338}, abs=0.02)


# ---- RAFT


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return raft_small(weights=None, progress=False).eval()


@pytest.fixture(scope="module")
def weights(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("raft") / "small.safetensors"
    save_file(network.state_dict(), path)
    return path


def colour(frames, **more):
    return torch.from_numpy(texture(frames, **more)).permute(0, 3, 1, 2)


def test_raft_is_torchvision_s_with_its_own_transform(network, weights):
    frames = colour(3, size=(136, 128))
    with torch.no_grad():
        pairs = [network(*OpticalFlow()(frames[i : i + 1], frames[i + 1 : i + 2]))[-1] for i in (0, 1)]
    torch.testing.assert_close(
        raft_flow(frames[:2], frames[1:], weights=weights), torch.cat(pairs), atol=1e-4, rtol=0
    )


def test_other_sizes_are_padded_with_their_border_and_cut_again(network, weights):
    frames = colour(2, size=(131, 90))
    left, right, top, bottom = padding(131, 90)
    assert (left, right, top, bottom) == (2, 3, 19, 19)
    padded = pad_images(frames.float())
    assert padded.shape[-2:] == (128, 136)
    assert torch.equal(padded[0, :, 0, 0], frames[0, :, 0, 0].float())
    with torch.no_grad():
        whole = network(*(pad_images(image) for image in OpticalFlow()(frames[:1], frames[1:])))[-1]
    expected = whole[..., 19:-19, 2:-3]
    torch.testing.assert_close(raft_flow(frames[:1], frames[1:], weights=weights), expected, atol=1e-4, rtol=0)


def test_grey_images_stand_in_all_three_channels(weights):
    frames = grey(2, size=(128, 128))
    rgb = frames[:, None].repeat(1, 3, 1, 1)
    found = raft_flow(frames[:1], frames[1:], weights=weights, updates=2)
    assert torch.equal(found, raft_flow(rgb[:1], rgb[1:], weights=weights, updates=2))
    assert not torch.equal(found, raft_flow(rgb[:1], rgb[1:], weights=weights, updates=3))


def test_large_weights_are_known_by_their_names_and_a_state_dict_file_will_do(tmp_path):
    torch.manual_seed(0)
    large = raft_large(weights=None, progress=False).eval()
    path = tmp_path / "large.pth"
    torch.save({"state_dict": {f"module.{name}": value for name, value in large.state_dict().items()}}, path)
    frames = colour(2, size=(128, 128))
    with torch.no_grad():
        expected = large(*OpticalFlow()(frames[:1], frames[1:]), num_flow_updates=2)[-1]
    torch.testing.assert_close(
        raft_flow(frames[:1], frames[1:], weights=path, updates=2), expected, atol=1e-4, rtol=0
    )


class Hostile:
    def __reduce__(self):
        return (exec, ("raise SystemExit('a weights file ran code')",))


def test_weights_of_anything_else_are_refused_by_name(network, tmp_path):
    frames = grey(2, size=(128, 128))
    state = dict(network.state_dict())
    first = sorted(state)[0]
    cases = {
        "missing.safetensors": ({k: v for k, v in state.items() if k != first}, f"1 missing ({first})"),
        "unknown.safetensors": (state | {"extra.weight": torch.zeros(1)}, "1 unexpected (extra.weight)"),
        "shape.safetensors": (state | {first: torch.zeros(3)}, f"1 of another shape ({first})"),
    }
    for name, (tensors, text) in cases.items():
        save_file(tensors, tmp_path / name)
        with pytest.raises(InputError) as caught:
            raft_flow(frames[:1], frames[1:], weights=tmp_path / name)
        assert name in str(caught.value)
        assert "raft_small" in str(caught.value)
        assert text in str(caught.value)
    (tmp_path / "hostile.pth").write_bytes(pickle.dumps(Hostile(), protocol=2))
    (tmp_path / "text.safetensors").write_text("no weights")
    for name in ("hostile.pth", "text.safetensors"):
        with pytest.raises(InputError, match=f"cannot read the weights .*{name}"):
            raft_flow(frames[:1], frames[1:], weights=tmp_path / name)
    with pytest.raises(InputError, match="no weights file"):
        raft_flow(frames[:1], frames[1:], weights=tmp_path / "none.pth")


def test_a_weights_file_that_changes_is_read_again(network, tmp_path):
    path, frames = tmp_path / "w.safetensors", grey(2, size=(128, 128), shift=(4, 0))
    save_file(network.state_dict(), path)
    before = raft_flow(frames[:1], frames[1:], weights=path, updates=2)
    save_file({k: v * 0.9 if v.is_floating_point() else v for k, v in network.state_dict().items()}, path)
    assert not torch.equal(raft_flow(frames[:1], frames[1:], weights=path, updates=2), before)


# ---- the dispatcher


def test_one_call_serves_every_method(weights):
    frames = grey(3, size=(128, 128))
    first, second = frames[:2], frames[1:]
    assert torch.equal(pair_flow(first, second, method=FAST), tvl1_flow(first, second, params=TVL1Params.fast()))
    quick = FlowMethod("dis", "fast")
    assert torch.equal(pair_flow(first, second, method=quick), dis_flow(first, second, preset="fast"))
    raft = FlowMethod("raft", weights=weights)
    assert torch.equal(pair_flow(first, second, method=raft), raft_flow(first, second, weights=weights))


@pytest.mark.parametrize("method", [FAST, FlowMethod("dis", "fast")])
@pytest.mark.parametrize(("step", "stride"), [(1, 1), (3, 1), (-1, 1), (-2, 1), (1, 2), (3, 2)])
def test_the_pairs_of_a_clip_have_the_bits_of_single_pairs(method, step, stride):
    frames = grey(9, size=(40, 32))
    firsts = np.arange(max(0, -step), 9 - max(0, step), stride)
    flow = sequence_flow(frames, firsts, firsts + step, method=method)
    expected = pair_flow(frames[firsts], frames[firsts + step], method=method)
    assert torch.equal(flow, expected)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("farneback",), "--method 'farneback' is not one of tvl1, dis, raft"),
        (("tvl1", "medium"), "--preset 'medium': the method tvl1 has the presets default"),
        (("dis", "default"), "--preset 'default': the method dis has the presets medium"),
        (("raft", "fast", "w"), "--preset 'fast': the method raft has no presets"),
        (("raft",), "raft needs --weights"),
        (("dis", None, "w"), "dis takes no --weights"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments, text):
    with pytest.raises(InputError, match=text):
        FlowMethod(*arguments)


def test_every_preset_exists():
    assert set(PRESETS["dis"]) == set(DIS_PRESETS)
