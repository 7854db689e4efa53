"""RandAugment, grey and erasing against torchvision, clip by clip, and all of the augmentation together."""

import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from mmkd.student.augment.augment import Augment, augment_of
from mmkd.student.augment.colours import grey_clips
from mmkd.student.augment.erasing import erase_clips
from mmkd.student.augment.jitter import Jitter, jitter_clips
from mmkd.student.augment.rand_augment import BINS, NAMES, apply_drawn, rand_augment
from mmkd.student.networks.networks import VideoClassifier, build_network
from mmkd.student.recipes.augment import ErasingRecipe, RandAugmentRecipe
from mmkd.student.recipes.train import TrainRecipe
from tests.helpers.in_process import refused

TORCHVISION_NAMES = ("Identity", "Brightness", "Color", "Contrast", "Sharpness", "Posterize", "Solarize")
TORCHVISION_NAMES += ("AutoContrast", "Equalize")
ALL = {
    "rand_augment": {"magnitude": 12},
    "grey": 0.3,
    "permute_channels": 0.5,
    "erasing": {"probability": 0.5},
}


def clips(count, seed=0, frames=3):
    draw = torch.Generator().manual_seed(seed)
    video = torch.randint(0, 256, (count, 3, frames, 10, 12), generator=draw) / 255
    video[0, :, 0] = 0.5  # an even frame
    return 0.201 + 0.5 * video  # no value is a threshold


class OneOperation(v2.RandAugment):
    """torchvision's own, made to draw one operation with one sign."""

    def __init__(self, name, magnitude, negative):
        super().__init__(num_ops=1, magnitude=magnitude)
        self.name, self.negative = name, negative

    def _get_random_item(self, space):
        magnitudes, signed = space[self.name]
        own = lambda *sizes: -magnitudes(*sizes) if signed and self.negative else magnitudes(*sizes)  # noqa: E731
        return self.name, (own, False)


@pytest.mark.parametrize("magnitude", [0, 9, 17, 30])
@pytest.mark.parametrize("negative", [False, True])
def test_every_operation_is_torchvision_s_at_every_strength(magnitude, negative):
    video = clips(len(NAMES))
    video = video[torch.randperm(len(NAMES), generator=torch.Generator().manual_seed(1))]
    result = apply_drawn(video, torch.arange(len(NAMES)), torch.full((len(NAMES),), negative), magnitude / BINS)
    for name, clip, found in zip(TORCHVISION_NAMES, video, result, strict=True):
        wanted = OneOperation(name, magnitude, negative)(clip.transpose(0, 1)).transpose(0, 1)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6, msg=name)


def test_clips_with_the_same_operation_keep_their_places_and_signs():
    draws, negative = torch.tensor([3, 8, 3, 0, 3]), torch.tensor([False, False, True, True, False])
    result = apply_drawn(clips(5), draws, negative, 0.5)
    for row in range(5):
        alone = apply_drawn(clips(5)[row : row + 1], draws[row : row + 1], negative[row : row + 1], 0.5)
        torch.testing.assert_close(result[row], alone[0], rtol=0, atol=1e-6)
    assert torch.equal(result[3], clips(5)[3])


def test_operations_are_drawn_evenly_for_that_share_of_the_clips(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "mmkd.student.augment.rand_augment.apply_drawn",
        lambda clips, draws, negative, strength: seen.append((draws, negative, strength)) or clips,
    )
    torch.manual_seed(0)
    rand_augment(torch.zeros(9000, 3, 1, 1, 1), RandAugmentRecipe(probability=0.6, operations=2, magnitude=6))
    assert [strength for *_, strength in seen] == [0.2, 0.2]
    for draws, negative, _ in seen:
        counts = torch.bincount(draws, minlength=9)
        assert counts[1:].tolist() == pytest.approx([600] * 8, abs=90)
        assert counts[0].item() == pytest.approx(3600 + 600, abs=200)
        assert negative.float().mean().item() == pytest.approx(0.5, abs=0.02)
    changed = [draws > 0 for draws, *_ in seen]
    assert (changed[0] & changed[1]).sum().item() == pytest.approx(9000 * 0.6 * (8 / 9) ** 2, abs=200)


def test_autocast_does_not_make_pixels_coarser():
    torch.manual_seed(0)
    exact = rand_augment(clips(24), RandAugmentRecipe())
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rand_augment(clips(24), RandAugmentRecipe()), exact)


def test_grey_clips_are_torchvision_s_grey_and_the_others_untouched():
    torch.manual_seed(1)
    video = clips(400)
    result = grey_clips(video, 0.25)
    wanted = tv.rgb_to_grayscale(video.transpose(1, 2), 3).transpose(1, 2)
    is_grey = (result == result[:, :1]).flatten(1).all(1)
    assert is_grey.sum().item() == pytest.approx(100, abs=30)
    torch.testing.assert_close(result[is_grey], wanted[is_grey])
    assert torch.equal(result[~is_grey], video[~is_grey])


def test_windows_are_those_of_torchvision_in_all_frames_alike():
    recipe = ErasingRecipe(probability=0.5, scale=(0.05, 0.4))
    fill = torch.tensor([0.1, 0.2, 0.3])
    torch.manual_seed(3)
    result = erase_clips(clips(40), recipe, fill.view(1, 3, 1, 1, 1))
    torch.manual_seed(3)
    erased = torch.rand(40) < recipe.probability
    theirs = v2.RandomErasing(p=1, scale=recipe.scale, ratio=recipe.ratio, value=fill.tolist())
    for clip, found, is_erased in zip(clips(40), result, erased, strict=True):
        frames = clip.transpose(0, 1)
        wanted = theirs.transform(frames, theirs.make_params([frames])).transpose(0, 1) if is_erased else clip
        assert torch.equal(found, wanted)
        assert torch.equal(found, clip) != is_erased


def test_a_window_that_never_fits_erases_nothing():
    recipe = ErasingRecipe(probability=1, scale=(1, 1), ratio=(50, 60))
    assert torch.equal(erase_clips(clips(4), recipe, 0.0), clips(4))


def test_what_is_erased_is_zero_after_normalisation():
    network = build_network(
        TrainRecipe(network="small3d", erasing={"probability": 1}), heads={"a": 2}, modality="rgb"
    )
    frames = torch.full((6, 2, 12, 12, 3), 200, dtype=torch.uint8)
    torch.manual_seed(0)
    share = (network.train().prepare_rgb(frames) == 0).float().mean((1, 2, 3, 4))
    assert 0.01 < share.min() < share.max() < 0.45


def test_the_default_recipe_draws_and_gives_what_the_jitter_alone_does():
    torch.manual_seed(0)
    wanted, after = jitter_clips(clips(4), Jitter()), torch.get_rng_state()
    torch.manual_seed(0)
    assert torch.equal(augment_of(TrainRecipe())(clips(4)), wanted)
    assert torch.equal(torch.get_rng_state(), after)


def test_all_parts_together_repeat_and_stay_within_bounds_in_training_alone():
    recipe = TrainRecipe(network="small3d", **ALL)
    assert augment_of(recipe) == Augment(
        rand_augment=RandAugmentRecipe(magnitude=12),
        jitter=Jitter(),
        grey=0.3,
        permute_channels=0.5,
        erasing=ErasingRecipe(probability=0.5),
    )
    torch.manual_seed(2)
    first = augment_of(recipe)(clips(16), 0.5)
    torch.manual_seed(2)
    assert torch.equal(augment_of(recipe)(clips(16), 0.5), first)
    assert 0 <= first.min() < first.max() <= 1
    frames = torch.randint(0, 256, (8, 2, 12, 12, 3), dtype=torch.uint8)
    augmented = build_network(recipe, heads={"a": 2}, modality="rgb")
    plain = build_network(TrainRecipe(network="small3d"), heads={"a": 2}, modality="rgb")
    assert torch.equal(augmented.eval().prepare_rgb(frames), plain.eval().prepare_rgb(frames))
    assert not torch.equal(augmented.train().prepare_rgb(frames), plain.train().prepare_rgb(frames))


@pytest.mark.slow
def test_a_compiled_network_sees_the_same_pixels():
    recipe = TrainRecipe(network="small3d", compile=True, **ALL)
    eager = build_network(recipe.model_copy(update={"compile": False}), heads={"a": 2}, modality="rgb").train()
    network = build_network(recipe, heads={"a": 2}, modality="rgb").train()
    frames = torch.randint(0, 256, (8, 2, 12, 12, 3), dtype=torch.uint8)
    seen = []
    for one, prepare in ((eager, eager.prepare_rgb), (network, torch.compile(network.prepare_rgb))):
        assert isinstance(one, VideoClassifier)
        torch.manual_seed(2)
        seen.append(prepare(frames))
    torch.testing.assert_close(*seen, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("train.grey=1.5", "train.grey: input should be less than or equal to 1"),
        (
            "train.rand_augment.magnitude=31",
            "train.rand_augment.magnitude: input should be less than or equal to 30",
        ),
        ("train.rand_augment.operations=0", "greater than or equal to 1"),
        ("train.erasing.scale=[0.5,0.2]", "the smallest comes first, and 0.5 is above 0.2"),
        ("train.erasing.shear=1", "train.erasing.shear: unknown key"),
        ("train.erasing.probability=0", "greater than 0"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(setting, words):
    assert words in refused("mmkd-student", "config", "show", "--set", setting)
