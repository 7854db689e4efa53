"""One window of a clip erased in all of its frames (Zhong et al., "Random Erasing Data Augmentation", AAAI 2020).

torchvision's `RandomErasing` draws the windows, so that their sizes and places are those of its users.
"""

import torch
from torch import Tensor
from torchvision.transforms.v2 import RandomErasing

from mmkd.student.recipes.augment import ErasingRecipe


def erase_clips(clips: Tensor, recipe: ErasingRecipe, fill: Tensor | float) -> Tensor:
    """Fill a window of some of the clips (B, 3, T, H, W); which clips and windows come from torch's CPU generator.

    `fill` is a number, or a tensor that broadcasts against the clips: what the network's normalisation maps to 0
    looks like torchvision's erasing of normalised pictures.
    """
    count, height, width = len(clips), *clips.shape[-2:]
    windows = RandomErasing(p=1.0, scale=recipe.scale, ratio=recipe.ratio)
    bounds = torch.zeros(count, 4, dtype=torch.int64)  # an empty window for the others
    for number in (torch.rand(count) < recipe.probability).nonzero().flatten().tolist():
        found = windows.make_params([clips[number]])
        if found["v"] is not None:  # None: ten windows in turn did not fit
            top, left = found["i"], found["j"]
            bounds[number] = torch.tensor([top, top + found["h"], left, left + found["w"]])
    top, bottom, left, right = bounds.to(clips.device).view(count, 4, 1).unbind(1)
    rows, columns = (torch.arange(size, device=clips.device) for size in (height, width))
    inside_rows, inside_columns = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
    inside = (inside_rows[:, :, None] & inside_columns[:, None, :]).view(count, 1, 1, height, width)
    return torch.where(inside, torch.as_tensor(fill, dtype=clips.dtype, device=clips.device), clips)
