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
    names = list(OPERATIONS)
    clips = clips.contiguous()  # planes of one colour are much faster here than interleaved ones
    for name in [names[i] for i in torch.randperm(len(names)).tolist()]:
        strength = getattr(jitter, name)
        draws = torch.rand(clips.shape[0])  # drawn even where unused, so that one strength moves no other draws
        if strength == 0:
            continue
        low = -strength if name == "hue" else max(0.0, 1 - strength)
        high = strength if name == "hue" else 1 + strength
        factors = (low + (high - low) * draws).to(clips.device)
        clips = OPERATIONS[name](clips, factors)
    return clips


def adjust_brightness(clips: Tensor, factors: Tensor) -> Tensor:
    """Scale clips (B, 3, T, H, W) by factors (B,); 0 is black, 1 unchanged."""
    return (clips * per_clip(factors)).clamp_(0, 1)


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
    """Turn the hue by factors (B,) in [-0.5, 0.5] turns.

    Through HSV with the closed form value - chroma * clip(2 - |k - 2|, 0, 1), where k = (n + 6 hue) mod 6 and
    n = 5, 3, 1 for red, green, blue: no table of sextants, so it batches without a gather.
    """
    sextant, chroma, value = sextant_chroma_value(clips)
    # In place, as below: each of these is as large as a third of the clips.
    sextant += 6 * factors.view(-1, 1, 1, 1)
    turned = torch.empty_like(clips)
    for channel, n in enumerate((5.0, 3.0, 1.0)):
        k = sextant + n
        k -= 6 * torch.floor(k / 6)  # twice as fast as remainder
        weight = k.sub_(2).abs_().neg_().add_(2).clamp_(0, 1)
        torch.addcmul(value, chroma, weight, value=-1, out=turned[:, channel])
    return turned


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
    return torch.lerp(other.expand_as(clips), clips, per_clip(factors)).clamp_(0, 1)


def grey(clips: Tensor) -> Tensor:
    """Return the grey value (B, 1, T, H, W)."""
    red, green, blue = clips.unbind(1)
    return (GREY_WEIGHTS[0] * red + GREY_WEIGHTS[1] * green + GREY_WEIGHTS[2] * blue).unsqueeze(1)


def sextant_chroma_value(clips: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return 6 * hue (in -1..5), chroma (largest minus smallest channel) and value, each (B, T, H, W)."""
    red, green, blue = clips.unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    scale = 1 / chroma.clamp_min(torch.finfo(clips.dtype).tiny)  # of grey the numerators are 0 anyway
    sextant = torch.where(
        value == red,
        (green - blue).mul_(scale),
        torch.where(value == green, (blue - red).mul_(scale).add_(2), (red - green).mul_(scale).add_(4)),
    )
    return sextant, chroma, value
