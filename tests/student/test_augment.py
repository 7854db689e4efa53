"""The batched jitter against torchvision, clip by clip."""

import itertools

import pytest
import torch
from torchvision.transforms.v2 import functional as tv

from mmkd.student.augment.augment import Augment
from mmkd.student.augment.colours import permute_channels
from mmkd.student.augment.jitter import NO_JITTER, OPERATIONS, Jitter, jitter_clips
from mmkd.student.networks.networks import VideoClassifier, build_network, headed_network
from mmkd.student.recipes.train import TrainRecipe


def clips(seed=0, count=3):
    draw = torch.Generator().manual_seed(seed)
    video = torch.rand((count, 3, 4, 10, 12), generator=draw)
    video[0, :, 0] = 0.5  # grey has no hue
    video[1, :, 1] = 0.0
    return video


@pytest.mark.parametrize("name", list(OPERATIONS))
@pytest.mark.parametrize("seed", [0, 1])
def test_each_operation_equals_torchvision(name, seed):
    video = clips(seed)
    factors = torch.tensor([-0.3, 0.1, 0.5] if name == "hue" else [0.6, 1.0, 1.4])
    ours = OPERATIONS[name](video, factors)
    for clip, factor, result in zip(video, factors.tolist(), ours, strict=True):
        frames = clip.transpose(0, 1)  # torchvision's videos are (T, 3, H, W)
        expected = getattr(tv, f"adjust_{name}_video")(frames, factor).transpose(0, 1)
        torch.testing.assert_close(result, expected, rtol=0, atol=2e-5)


def test_all_frames_of_a_clip_share_one_draw_and_clips_differ():
    frame = torch.rand((1, 3, 1, 8, 8), generator=torch.Generator().manual_seed(3))
    video = frame.expand(2, 3, 5, 8, 8)
    torch.manual_seed(0)
    result = jitter_clips(video, Jitter())
    torch.testing.assert_close(result, result[:, :, :1].expand_as(result))
    assert (result[0] - result[1]).abs().max() > 0.01


def test_no_jitter_is_exactly_nothing_and_the_same_seed_the_same_jitter():
    video = clips()
    assert torch.equal(jitter_clips(video, NO_JITTER), video)
    torch.manual_seed(5)
    first = jitter_clips(video, Jitter())
    torch.manual_seed(5)
    assert torch.equal(jitter_clips(video, Jitter()), first)
    assert 0 <= first.min() <= first.max() <= 1


def test_factors_stay_within_their_range():
    video = torch.full((64, 3, 1, 2, 2), 0.5)
    torch.manual_seed(0)
    values = jitter_clips(video, Jitter(brightness=0.25, contrast=0, saturation=0, hue=0))[:, 0, 0, 0, 0]
    assert 0.5 * 0.75 <= values.min() < 0.5 * 0.8
    assert 0.5 * 1.2 < values.max() <= 0.5 * 1.25


def test_the_classifier_jitters_in_training_only():
    classifier = VideoClassifier(
        headed_network("small3d", heads={"action": 3}, channels=3), "rgb", augment=Augment(jitter=Jitter())
    )
    frames = torch.randint(0, 256, (2, 4, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    still = classifier.eval().prepare_rgb(frames)
    assert torch.equal(still, classifier.prepare_rgb(frames))
    assert not torch.equal(still, classifier.train().prepare_rgb(frames))
    mean = torch.tensor([0.485, 0.456, 0.406])
    std = torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(still, ((frames / 255 - mean) / std).permute(0, 4, 1, 2, 3))


@pytest.mark.parametrize("bad", [{"hue": 0.6}, {"brightness": -0.1}])
def test_impossible_strengths_are_refused(bad):
    with pytest.raises(ValueError, match="jitter strengths"):
        Jitter(**bad)


def test_channels_change_places_in_that_share_of_the_clips_and_evenly():
    torch.manual_seed(0)
    clips = torch.arange(3.0).view(1, 3, 1, 1, 1).expand(6000, 3, 2, 2, 2).clone()
    orders = permute_channels(clips, 0.5)
    assert (orders == orders[:, :, :1, :1, :1]).all()  # one order for all frames and pixels of a clip
    found, counts = orders[:, :, 0, 0, 0].unique(dim=0, return_counts=True)
    assert found.tolist() == [list(map(float, order)) for order in itertools.permutations(range(3))]
    assert counts[0].item() == pytest.approx(3000, abs=200)
    assert all(count.item() == pytest.approx(600, abs=110) for count in counts[1:])


def test_no_channel_moves_without_a_share_or_in_evaluation():
    torch.manual_seed(4)
    wanted = torch.rand(2)
    torch.manual_seed(4)
    clips = torch.rand(2, 3, 1, 1, 1)
    torch.manual_seed(4)
    assert permute_channels(clips, 0.0) is clips
    assert torch.equal(torch.rand(2), wanted)  # nothing was drawn: runs without it keep their bits
    recipe = TrainRecipe(network="small3d", permute_channels=1.0)
    network = build_network(recipe, heads={"a": 2}, modality="rgb").eval()
    frames = torch.randint(0, 256, (4, 2, 4, 4, 3), dtype=torch.uint8)
    plain = build_network(TrainRecipe(network="small3d"), heads={"a": 2}, modality="rgb").eval()
    assert torch.equal(network.prepare_rgb(frames), plain.prepare_rgb(frames))
    assert not torch.equal(network.train().prepare_rgb(frames), plain.prepare_rgb(frames))
