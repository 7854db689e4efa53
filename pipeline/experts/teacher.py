"""The teacher: experts that may be mixed, because they saw the same classes, views and data."""

from collections.abc import Collection, Sequence
from pathlib import Path

import torch

from mmkd.cache_tools.cache.fingerprints import differences
from mmkd.data_manifests.errors import InputError
from mmkd.data_manifests.manifest import Manifest
from mmkd.pipeline.experts.expert import Expert, ExpertCard, load_expert
from mmkd.pipeline.flow.clip_flow import flow_identity, stated_flow
from mmkd.pipeline.inputs.boxes import boxes_form
from mmkd.pipeline.inputs.modalities import audio_identity
from mmkd.pipeline.recipe import TeacherRecipe


def load_teacher(
    directories: Sequence[Path], device: torch.device, trusted: Collection[str] = ()
) -> tuple[Expert, ...]:
    """Load the experts; raise InputError when two share a name. `trusted` are networks that are not mmkd's."""
    experts = tuple(load_expert(directory, device, trusted) for directory in directories)
    names = [expert.name for expert in experts]
    if len(set(names)) != len(names):
        raise InputError(f"two experts have the same name: {', '.join(sorted(names))}; give each its own")
    return experts


def check_teacher(cards: Sequence[ExpertCard], manifest: Manifest, recipe: TeacherRecipe) -> None:
    """Raise InputError unless every expert knows the manifest's classes and sees what the recipe describes."""
    if not cards:
        raise InputError("a teacher needs at least one expert; give --expert DIR, made by `mmkd-cache teach`")
    heads = {head.name: list(head.classes) for head in manifest.heads}
    for card in cards:
        if card.heads != heads:
            raise InputError(
                f"expert {card.name!r} was trained for other classes than the manifest's (names or order differ)"
            )
        expected = {
            "views": recipe.views.identity(),
            "flow": stated_flow(flow_identity(recipe.flow)) if card.flow else None,
            "boxes": boxes_form(recipe.boxes) if card.boxes else None,
            "audio": audio_identity(recipe) if card.audio else None,
        }
        boxes = {key: value for key, value in card.boxes.items() if key != "sha256"} if card.boxes else None
        flow = stated_flow(card.flow) if card.flow else None
        changed = list(
            differences({"views": card.views, "flow": flow, "boxes": boxes, "audio": card.audio}, expected)
        )
        if changed:
            lines = "; ".join(line.replace("cache", "expert") for line in changed)
            raise InputError(
                f"expert {card.name!r} was trained on something else than this recipe gives: {lines}. "
                f"Use the recipe that it was trained with{_enlarge_advice(changed)}, or train it again"
            )


def _enlarge_advice(changed: Sequence[str]) -> str:
    """Return what to type where an expert is from before `flow.enlarge` could be stated."""
    if any(line.startswith("flow.recipe.enlarge: cache true") for line in changed):
        return " (--set flow.enlarge=true: before that value existed, small frames were always enlarged)"
    return ""
