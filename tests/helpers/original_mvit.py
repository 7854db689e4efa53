"""MViTv2 as SlowFast's code has it, as plain functions of a state dict with its names.

Li et al., "MViTv2" (CVPR 2022): pooled attention with residual pooling and decomposed relative positions. Of
torchvision it shares nothing: relative positions are looked up offset by offset.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

EPS = 1e-6


@dataclass(frozen=True)
class Block:
    """Widths, heads and strides of one block."""

    width: int
    width_out: int
    heads: int
    stride_q: int
    stride_kv: int


def draw_mvit(blocks: tuple[Block, ...], size: int, frames: int, seed: int) -> dict[str, Tensor]:
    """Return drawn weights with SlowFast's names, without a classifier; `size` and `frames` are the stem's."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}

    def draw(name: str, *shape: int, scale: float = 1.0, offset: float = 0.0) -> None:
        state[name] = offset + scale * torch.randn(*shape, generator=generator)

    def linear(name: str, outputs: int, inputs: int) -> None:
        draw(f"{name}.weight", outputs, inputs, scale=inputs**-0.5)
        draw(f"{name}.bias", outputs, scale=0.3)

    def norm(name: str, width: int) -> None:
        draw(f"{name}.weight", width, scale=0.3, offset=1)
        draw(f"{name}.bias", width, scale=0.3)

    draw("cls_token", 1, 1, blocks[0].width)
    draw("patch_embed.proj.weight", blocks[0].width, 3, 3, 7, 7, scale=0.05)
    draw("patch_embed.proj.bias", blocks[0].width)
    for number, block in enumerate(blocks):
        name, head = f"blocks.{number}", block.width_out // block.heads
        norm(f"{name}.norm1", block.width)
        linear(f"{name}.attn.qkv", 3 * block.width_out, block.width)
        linear(f"{name}.attn.proj", block.width_out, block.width_out)
        for which in "qkv":
            draw(f"{name}.attn.pool_{which}.weight", head, 1, 3, 3, 3, scale=0.3)
            norm(f"{name}.attn.norm_{which}", head)
        sides = 2 * max(size // block.stride_q, size // block.stride_kv) - 1
        draw(f"{name}.attn.rel_pos_h", sides, head)
        draw(f"{name}.attn.rel_pos_w", sides, head)
        draw(f"{name}.attn.rel_pos_t", 2 * frames - 1, head)
        norm(f"{name}.norm2", block.width_out)
        linear(f"{name}.mlp.fc1", 4 * block.width_out, block.width_out)
        linear(f"{name}.mlp.fc2", block.width_out, 4 * block.width_out)
        if block.width != block.width_out:
            linear(f"{name}.proj", block.width_out, block.width)
        size //= block.stride_q
    norm("norm", blocks[-1].width_out)
    return state


def original_mvit(state: dict[str, Tensor], clips: Tensor, blocks: tuple[Block, ...]) -> Tensor:
    """Return features (B, C) of clips (B, 3, T, H, W): the class token's, normalised."""
    stem = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    x = functional.conv3d(clips, *stem, (2, 4, 4), (1, 3, 3))
    sizes = tuple(x.shape[2:])
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat((state["cls_token"].expand(len(x), -1, -1), x), 1)
    for number, block in enumerate(blocks):
        name = f"blocks.{number}"
        normed = _norm(state, f"{name}.norm1", x)
        attended, new_sizes = _attention(state, f"{name}.attn", normed, sizes, block)
        skip = _linear(state, f"{name}.proj", normed) if block.width != block.width_out else x
        if block.stride_q > 1:
            side, stride = block.stride_q + 1, block.stride_q
            grid = skip[:, 1:].transpose(1, 2).unflatten(2, sizes)
            pooled = functional.max_pool3d(grid, (1, side, side), (1, stride, stride), (0, side // 2, side // 2))
            skip = torch.cat((skip[:, :1], pooled.flatten(2).transpose(1, 2)), 1)
        x, sizes = skip + attended, new_sizes
        inner = functional.gelu(_linear(state, f"{name}.mlp.fc1", _norm(state, f"{name}.norm2", x)))
        x = x + _linear(state, f"{name}.mlp.fc2", inner)
    return _norm(state, "norm", x)[:, 0]


def _attention(
    state: dict[str, Tensor], name: str, x: Tensor, sizes: tuple[int, ...], block: Block
) -> tuple[Tensor, tuple[int, ...]]:
    pooled, shapes = {}, {}
    parts = _linear(state, f"{name}.qkv", x).unflatten(2, (3, block.heads, -1)).unbind(2)
    for which, part in zip("qkv", parts, strict=True):  # part: B, N, heads, channels
        stride = block.stride_q if which == "q" else block.stride_kv
        grid = part[:, 1:].permute(0, 2, 3, 1).flatten(0, 1).unflatten(2, sizes)
        kernel = state[f"{name}.pool_{which}.weight"]
        grid = functional.conv3d(grid, kernel, None, (1, stride, stride), 1, groups=len(kernel))
        shapes[which] = tuple(grid.shape[2:])
        tokens = grid.flatten(2).transpose(1, 2).unflatten(0, (len(x), block.heads))
        tokens = torch.cat((part[:, :1].transpose(1, 2), tokens), 2)
        pooled[which] = _norm(state, f"{name}.norm_{which}", tokens)
    query, key, value = pooled["q"], pooled["k"], pooled["v"]
    scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
    scores[:, :, 1:, 1:] += _positions(state, name, query[:, :, 1:], shapes["q"], shapes["k"])
    mixed = scores.softmax(-1) @ value
    mixed[:, :, 1:] += query[:, :, 1:]  # residual pooling, without the class token
    return _linear(state, f"{name}.proj", mixed.transpose(1, 2).flatten(2)), shapes["q"]


def _positions(
    state: dict[str, Tensor], name: str, query: Tensor, sizes_q: tuple[int, ...], sizes_k: tuple[int, ...]
) -> Tensor:
    places_q = torch.cartesian_prod(*map(torch.arange, sizes_q))
    places_k = torch.cartesian_prod(*map(torch.arange, sizes_k))
    total = torch.zeros(*query.shape[:3], len(places_k))
    for axis, which in enumerate("thw"):
        side_q, side_k = sizes_q[axis], sizes_k[axis]
        grow_q, grow_k = max(side_k / side_q, 1.0), max(side_q / side_k, 1.0)
        offset = places_q[:, None, axis] * grow_q - places_k[None, :, axis] * grow_k + (side_k - 1) * grow_k
        table = state[f"{name}.rel_pos_{which}"]
        assert len(table) == 2 * max(side_q, side_k) - 1
        total += torch.einsum("bhqc,qkc->bhqk", query, table[offset.long()])
    return total


def _linear(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return functional.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def _norm(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], EPS)
