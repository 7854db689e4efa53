"""Colours that tell less: channels that change places, and clips that turn grey, in a share of the clips."""

from itertools import permutations

import torch
from torch import Tensor

from mmkd.student.augment.jitter import grey


def permute_channels(clips: Tensor, share: float) -> Tensor:
    """Let the colours of a share of the clips (B, 3, T, H, W) change places: one of the five other orders for each.

    A clip is one of them with probability `share`. The draws come from torch's CPU generator; without a share
    nothing is drawn.
    """
    if share == 0:
        return clips
    orders = torch.tensor(list(permutations(range(3))))
    chosen = torch.randint(1, len(orders), (len(clips),)) * (torch.rand(len(clips)) < share)
    places = orders[chosen] + 3 * torch.arange(len(clips))[:, None]  # of planes (T, H, W), which are copied whole
    return clips.flatten(0, 1).index_select(0, places.flatten().to(clips.device)).view_as(clips)


def grey_clips(clips: Tensor, share: float) -> Tensor:
    """Turn a share of the clips (B, 3, T, H, W) grey, in all of their frames; they keep three equal channels.

    A clip is one of them with probability `share`. The draws come from torch's CPU generator; without a share
    nothing is drawn.
    """
    if share == 0:
        return clips
    chosen = (torch.rand(len(clips)) < share).nonzero().flatten()
    if len(chosen) == 0:
        return clips
    index = chosen.to(clips.device)
    return clips.index_copy(0, index, grey(clips[index]).expand(-1, 3, -1, -1, -1))
