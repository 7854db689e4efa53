"""TSM on ResNet-50 as EPIC-KITCHENS-100's baselines have it, as plain functions of a state dict with their names.

Lin et al., "TSM" (ICCV 2019), section 3: in each residual block an eighth of the channels goes one frame forward
and an eighth one back, before the first convolution.
"""

import torch
from torch import Tensor
from torch.nn import functional

BLOCKS = (3, 4, 6, 3)


def draw_tsm(channels: int, classes: int, seed: int) -> dict[str, Tensor]:
    """Return drawn weights by the names of EPIC's checkpoints, classifier included."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}

    def convolution(name: str, outputs: int, inputs: int, side: int) -> None:
        scale = (2 / (inputs * side * side)) ** 0.5
        state[f"model.base_model.{name}.weight"] = scale * torch.randn(
            outputs, inputs, side, side, generator=generator
        )

    def norm(name: str, width: int) -> None:
        name = f"model.base_model.{name}"
        state[f"{name}.weight"] = 1 + 0.2 * torch.randn(width, generator=generator)
        state[f"{name}.bias"] = 0.2 * torch.randn(width, generator=generator)
        state[f"{name}.running_mean"] = 0.2 * torch.randn(width, generator=generator)
        state[f"{name}.running_var"] = 1 + torch.rand(width, generator=generator)
        state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    convolution("conv1", 64, channels, 7)
    norm("bn1", 64)
    inputs = 64
    for stage, blocks in enumerate(BLOCKS):
        width = 64 * 2**stage
        for block in range(blocks):
            name = f"layer{stage + 1}.{block}"
            convolution(f"{name}.conv1.net", width, inputs, 1)
            norm(f"{name}.bn1", width)
            convolution(f"{name}.conv2", width, width, 3)
            norm(f"{name}.bn2", width)
            convolution(f"{name}.conv3", 4 * width, width, 1)
            norm(f"{name}.bn3", 4 * width)
            if block == 0:
                convolution(f"{name}.downsample.0", 4 * width, inputs, 1)
                norm(f"{name}.downsample.1", 4 * width)
            inputs = 4 * width
    state["model.new_fc.weight"] = torch.randn(classes, inputs, generator=generator) / inputs**0.5
    state["model.new_fc.bias"] = torch.randn(classes, generator=generator)
    return state


def original_tsm(state: dict[str, Tensor], clips: Tensor) -> Tensor:
    """Return logits (B, classes) of clips (B, T, C, H, W): the average over frames, in evaluation mode."""
    batch, frames = clips.shape[:2]
    x = functional.relu(_norm(state, "bn1", _convolve(state, "conv1", clips.flatten(0, 1), 2, 3)))
    x = functional.max_pool2d(x, 3, 2, 1)
    for stage, blocks in enumerate(BLOCKS):
        for block in range(blocks):
            name, stride = f"layer{stage + 1}.{block}", 2 if stage and not block else 1
            y = _shift(x.unflatten(0, (batch, frames))).flatten(0, 1)
            y = functional.relu(_norm(state, f"{name}.bn1", _convolve(state, f"{name}.conv1.net", y)))
            y = functional.relu(_norm(state, f"{name}.bn2", _convolve(state, f"{name}.conv2", y, stride, 1)))
            y = _norm(state, f"{name}.bn3", _convolve(state, f"{name}.conv3", y))
            if block == 0:
                x = _norm(state, f"{name}.downsample.1", _convolve(state, f"{name}.downsample.0", x, stride))
            x = functional.relu(x + y)
    logits = functional.linear(x.mean((2, 3)), state["model.new_fc.weight"], state["model.new_fc.bias"])
    return logits.unflatten(0, (batch, frames)).mean(1)


def _shift(x: Tensor) -> Tensor:
    """Shift (B, T, C, H, W), one frame and channel after the other."""
    eighth = x.shape[2] // 8
    out = x.clone()
    for frame in range(x.shape[1]):
        out[:, frame, :eighth] = x[:, frame + 1, :eighth] if frame + 1 < x.shape[1] else 0
        out[:, frame, eighth : 2 * eighth] = x[:, frame - 1, eighth : 2 * eighth] if frame else 0
    return out


def _convolve(state: dict[str, Tensor], name: str, x: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
    return functional.conv2d(x, state[f"model.base_model.{name}.weight"], None, stride, padding)


def _norm(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    part = {what: state[f"model.base_model.{name}.{what}"][:, None, None] for what in ("weight", "bias")}
    mean, var = (state[f"model.base_model.{name}.running_{what}"][:, None, None] for what in ("mean", "var"))
    return (x - mean) / (var + 1e-5).sqrt() * part["weight"] + part["bias"]
