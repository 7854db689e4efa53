"""All that training does to the pixels of RGB clips, in its order; what a recipe leaves out draws nothing."""

from dataclasses import dataclass

from torch import Tensor

from mmkd.student.augment.colours import grey_clips, permute_channels
from mmkd.student.augment.jitter import NO_JITTER, Jitter, jitter_clips
from mmkd.student.recipes.augment import ErasingRecipe, RandAugmentRecipe
from mmkd.student.recipes.train import TrainRecipe


@dataclass(frozen=True)
class Augment:
    """The photometric changes of a training run, those of mmkd.student.recipes.train."""

    rand_augment: RandAugmentRecipe | None = None
    """Operations drawn for each clip."""
    jitter: Jitter = NO_JITTER
    """Of brightness, contrast, saturation and hue."""
    grey: float = 0.0
    """Share of the clips that turn grey."""
    permute_channels: float = 0.0
    """Share of the clips whose red, green and blue change places."""
    erasing: ErasingRecipe | None = None
    """Windows that are filled."""

    def __call__(self, clips: Tensor, fill: Tensor | float = 0.0) -> Tensor:
        """Change clips (B, 3, T, H, W) of values in 0..1, each by its own draws and all of its frames alike.

        Erased windows are filled with `fill`. The draws come from torch's CPU generator, so that every device has
        the same ones.
        """
        if self.rand_augment is not None:
            from mmkd.student.augment.rand_augment import rand_augment  # torchvision's transforms: half a second

            clips = rand_augment(clips, self.rand_augment)
        clips = jitter_clips(clips, self.jitter)
        clips = grey_clips(clips, self.grey)
        clips = permute_channels(clips, self.permute_channels)
        if self.erasing is not None:
            from mmkd.student.augment.erasing import erase_clips

            clips = erase_clips(clips, self.erasing, fill)
        return clips


NO_AUGMENT = Augment()


def augment_of(recipe: TrainRecipe) -> Augment:
    """Return the changes that a recipe asks for."""
    return Augment(
        rand_augment=recipe.rand_augment,
        jitter=Jitter(**recipe.jitter.model_dump()),
        grey=recipe.grey,
        permute_channels=recipe.permute_channels,
        erasing=recipe.erasing,
    )
