"""Experts on disk and in memory: one unimodal network with its heads.

A directory holds `weights.safetensors` and `expert.json`: what it sees (views, flow, boxes), which clips it did
not train on, its class lists and the hash of its weights. Loading checks that hash and runs no stored code.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mmkd.cache_tools.fingerprints import file_sha256
from mmkd.cache_tools.records import Float32Array
from mmkd.data_manifests.atomic import write_atomically
from mmkd.data_manifests.errors import InputError, VerificationError
from mmkd.pipeline.recipe import ExpertRecipe
from mmkd.pipeline.stlt import STLT
from mmkd.student.devices import reproducible
from mmkd.student.networks import build_network

SCHEMA = "mmkd-expert-1"


@dataclass(frozen=True)
class ExpertCard:
    """What expert.json says."""

    name: str
    """Name of the expert; an identifier."""
    recipe: dict[str, Any]
    """The resolved `ExpertRecipe`."""
    heads: dict[str, list[str]]
    """Head -> ordered class list."""
    manifest: str
    """Fingerprint of the manifest it was trained on."""
    views: dict[str, Any]
    """The resolved `ViewPolicy`."""
    flow: dict[str, Any] | None
    """Everything that could change a flow value; None for other modalities."""
    boxes: dict[str, Any] | None
    """Hash of the annotations and number of boxes kept; None for other modalities."""
    held_out: dict[str, Any]
    """Fraction and seed of the training clips it did not see."""
    weights_sha256: str
    """Hash of weights.safetensors."""
    training: dict[str, Any]
    """What training reported: steps, clips, skipped clips, accuracy on the held-out part."""
    schema: str = SCHEMA
    """Version of this form."""

    def fingerprint_fields(self, boxes: dict[str, Any] | None) -> dict[str, Any]:
        """Return what the cache's node of this expert must cover, `boxes` being those that the build reads."""
        return {
            "modality": self.recipe["modality"],
            "network": self.recipe["train"]["network"],
            "flow_scale_px": self.recipe["train"]["flow_scale_px"],
            "layout": self.recipe["layout"],
            "flow": self.flow,
            "boxes": boxes if self.boxes else None,
            "weights": self.weights_sha256,
        }


@dataclass(frozen=True)
class Expert:
    """An expert in memory, ready to give logits."""

    card: ExpertCard
    """What it is."""
    network: nn.Module
    """In evaluation mode on its device."""
    device: torch.device
    """Where it runs."""

    @property
    def name(self) -> str:
        """Name of the expert."""
        return self.card.name

    @property
    def modality(self) -> str:
        """rgb, flow or boxes."""
        return str(self.card.recipe["modality"])

    def logits(self, inputs: Mapping[str, Tensor]) -> dict[str, Float32Array]:
        """Return head -> float32 (B, classes) for a batch of inputs on the CPU."""
        with torch.inference_mode(), reproducible(self.device):
            outputs = self.network({name: value.to(self.device) for name, value in inputs.items()})
        return {head: value.float().cpu().numpy() for head, value in outputs.items()}


def make_network(recipe: ExpertRecipe, heads: Mapping[str, int]) -> nn.Module:
    """Return the network of a recipe, freshly initialised (or from the weights file that it names)."""
    if recipe.modality == "boxes":
        return STLT(heads, **recipe.layout.model_dump())
    return build_network(recipe.train, heads=heads, modality=recipe.modality)


def save_expert(directory: Path, card: ExpertCard, state: bytes) -> None:
    """Write an expert: weights first, then the card that makes them an expert."""
    write_atomically(directory / "weights.safetensors", state)
    write_atomically(directory / "expert.json", (json.dumps(asdict(card), indent=1) + "\n").encode())


def read_card(directory: Path) -> ExpertCard:
    """Read expert.json; raise InputError when the directory holds no expert."""
    path = directory / "expert.json"
    try:
        value = json.loads(path.read_bytes())
        card = ExpertCard(**value)
    except FileNotFoundError:
        raise InputError(f"{directory} holds no expert; train one with `mmkd-cache teach`") from None
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is not an expert of schema {SCHEMA!r}: {error}") from error
    if card.schema != SCHEMA:
        raise InputError(f"{path} has schema {card.schema!r}; this version reads {SCHEMA!r}")
    return card


def load_expert(directory: Path, device: torch.device) -> Expert:
    """Load an expert; raise VerificationError when its weights are not those that its card names."""
    card = read_card(directory)
    weights = directory / "weights.safetensors"
    if not weights.is_file() or file_sha256(weights) != card.weights_sha256:
        raise VerificationError(f"{weights} is missing or not the file that expert.json describes; train it again")
    try:
        recipe = ExpertRecipe.model_validate(card.recipe)
        recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"weights": None})})
        network = make_network(recipe, {head: len(classes) for head, classes in card.heads.items()})
        network.load_state_dict(load_file(weights))
    except (ValueError, AttributeError, TypeError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{directory}: expert.json does not describe its weights: {reason}") from error
    return Expert(card, network.to(device).eval(), device)
