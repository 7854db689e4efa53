"""A 2D ResNet-50 that sees time by shifting channels between frames: TSM (Lin et al., ICCV 2019), on torchvision's.

Before the first convolution of every residual block, an eighth of the channels comes from the next frame and
another eighth from the one before; beyond the ends there is nothing. Features of the frames are averaged, so with a
linear head the logits are the published average over frames. It gives up nothing but the dropout before the head.
"""

from typing import cast

import torch
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet

RGB_CHANNELS = 3
SHIFT_DIVISOR = 8
"""A share of 1 / 8 of a block's channels is shifted each way (the paper, and EPIC's models)."""


class ShiftedConvolution(nn.Conv2d):
    """A convolution of 2D maps whose input is shifted in time first, with a convolution's parameters."""

    frames = 1
    """T of the clips whose frames lie one behind the other in a batch; set before each forward pass."""

    def forward(self, maps: Tensor) -> Tensor:
        """Map (B * T, C, H, W) to the convolution's output for shifted maps."""
        return super().forward(shifted(maps, self.frames))


def shifted(maps: Tensor, frames: int) -> Tensor:
    """Return maps (B * T, C, H, W) with the first C // 8 channels of the next frame, the second of the last one."""
    clips, fold = maps.reshape(-1, frames, *maps.shape[1:]), maps.shape[1] // SHIFT_DIVISOR
    from_next = nn.functional.pad(clips[:, 1:, :fold], (0, 0, 0, 0, 0, 0, 0, 1))
    from_last = nn.functional.pad(clips[:, :-1, fold : 2 * fold], (0, 0, 0, 0, 0, 0, 1, 0))
    return torch.cat((from_next, from_last, clips[:, :, 2 * fold :]), dim=2).flatten(0, 1)


def tsm_resnet50(name: str, *, channels: int, frames: int, size_px: int) -> "TemporalShiftResNet":
    """Build the network, which takes any number of frames of any size."""
    return TemporalShiftResNet(channels)


class TemporalShiftResNet(ResNet):  # type: ignore[misc]  # torchvision has no types
    """ResNet-50 with shifts; its parameters have the names of torchvision's ResNet-50."""

    feature_count = 2048

    def __init__(self, channels: int) -> None:
        """Take clips of `channels` channels: 3, or 2 k for a stack of k flow fields."""
        super().__init__(Bottleneck, [3, 4, 6, 3])
        self.fc = nn.Identity()
        if channels != RGB_CHANNELS:
            self.conv1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
        for block in [module for module in self.modules() if isinstance(module, Bottleneck)]:
            block.conv1 = ShiftedConvolution(block.conv1.in_channels, block.conv1.out_channels, 1, bias=False)

    def forward(self, clips: Tensor) -> Tensor:
        """Map clips (B, C, T, S, S) to features (B, 2048), the mean over their frames."""
        frames = clips.shape[2]
        for module in self.modules():
            if isinstance(module, ShiftedConvolution):
                module.frames = frames
        features = super().forward(clips.transpose(1, 2).flatten(0, 1))
        return cast(Tensor, features.unflatten(0, (-1, frames)).mean(1))
