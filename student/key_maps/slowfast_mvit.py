"""MViT as SlowFast names it, to torchvision's; Li et al., "MViTv2" (CVPR 2022), and Fan et al., "MViT" (ICCV 2021).

torchvision keeps a pooling and its norm in one module, leaves out the class token's two dimensions of one, and
calls the change of width in a block `project`.
"""

from torch import Tensor

from mmkd.student.key_maps.key_map import KeyMap


def without_ones(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the state with its class token and positions (1, N, C) as torchvision has them: (C,) and (N, C)."""
    return {name: _squeezed(name, value) for name, value in state.items()}


def _squeezed(name: str, value: Tensor) -> Tensor:
    if not name.startswith("pos_encoding."):
        return value
    return value.flatten() if ".class_" in name else value.squeeze(0)


SLOWFAST_MVIT = KeyMap(
    name="slowfast-mvit",
    source="SlowFast's MViT",
    networks=("mvit_v2_s", "mvit_v1_b"),
    marks=(r"^patch_embed\.proj\.weight$", r"^cls_token$", r"^blocks\.0\.attn\.pool_k\.weight$"),
    renames=(
        (r"^patch_embed\.proj\.", "conv_proj."),
        (r"^cls_token$", "pos_encoding.class_token"),
        (r"^pos_embed_(spatial|temporal|class)$", r"pos_encoding.\1_pos"),
        (r"\.attn\.proj\.", ".attn.project.0."),
        (r"\.attn\.pool_(q|k|v)\.", r".attn.pool_\1.pool."),
        (r"\.attn\.norm_(q|k|v)\.", r".attn.pool_\1.norm_act.0."),
        (r"^(blocks\.\d+)\.proj\.", r"\1.project."),
        (r"\.mlp\.fc1\.", ".mlp.0."),
        (r"\.mlp\.fc2\.", ".mlp.3."),
    ),
    classifier=r"^head\.projection(_(?P<head>\w+))?\.(?P<part>weight|bias)$",
    convert=without_ones,
)
