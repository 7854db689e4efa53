"""The size of a boxes network, read from a checkpoint's own parameters: a user need not know it."""

from dataclasses import replace
from pathlib import Path

from torch import nn

from mmkd.data_manifests.counted import counted
from mmkd.data_manifests.errors import InputError
from mmkd.pipeline.experts.stlt import MAX_FRAMES
from mmkd.pipeline.recipe import ExpertRecipe, LayoutRecipe
from mmkd.student.key_maps.key_map import MappedWeights

POSITIONS = "position.weight"


def fitted(expert: ExpertRecipe, mapped: MappedWeights, path: Path) -> ExpertRecipe:
    """Return the recipe with the layout of the checkpoint: width and layers by its sizes, the rest by its map.

    The number of attention heads does not show in sizes, and is the recipe's. Raises InputError for sizes that no
    layout has.
    """
    found = mapped.backbone
    width = found["embedding.box.weight"].shape[0] if "embedding.box.weight" in found else expert.layout.hidden
    sizes = {
        "hidden": width,
        "spatial_layers": layers("spatial", mapped) or expert.layout.spatial_layers,
        "temporal_layers": layers("temporal", mapped) or expert.layout.temporal_layers,
        **mapped.map.layout,
    }
    try:
        layout = LayoutRecipe.model_validate({**expert.layout.model_dump(), **sizes})
    except ValueError as error:
        raise InputError(f"the weights {path} are not those of an STLT: its sizes would be {sizes}") from error
    return expert.model_copy(update={"layout": layout})


def layers(part: str, mapped: MappedWeights) -> int:
    """Return how many layers a part of the checkpoint has."""
    return len({name.split(".")[1] for name in mapped.backbone if name.startswith(f"{part}.")})


def all_positions(mapped: MappedWeights, frames: int, path: Path) -> MappedWeights:
    """Return the checkpoint with as many positions as our network has; those that no view reaches are zero.

    Raises InputError where the views have more frames than the checkpoint has positions.
    """
    table = mapped.backbone.get(POSITIONS)
    if table is None or table.ndim != 2:
        return mapped  # no STLT: what compares names and sizes says so
    if frames > len(table):
        known = counted(len(table), "frame")
        raise InputError(
            f"the weights {path} know the positions of {known}, and a view has {frames}: see views.frames"
        )
    padded = nn.functional.pad(table, (0, 0, 0, max(0, MAX_FRAMES - len(table))))[:MAX_FRAMES]
    return replace(mapped, backbone={**mapped.backbone, POSITIONS: padded})
