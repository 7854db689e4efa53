"""What of a view reaches a network: fewer frames, smaller ones, or the differences between them."""

import torch
from torch import Tensor, nn


class Downscale(nn.Module):
    """Square pictures made smaller, as `torch.nn.functional.interpolate` does it, bilinear with antialiasing.

    Two products with one matrix, made by that function: the same values within rounding, and every exporter knows
    them. Sums are taken in float32, under autocast, too.
    """

    def __init__(self, size_px: int, to_px: int) -> None:
        """Map sides of `size_px` to `to_px`."""
        super().__init__()
        identity = torch.eye(size_px)[None, None]
        weights = nn.functional.interpolate(identity, size=(to_px, size_px), mode="bilinear", antialias=True)
        self.register_buffer("weights", weights[0, 0], persistent=False)
        self.weights: Tensor

    def forward(self, clips: Tensor) -> Tensor:
        """Map float clips (..., S, S) to (..., S', S')."""
        with torch.autocast(clips.device.type, enabled=False):
            return self.weights @ (clips.float() @ self.weights.T)


def differences(clips: Tensor) -> Tensor:
    """Return x[t + 1] - x[t] of clips (B, C, T, S, S), T alike: the last difference stands there twice.

    Of a clip of one frame, which has none, all is 0.
    """
    if clips.shape[2] == 1:
        return torch.zeros_like(clips)
    steps = clips[:, :, 1:] - clips[:, :, :-1]
    return torch.cat((steps, steps[:, :, -1:]), dim=2)
