"""Photometric jitter of RGB clips on the device: one draw per clip, the same for all of its frames.

The formulas are those of torchvision's `ColorJitter` on float tensors, batched over clips that each have
their own factors; a test holds them to torchvision's, clip by clip. Different from it: the order of the four
operations is drawn once per batch, not per clip, so that each stays one batched operation.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

GREY_WEIGHTS = (0.2989, 0.587, 0.114)
"""Red, green and blue in a grey value, as torchvision has them (ITU-R 601-2)."""


@dataclass(frozen=True)
class Jitter:
    """Strengths of the jitter; 0 leaves a property as it is, larger changes more."""

    brightness: float = 0.25
    """Factor uniform in [max(0, 1 - b), 1 + b]."""
    contrast: float = 0.25
    """Factor uniform in [max(0, 1 - c), 1 + c]."""
    saturation: float = 0.25
    """Factor uniform in [max(0, 1 - s), 1 + s]."""
    hue: float = 0.1
    """Turn of the colour wheel uniform in [-h, h]; 0.5 is half a turn, the largest."""

    def __post_init__(self) -> None:
        """Raise ValueError for negative strengths or a hue above 0.5."""
        strengths = (self.brightness, self.contrast, self.saturation, self.hue)
        if min(strengths) < 0 or self.hue > 0.5:
            raise ValueError(f"jitter strengths must be at least 0 and hue at most 0.5, got {strengths}")


NO_JITTER = Jitter(brightness=0, contrast=0, saturation=0, hue=0)


def jitter_clips(clips: Tensor, jitter: Jitter) -> Tensor:
    """Jitter clips (B, 3, T, H, W) of values in 0..1.

    The draws come from torch's CPU generator, so that every device has the same ones.
    """
    for name in [("brightness", "contrast", "saturation", "hue")[i] for i in torch.randperm(4).tolist()]:
        strength = getattr(jitter, name)
        draws = torch.rand(clips.shape[0])
        if strength == 0:
            continue
        low = -strength if name == "hue" else max(0.0, 1 - strength)
        high = strength if name == "hue" else 1 + strength
        factors = (low + (high - low) * draws).to(clips.device)
        clips = OPERATIONS[name](clips, factors)
    return clips


def adjust_brightness(clips: Tensor, factors: Tensor) -> Tensor:
    """Scale clips (B, 3, T, H, W) by factors (B,); 0 is black, 1 unchanged."""
    return (clips * per_clip(factors)).clamp(0, 1)


def adjust_contrast(clips: Tensor, factors: Tensor) -> Tensor:
    """Blend with the mean grey: 0 is grey, 1 unchanged.

    The mean is that of each frame, as torchvision has it for a video of shape (T, 3, H, W).
    """
    mean = grey(clips).mean((-2, -1), keepdim=True)
    return blend(clips, mean, factors)


def adjust_saturation(clips: Tensor, factors: Tensor) -> Tensor:
    """Blend with the grey image: 0 is grey, 1 unchanged."""
    return blend(clips, grey(clips), factors)


def adjust_hue(clips: Tensor, factors: Tensor) -> Tensor:
    """Turn the hue by factors (B,) in [-0.5, 0.5] turns."""
    hue, saturation, value = rgb_to_hsv(clips)
    turned = (hue + factors.view(-1, 1, 1, 1)).remainder(1.0)
    return hsv_to_rgb(turned, saturation, value)


OPERATIONS = {
    "brightness": adjust_brightness,
    "contrast": adjust_contrast,
    "saturation": adjust_saturation,
    "hue": adjust_hue,
}


def per_clip(factors: Tensor) -> Tensor:
    """Shape factors (B,) to multiply clips (B, 3, T, H, W)."""
    return factors.view(-1, 1, 1, 1, 1)


def blend(clips: Tensor, other: Tensor, factors: Tensor) -> Tensor:
    """Return factor * clips + (1 - factor) * other, kept in 0..1."""
    factors = per_clip(factors)
    return (factors * clips + (1 - factors) * other).clamp(0, 1)


def grey(clips: Tensor) -> Tensor:
    """Return the grey value (B, 1, T, H, W)."""
    red, green, blue = clips.unbind(1)
    return (GREY_WEIGHTS[0] * red + GREY_WEIGHTS[1] * green + GREY_WEIGHTS[2] * blue).unsqueeze(1)


def rgb_to_hsv(clips: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return hue in turns, saturation and value, each (B, T, H, W); hue and saturation of grey are 0."""
    red, green, blue = clips.unbind(1)
    value = clips.amax(1)
    spread = value - clips.amin(1)
    saturation = spread / value.clamp_min(torch.finfo(clips.dtype).tiny)
    divisor = torch.where(spread > 0, spread, 1.0)
    sextant = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    return (sextant / 6).remainder(1.0), saturation, value


def hsv_to_rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """Return clips (B, 3, T, H, W) from hue in turns, saturation and value, each (B, T, H, W).

    By the closed form value * (1 - saturation * clip(min(k, 4 - k), 0, 1)) with k = (n + 6 hue) mod 6 and
    n = 5, 3, 1 for red, green, blue: no table of sextants, so it batches without a gather.
    """
    channels = []
    for n in (5.0, 3.0, 1.0):
        k = (n + 6 * hue).remainder(6.0)
        channels.append(value * (1 - saturation * torch.minimum(k, 4 - k).clamp(0, 1)))
    return torch.stack(channels, 1)
