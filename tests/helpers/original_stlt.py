"""STLT as the authors of multimodal distillation have it, as plain functions of a state dict with their names.

A transformer over each frame's boxes, a causal one over frames; layers are those of "Attention is all you need"
with the norm behind each part, GELU, and an epsilon of 0.1 in the norms of both embeddings.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

HEADS = 8
EPS = 0.1
TIME = "temporal_transformer"
SPACE = f"{TIME}.layout_embedding"
BOX = f"{SPACE}.category_box_embeddings"


def draw_stlt(hidden: int, layers: int, frames: int, heads: Mapping[str, int], seed: int) -> dict[str, Tensor]:
    """Return drawn weights with the authors' names."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}

    def draw(name: str, *shape: int, scale: float = 0.5, offset: float = 0.0) -> None:
        state[name] = offset + scale * torch.randn(*shape, generator=generator)

    def linear(
        name: str, outputs: int, inputs: int, weight: str = "weight", bias: str = "bias", dot: str = "."
    ) -> None:
        draw(f"{name}{dot}{weight}", outputs, inputs, scale=inputs**-0.5)
        draw(f"{name}{dot}{bias}", outputs)

    def norm(name: str) -> None:
        draw(f"{name}.weight", hidden, scale=0.3, offset=1)
        draw(f"{name}.bias", hidden)

    for table, rows in (("category_embeddings", 3), ("side_embedding", 3), ("state_embedding", 6)):
        draw(f"{BOX}.{table}.weight", rows, hidden)
        state[f"{BOX}.{table}.weight"][0] = 0  # of padding
    linear(f"{BOX}.box_embedding", hidden, 4)
    linear(f"{BOX}.score_embedding", hidden, 1)
    norm(f"{BOX}.layer_norm")
    for part in (SPACE, TIME):
        draw(f"{part}.cls_token", 1, 1, hidden)
        for number in range(layers):
            name = f"{part}.transformer.layers.{number}"
            linear(f"{name}.self_attn.in_proj", 3 * hidden, hidden, dot="_")
            linear(f"{name}.self_attn.out_proj", hidden, hidden)
            linear(f"{name}.linear1", 4 * hidden, hidden)
            linear(f"{name}.linear2", hidden, 4 * hidden)
            norm(f"{name}.norm1")
            norm(f"{name}.norm2")
    draw(f"{TIME}.position_embeddings.weight", frames, hidden)
    norm(f"{TIME}.layer_norm")
    for head, classes in heads.items():
        linear(f"classifiers.{head}", classes, hidden)
    return state


def original_stlt(state: dict[str, Tensor], layers: int, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return head -> logits (B, classes).

    `inputs`: boxes (B, T, N, 4), scores (B, T, N), and by the authors' numbers categories (0 none, 1 object, 2
    hand), sides and states, all int64 (B, T, N).
    """
    tokens = _linear(state, f"{BOX}.box_embedding", inputs["boxes"])
    tokens = tokens + _linear(state, f"{BOX}.score_embedding", inputs["scores"][..., None])
    for table, name in (
        ("category_embeddings", "categories"),
        ("side_embedding", "sides"),
        ("state_embedding", "states"),
    ):
        tokens = tokens + state[f"{BOX}.{table}.weight"][inputs[name]]
    tokens = _norm(state, f"{BOX}.layer_norm", tokens, EPS)
    batch, frames = tokens.shape[:2]
    tokens = torch.cat((state[f"{SPACE}.cls_token"].expand(batch, frames, -1, -1), tokens), 2).flatten(0, 1)
    hidden_keys = functional.pad(inputs["categories"].flatten(0, 1) == 0, (1, 0), value=False)[:, None, None]
    layouts = _transformer(state, SPACE, layers, tokens, hidden_keys)[:, 0].unflatten(0, (batch, frames))
    layouts = layouts + state[f"{TIME}.position_embeddings.weight"][:frames]
    layouts = _norm(state, f"{TIME}.layer_norm", layouts, EPS)
    layouts = torch.cat((layouts, state[f"{TIME}.cls_token"].expand(batch, -1, -1)), 1)
    later = torch.ones(frames + 1, frames + 1, dtype=torch.bool).triu(1)
    clip = _transformer(state, TIME, layers, layouts, later)[:, -1]
    names = [name.split(".")[1] for name in state if name.startswith("classifiers.") and name.endswith("bias")]
    return {head: _linear(state, f"classifiers.{head}", clip) for head in names}


def _transformer(state: dict[str, Tensor], part: str, layers: int, x: Tensor, hidden: Tensor) -> Tensor:
    for number in range(layers):
        name = f"{part}.transformer.layers.{number}"
        qkv = functional.linear(
            x, state[f"{name}.self_attn.in_proj_weight"], state[f"{name}.self_attn.in_proj_bias"]
        )
        query, key, value = qkv.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        scores = (query @ key.transpose(2, 3) / query.shape[-1] ** 0.5).masked_fill(hidden, -torch.inf)
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        x = _norm(state, f"{name}.norm1", x + _linear(state, f"{name}.self_attn.out_proj", mixed))
        inner = functional.gelu(_linear(state, f"{name}.linear1", x))
        x = _norm(state, f"{name}.norm2", x + _linear(state, f"{name}.linear2", inner))
    return x


def _linear(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return functional.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def _norm(state: dict[str, Tensor], name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)
