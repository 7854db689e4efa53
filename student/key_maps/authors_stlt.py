"""STLT as the authors of multimodal distillation name it, to ours (Radevski et al., 2021 and 2023).

Their categories are none, object, hand; ours none, hand, object. Their embeddings' layer norms have an epsilon of
0.1, and they always have tables of a hand's side and contact state, which Something-Something leaves unknown.
"""

from torch import Tensor

from mmkd.student.key_maps.key_map import KeyMap

CATEGORIES = (0, 2, 1)
"""Their number of each of our categories."""
LAYOUT = {"norm_eps": 0.1, "sides": True, "states": True}
"""What such a network is beside its parameters: fields of the layout's recipe."""
EMBEDDINGS = "temporal_transformer.layout_embedding.category_box_embeddings."


def by_our_numbers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the state with categories in our order and class tokens (hidden,)."""
    changed = dict(state)
    if (table := state.get("embedding.category.weight")) is not None and len(table) == len(CATEGORIES):
        changed["embedding.category.weight"] = table[list(CATEGORIES)]
    for name in ("spatial_cls", "temporal_cls"):
        if name in state:
            changed[name] = state[name].flatten()
    return changed


AUTHORS_STLT = KeyMap(
    name="stlt",
    source="the authors' STLT",
    marks=(r"^temporal_transformer\.layout_embedding\.category_box_embeddings\.box_embedding\.weight$",),
    renames=(
        (rf"^{EMBEDDINGS}(category|side|state)_embeddings?\.", r"embedding.\1."),
        (rf"^{EMBEDDINGS}(box|score)_embedding\.", r"embedding.\1."),
        (rf"^{EMBEDDINGS}layer_norm\.", "embedding.norm."),
        (r"^temporal_transformer\.layout_embedding\.transformer\.layers\.", "spatial."),
        (r"^temporal_transformer\.layout_embedding\.cls_token$", "spatial_cls"),
        (r"^temporal_transformer\.transformer\.layers\.", "temporal."),
        (r"^temporal_transformer\.cls_token$", "temporal_cls"),
        (r"^temporal_transformer\.position_embeddings\.", "position."),
        (r"^temporal_transformer\.layer_norm\.", "norm."),
    ),
    classifier=r"^classifiers\.(?P<head>\w+)\.(?P<part>weight|bias)$",
    convert=by_our_numbers,
    layout=LAYOUT,
)
