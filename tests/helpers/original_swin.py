"""Video Swin as its paper and repository have it, as plain functions of a state dict with the repository's names.

It shares no code with torchvision: windows are cut one by one, and the bias of two tokens is looked up by their
offset. Slow, and easy to compare with the paper (Liu et al., 2022, section 3).
"""

from itertools import product

import torch
from torch import Tensor
from torch.nn import functional

DEPTHS = (2, 2, 6, 2)
HEADS = (3, 6, 12, 24)
WINDOW = (8, 7, 7)
WIDTH = 96


def draw_swin(seed: int) -> dict[str, Tensor]:
    """Return drawn weights of a Video Swin-T with the names of its repository, without a classifier."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}

    def linear(name: str, outputs: int, inputs: int, *, bias: bool = True) -> None:
        state[f"{name}.weight"] = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
        if bias:
            state[f"{name}.bias"] = 0.3 * torch.randn(outputs, generator=generator)

    def norm(name: str, width: int) -> None:
        state[f"{name}.weight"] = 1 + 0.3 * torch.randn(width, generator=generator)
        state[f"{name}.bias"] = 0.3 * torch.randn(width, generator=generator)

    state["patch_embed.proj.weight"] = torch.randn(WIDTH, 3, 2, 4, 4, generator=generator) / 96**0.5
    state["patch_embed.proj.bias"] = torch.randn(WIDTH, generator=generator)
    norm("patch_embed.norm", WIDTH)
    offsets = (2 * WINDOW[0] - 1) * (2 * WINDOW[1] - 1) * (2 * WINDOW[2] - 1)
    for layer, (depth, heads) in enumerate(zip(DEPTHS, HEADS, strict=True)):
        width = WIDTH * 2**layer
        for block in range(depth):
            name = f"layers.{layer}.blocks.{block}"
            norm(f"{name}.norm1", width)
            state[f"{name}.attn.relative_position_bias_table"] = torch.randn(offsets, heads, generator=generator)
            state[f"{name}.attn.relative_position_index"] = position_index()
            linear(f"{name}.attn.qkv", 3 * width, width)
            linear(f"{name}.attn.proj", width, width)
            norm(f"{name}.norm2", width)
            linear(f"{name}.mlp.fc1", 4 * width, width)
            linear(f"{name}.mlp.fc2", width, 4 * width)
        if layer + 1 < len(DEPTHS):
            linear(f"layers.{layer}.downsample.reduction", 2 * width, 4 * width, bias=False)
            norm(f"layers.{layer}.downsample.norm", 4 * width)
    norm("norm", width)
    return state


def position_index() -> Tensor:
    """Return int64 (N, N): the row of the bias table for tokens i and j of a whole window."""
    places = torch.tensor(list(product(*map(range, WINDOW))))
    offset = places[:, None] - places[None] + torch.tensor(WINDOW) - 1
    strides = torch.tensor([(2 * WINDOW[1] - 1) * (2 * WINDOW[2] - 1), 2 * WINDOW[2] - 1, 1])
    return (offset * strides).sum(-1)


def original_swin(state: dict[str, Tensor], clips: Tensor) -> Tensor:
    """Return features (B, 768) of clips (B, 3, T, H, W), T even and H, W multiples of 4."""
    x = functional.conv3d(clips, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], (2, 4, 4))
    x = _norm(state, "patch_embed.norm", x.permute(0, 2, 3, 4, 1))
    for layer, depth in enumerate(DEPTHS):
        for block in range(depth):
            name = f"layers.{layer}.blocks.{block}"
            x = x + _attention(state, name, _norm(state, f"{name}.norm1", x), HEADS[layer], shifted=block % 2 == 1)
            inner = functional.gelu(_linear(state, f"{name}.mlp.fc1", _norm(state, f"{name}.norm2", x)))
            x = x + _linear(state, f"{name}.mlp.fc2", inner)
        if layer + 1 < len(DEPTHS):
            x = _merge(state, f"layers.{layer}.downsample", x)
    return _norm(state, "norm", x).mean((1, 2, 3))


def _attention(state: dict[str, Tensor], name: str, x: Tensor, heads: int, *, shifted: bool) -> Tensor:
    sizes = x.shape[1:4]
    window = [min(size, most) for size, most in zip(sizes, WINDOW, strict=True)]
    shift = [most // 2 if shifted and size > most else 0 for size, most in zip(sizes, WINDOW, strict=True)]
    padded = [-(-size // side) * side for size, side in zip(sizes, window, strict=True)]
    x = functional.pad(x, (0, 0, *(v for d in (2, 1, 0) for v in (0, padded[d] - sizes[d]))))
    x = torch.roll(x, [-s for s in shift], (1, 2, 3))
    # Tokens that came round the edge by the roll are strangers to those that did not.
    regions = torch.stack(
        torch.meshgrid(*(_region(p, w, s) for p, w, s in zip(padded, window, shift, strict=True)), indexing="ij"),
        -1,
    )
    output = torch.zeros_like(x)
    for corner in product(*(range(0, p, w) for p, w in zip(padded, window, strict=True))):
        cut = tuple(slice(c, c + w) for c, w in zip(corner, window, strict=True))
        tokens = x[(slice(None), *cut)].flatten(1, 3)
        strangers = (regions[cut].flatten(0, 2)[:, None] != regions[cut].flatten(0, 2)[None]).any(-1)
        found = _window(state, name, tokens, heads, strangers)
        output[(slice(None), *cut)] = found.unflatten(1, window)
    output = torch.roll(output, shift, (1, 2, 3))
    return output[:, : sizes[0], : sizes[1], : sizes[2]]


def _region(size: int, window: int, shift: int) -> Tensor:
    region = torch.zeros(size, dtype=torch.int64)
    if shift:
        region[-window:] = 1
        region[-shift:] = 2
    return region


def _window(state: dict[str, Tensor], name: str, tokens: Tensor, heads: int, strangers: Tensor) -> Tensor:
    batch, count, width = tokens.shape
    query, key, value = _linear(state, f"{name}.attn.qkv", tokens).reshape(batch, count, 3, heads, -1).unbind(2)
    scores = torch.einsum("bqhc,bkhc->bhqk", query, key) / (width // heads) ** 0.5
    table, index = (state[f"{name}.attn.relative_position_{what}"] for what in ("bias_table", "index"))
    scores = scores + table[index[:count, :count]].permute(2, 0, 1) - 100 * strangers
    mixed = torch.einsum("bhqk,bkhc->bqhc", scores.softmax(-1), value).flatten(2)
    return _linear(state, f"{name}.attn.proj", mixed)


def _merge(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    x = functional.pad(x, (0, 0, 0, x.shape[3] % 2, 0, x.shape[2] % 2))
    corners = [x[:, :, row::2, column::2] for column in (0, 1) for row in (0, 1)]
    return _norm(state, f"{name}.norm", torch.cat(corners, -1)) @ state[f"{name}.reduction.weight"].T


def _linear(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return functional.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def _norm(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])
