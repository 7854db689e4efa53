"""RandAugment without geometry (Cubuk et al., NeurIPS 2020): the teacher saw these pixels where they are.

Of the operations of torchvision's `RandAugment` those that shear, move and turn are left out; the other nine, the
identity among them, have its strengths, its signs and its own functions, which see a clip as torchvision sees a
video: statistics (of contrast, autocontrast, equalize) are each frame's. Different from it: the operations of a
clip are drawn for itself, but clips with the same one are computed together.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from mmkd.student.recipes.augment import RandAugmentRecipe

BINS = 30
"""The largest magnitude; torchvision counts 31 bins from 0."""

OPERATIONS: dict[str, tuple[Callable[[Tensor, float], Tensor], bool]] = {
    "identity": (lambda frames, _: frames, False),
    "brightness": (lambda frames, strength: functional.adjust_brightness(frames, 1 + 0.9 * strength), True),
    "colour": (lambda frames, strength: functional.adjust_saturation(frames, 1 + 0.9 * strength), True),
    "contrast": (lambda frames, strength: functional.adjust_contrast(frames, 1 + 0.9 * strength), True),
    "sharpness": (lambda frames, strength: functional.adjust_sharpness(frames, 1 + 0.9 * strength), True),
    "posterize": (lambda frames, strength: functional.posterize(frames, round(8 - 4 * strength)), False),
    "solarize": (lambda frames, strength: functional.solarize(frames, 1 - strength), False),
    "autocontrast": (lambda frames, _: functional.autocontrast(frames), False),
    "equalize": (lambda frames, _: functional.equalize(frames), False),
}
"""Name -> frames (..., 3, H, W) in 0..1 and a strength in 0..1 to frames; and whether its strength has a sign."""
NAMES = tuple(OPERATIONS)


def rand_augment(clips: Tensor, recipe: RandAugmentRecipe) -> Tensor:
    """Apply operations, one after the other and drawn for each clip, to some of the clips (B, 3, T, H, W) in 0..1.

    The draws come from torch's CPU generator. Computed in the clips' own precision, also under autocast.
    """
    chosen = torch.rand(len(clips)) < recipe.probability
    clips = clips.contiguous()  # planes of one colour are much faster than interleaved ones
    with torch.autocast(clips.device.type, enabled=False):
        for _ in range(recipe.operations):
            draws = torch.randint(len(NAMES), (len(clips),))
            negative = torch.rand(len(clips)) < 0.5
            clips = apply_drawn(clips, torch.where(chosen, draws, 0), negative, recipe.magnitude / BINS)
    return clips


def apply_drawn(clips: Tensor, draws: Tensor, negative: Tensor, strength: float) -> Tensor:
    """Apply to each clip the operation of number `draws` (B,), with the strength's sign by `negative` (B,)."""
    changed = []
    for rows, operation, signed in groups(draws, negative, strength):
        index = rows.to(clips.device)
        frames = clips.index_select(0, index).transpose(1, 2)  # (b, T, 3, H, W), as torchvision's videos
        changed.append((index, operation(frames, signed).transpose(1, 2)))
    if not changed:
        return clips
    return clips.index_copy(0, torch.cat([index for index, _ in changed]), torch.cat([new for _, new in changed]))


def groups(
    draws: Tensor, negative: Tensor, strength: float
) -> Iterator[tuple[Tensor, Callable[[Tensor, float], Tensor], float]]:
    """Yield the rows of each operation but the identity, the operation, and its strength with its sign."""
    for number, (operation, has_sign) in enumerate(OPERATIONS.values()):
        for sign in (1, -1) if has_sign else (1,):
            rows = (draws == number) & (negative == (sign < 0)) if has_sign else draws == number
            if number and rows.any():
                yield rows.nonzero().flatten(), operation, sign * strength
