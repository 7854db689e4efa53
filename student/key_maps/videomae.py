"""VideoMAE as its authors name it, to transformers' `VideoMAEForVideoClassification`.

Tong et al., "VideoMAE" (NeurIPS 2022), and Wang et al., "VideoMAE V2" (CVPR 2023): finetuned ViTs, as `module`,
`model` or `state_dict` of their checkpoints. Query, key and value are one layer there and three here, of which the
key has no bias; positions are computed. transformers has the names `query.bias` and `value.bias` since its version
5. The norm's epsilon is 1e-6 there, and 1e-12 and 1e-5 (`fc_norm`) here unless the network is told.
"""

import re

from torch import Tensor

from mmkd.student.key_maps.key_map import KeyMap

QKV = re.compile(r"(?P<before>.*\.attention\.attention\.)qkv\.weight")
PARTS = ("query", "key", "value")


def split_qkv(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the state with each (3 C, C) weight of query, key and value as three of (C, C)."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        match = QKV.fullmatch(name)
        if match is None or value.ndim != 2 or len(value) % 3:
            found[name] = value
        else:
            found |= {
                f"{match['before']}{part}.weight": own for part, own in zip(PARTS, value.chunk(3), strict=True)
            }
    return found


VIDEOMAE = KeyMap(
    name="videomae",
    source="VideoMAE and VideoMAE V2",
    marks=(r"^patch_embed\.proj\.weight$", r"^blocks\.0\.attn\.q_bias$", r"^blocks\.0\.attn\.qkv\.weight$"),
    renames=(
        (r"^patch_embed\.proj\.", "videomae.embeddings.patch_embeddings.projection."),
        (r"^norm\.", "videomae.layernorm."),
        (r"^blocks\.(\d+)\.", r"videomae.encoder.layer.\1."),
        (r"\.norm1\.", ".layernorm_before."),
        (r"\.norm2\.", ".layernorm_after."),
        (r"\.attn\.proj\.", ".attention.output.dense."),
        (r"\.attn\.q_bias$", ".attention.attention.query.bias"),
        (r"\.attn\.v_bias$", ".attention.attention.value.bias"),
        (r"\.attn\.qkv\.", ".attention.attention.qkv."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
    ),
    classifier=r"^head\.(?P<part>weight|bias)$",
    convert=split_qkv,
)
