"""A network without anything random or shared between clips, so that parts of a batch add up exactly."""

import torch
from torch import nn

from tests.helpers.moving_bars import FRAMES, SIZE_PX


class Plain(nn.Module):
    """Maps {"rgb": uint8 (B, T, S, S, 3)} of moving bars to logits of their direction."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(FRAMES * SIZE_PX**2 * 3, 8)
        self.layers = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Sequential(nn.Linear(8, 8)))
        self.heads = nn.ModuleDict({"direction": nn.Linear(8, 4)})

    def forward(self, inputs):
        features = self.layers(torch.tanh(self.body(inputs["rgb"].flatten(1).float() / 255)))
        return {name: head(features) for name, head in self.heads.items()}


def plain():
    """A new one, always with the same weights."""
    torch.manual_seed(3)
    return Plain()
