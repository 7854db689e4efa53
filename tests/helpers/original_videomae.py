"""A finetuned VideoMAE by its authors' names, in plain functions of its state dict.

Written from the paper (a ViT over cubes of 2 x 16 x 16 pixels, sine positions, mean pooling) and the published
names; without transformers' modules.
"""

import torch
from torch.nn.functional import conv3d, gelu, layer_norm

CUBE = (2, 16, 16)
EPS = 1e-6


def draw_videomae(*, width, blocks, hidden, classes, seed):
    """Drawn parameters of a ViT, by the authors' names."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape, around=0.0):
        return around + torch.randn(*shape, generator=generator) / max(1, shape[-1]) ** 0.5

    state = {"patch_embed.proj.weight": drawn(width, 3, *CUBE), "patch_embed.proj.bias": drawn(width)}
    for block in (f"blocks.{number}." for number in range(blocks)):
        for norm in ("norm1", "norm2"):
            state |= {f"{block}{norm}.weight": drawn(width, around=1), f"{block}{norm}.bias": drawn(width)}
        state |= {f"{block}attn.{name}_bias": drawn(width) for name in "qv"}
        state |= {f"{block}attn.qkv.weight": 2 * drawn(3 * width, width)}
        for name, shape in {
            "attn.proj": (width, width),
            "mlp.fc1": (hidden, width),
            "mlp.fc2": (width, hidden),
        }.items():
            state |= {f"{block}{name}.weight": drawn(*shape), f"{block}{name}.bias": drawn(shape[0])}
    for name, shape in {"fc_norm": (width,), "head": (classes, width)}.items():
        state |= {f"{name}.weight": drawn(*shape, around=float(name == "fc_norm")), f"{name}.bias": drawn(shape[0])}
    return state


def positions(count, width):
    """(count, width) the sine of even places, the cosine of odd ones (Vaswani et al., section 3.5)."""
    place = torch.arange(count, dtype=torch.float64)[:, None]
    angle = place / 10000 ** (2 * (torch.arange(width) // 2) / width)
    return torch.where(torch.arange(width) % 2 == 0, angle.sin(), angle.cos()).float()


def original_videomae(state, clips, *, heads):
    """Logits of clips (B, 3, T, H, W)."""
    width = state["patch_embed.proj.bias"].shape[0]
    x = conv3d(clips, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=CUBE)
    x = x.flatten(2).transpose(1, 2)
    x = x + positions(x.shape[1], width)

    def norm(x, name):
        return layer_norm(x, (width,), state[f"{name}.weight"], state[f"{name}.bias"], EPS)

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    number = 0
    while f"blocks.{number}.norm1.weight" in state:
        block = f"blocks.{number}"
        bias = torch.cat([state[f"{block}.attn.q_bias"], torch.zeros(width), state[f"{block}.attn.v_bias"]])
        qkv = norm(x, f"{block}.norm1") @ state[f"{block}.attn.qkv.weight"].T + bias
        q, k, v = qkv.reshape(*x.shape[:2], 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        seen = (q @ k.transpose(-1, -2) / (width // heads) ** 0.5).softmax(-1) @ v
        x = x + linear(seen.transpose(1, 2).flatten(2), f"{block}.attn.proj")
        x = x + linear(gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
        number += 1
    return linear(norm(x.mean(1), "fc_norm"), "head")
