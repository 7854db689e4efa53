"""Experts on disk and in memory: one unimodal network with its heads.

A directory holds `weights.safetensors` and `expert.json`: what it sees (views, flow, boxes), which clips it did
not train on, its class lists and the hash of its weights, closed by a seal over them all. Loading checks seal and
hash and runs no stored code.
"""

import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mmkd.cache_tools.cache.fingerprints import file_sha256
from mmkd.cache_tools.cache.sealed import SEAL, seal, unsealed
from mmkd.cache_tools.frames.records import Float32Array
from mmkd.cache_tools.views.drawing import ViewPolicy
from mmkd.cache_tools.views.look import LOOK_RULE, Look
from mmkd.data_manifests.atomic import write_atomically
from mmkd.data_manifests.errors import InputError, StorageError, VerificationError
from mmkd.data_manifests.kinds import it_is
from mmkd.data_manifests.leaks import TrainedOn
from mmkd.data_manifests.regular_file import read_regular
from mmkd.data_manifests.system_errors import MACHINE_FAULTS
from mmkd.data_manifests.typed_json import STRICT, typed
from mmkd.pipeline.experts.stlt import STLT
from mmkd.pipeline.experts.trained_on import load_trained_on
from mmkd.pipeline.recipe import ExpertRecipe, LayoutRecipe
from mmkd.student.network_table import Normalisation, before_it_was_stated
from mmkd.student.networks.networks import build_network
from mmkd.student.networks.own_networks import require_trust
from mmkd.student.training.devices import reproducible

SCHEMA = "mmkd-expert-2"
UNSEALED_SCHEMA = "mmkd-expert-1"
"""The form before the seal: read with a warning, and sealed by the next `teach` over it."""
CARD_FILE = "expert.json"
WEIGHTS_FILE = "weights.safetensors"

log = logging.getLogger("mmkd")


@dataclass(frozen=True)
class ExpertCard:
    """What expert.json says."""

    __pydantic_config__ = STRICT

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
    audio: dict[str, Any] | None = None
    """Everything that could change what it hears; None for other modalities."""
    normalisation: dict[str, list[float]] | None = None
    """`mean` and `std` of a video network's input; None in older cards (then Video Swin's numbers), and for
    boxes."""
    schema: str = SCHEMA
    """Version of this form."""

    def fingerprint_fields(self, boxes: dict[str, Any] | None) -> dict[str, Any]:
        """Return what the cache's node of this expert must cover, `boxes` being those that the build reads."""
        return {
            "modality": self.recipe["modality"],
            "network": self.recipe["train"]["network"],
            "flow_scale_px": self.recipe["train"]["flow_scale_px"],
            "layout": LayoutRecipe.model_validate(self.recipe["layout"]).identity(),
            "flow": self.flow,
            "boxes": boxes if self.boxes else None,
            "weights": self.weights_sha256,
            **({"audio": self.audio} if self.audio else {}),
            **self._look_fields(),
            **self._network_fields(),
        }

    @property
    def look(self) -> Look:
        """What it sees of each view."""
        return look_of(ExpertRecipe.model_validate(self.recipe))

    def _network_fields(self) -> dict[str, Any]:
        # As below: what every expert had before there was a choice is not named.
        options = self.recipe["train"].get("network_options")
        fields = {"network_options": options} if options else {}
        if (stem := self.recipe["train"].get("stem", "frames")) != "frames":
            fields["stem"] = stem
        usual = numbers_of(before_it_was_stated(self.recipe["modality"]))
        return fields | ({"normalisation": self.normalisation} if self.normalisation not in (None, usual) else {})

    def _look_fields(self) -> dict[str, Any]:
        # only what is not the canonical view's, so that older fingerprints stay as they are
        look = self.look
        fields: dict[str, Any] = {"look.size_px": look.size_px} if look.size_px else {}
        if look.frames:
            fields |= {"look.frames": look.frames, "look.rule": LOOK_RULE}
        return fields | ({"flow_stack": look.flow_stack} if look.flow_stack > 1 else {})


def look_of(recipe: ExpertRecipe) -> Look:
    """Return what an expert sees of each view."""
    return Look(recipe.look.frames, recipe.look.size_px, recipe.flow_stack)


REPAIR = "delete it and run the same `mmkd-cache teach` again (training goes on where it was), or `import-expert`"


@dataclass(frozen=True)
class Expert:
    """An expert in memory, ready to give logits."""

    card: ExpertCard
    """What it is."""
    network: nn.Module
    """In evaluation mode on its device."""
    device: torch.device
    """Where it runs."""
    trained_on: TrainedOn | None = None
    """Which clips it was trained on, where that is known."""

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


def make_network(
    recipe: ExpertRecipe,
    heads: Mapping[str, int],
    views: ViewPolicy | None = None,
    normalisation: Mapping[str, list[float]] | None = None,
) -> nn.Module:
    """Return the network of a recipe, freshly initialised (or from the weights file that it names).

    It sees `views` with the recipe's look (by default what it usually sees), normalised as the recipe says or,
    where given, with other numbers. Raises InputError where it cannot see them.
    """
    if recipe.modality == "boxes":
        return STLT(heads, **recipe.layout.model_dump())
    frames, size_px = (None, None) if views is None else seen_shape(recipe, views)
    return build_network(
        recipe.train,
        heads=heads,
        modality=recipe.modality,
        frames=frames,
        size_px=size_px,
        flow_stack=recipe.flow_stack,
        normalisation=None if normalisation is None else Normalisation(*map(tuple, _two(normalisation))),
    )


def seen_shape(recipe: ExpertRecipe, views: ViewPolicy) -> tuple[int, int]:
    """Return T and S of what an expert sees."""
    return recipe.look.frames or views.frames, recipe.look.size_px or views.size_px


def numbers_of(normalisation: Normalisation) -> dict[str, list[float]]:
    """Return a normalisation as a card states it."""
    return {"mean": list(normalisation.mean), "std": list(normalisation.std)}


def _two(numbers: Mapping[str, list[float]]) -> tuple[list[float], list[float]]:
    return numbers["mean"], numbers["std"]


def save_expert(directory: Path, card: ExpertCard, state: bytes) -> None:
    """Write weights first, then the card that makes them an expert; StorageError when the disk refuses."""
    write_atomically(directory / WEIGHTS_FILE, state)
    write_card(directory, card)


def write_card(directory: Path, card: ExpertCard) -> None:
    """Write expert.json with its seal, unless that is what is there; StorageError when the disk refuses."""
    path, data = directory / CARD_FILE, (json.dumps(seal(asdict(card)), indent=1) + "\n").encode()
    if not path.is_file() or path.read_bytes() != data:
        write_atomically(path, data)


def read_card(directory: Path) -> ExpertCard:
    """Read expert.json, with a warning where it has no seal yet.

    Raises InputError when the directory holds no expert, or one of another schema; VerificationError when the card
    is not what was written.
    """
    path = directory / CARD_FILE
    try:
        data = read_regular(path)
    except OSError as error:
        if error.errno in MACHINE_FAULTS:
            raise StorageError(f"cannot read {path}: {error.strerror}; fix that and run again") from error
        told = it_is(directory) or f": {path.name}: {error.strerror}"
        raise InputError(
            f"{directory} is not an expert{told}; `mmkd-cache teach NAME -o {directory}` trains one"
        ) from error
    value = _unsealed_card(data)
    if value is None:
        value = unsealed(data, str(path), advice=REPAIR)
        if value.get("schema") != SCHEMA:
            raise InputError(f"{path} has schema {value.get('schema')!r}; this version reads {SCHEMA!r}")
    else:
        log.warning(
            "%s has no seal, by which a later change to it would be noticed: an earlier version made it. The same "
            "`mmkd-cache teach` over it adds one",
            path,
        )
    try:
        card = typed(ExpertCard, {**value, "schema": SCHEMA})
        recipe = ExpertRecipe.model_validate(card.recipe).model_dump(mode="json")  # with fields newer than the file
    except ValueError as error:
        raise InputError(f"{path} does not describe an expert: {_short(error)}") from error
    if card.normalisation is None and card.recipe["modality"] != "boxes":  # all networks had the same numbers then
        card = replace(card, normalisation=numbers_of(before_it_was_stated(card.recipe["modality"])))
    return replace(card, recipe=recipe)


def _unsealed_card(data: bytes) -> dict[str, Any] | None:
    """Return the fields of a card from before the seal; None for anything else, whole or damaged."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    old = isinstance(value, dict) and value.get("schema") == UNSEALED_SCHEMA and SEAL not in value
    return value if old else None


def has_weights(directory: Path, card: ExpertCard) -> bool:
    """Return whether the weights that the card names are there, byte for byte."""
    weights = directory / WEIGHTS_FILE
    return weights.is_file() and file_sha256(weights) == card.weights_sha256


def load_expert(directory: Path, device: torch.device, trusted: Collection[str] = ()) -> Expert:
    """Load an expert; a network that is not mmkd's is run only when it is among the `trusted` ones.

    Raises as `read_card`, and VerificationError when its weights are not those that its card names.
    """
    card = read_card(directory)
    require_trust(card.recipe["train"]["network"], trusted, f"expert {directory}")
    weights = directory / WEIGHTS_FILE
    if not has_weights(directory, card):
        raise VerificationError(
            f"{weights} is missing or not the file that {CARD_FILE} describes: run the same `mmkd-cache teach` "
            "again, or `import-expert`, which makes it again"
        )
    try:
        recipe = ExpertRecipe.model_validate(card.recipe)
        # The file of initial weights may be gone; all weights come from the expert's own.
        recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"weights": None})})
        heads = {head: len(classes) for head, classes in card.heads.items()}
        network = make_network(recipe, heads, ViewPolicy.model_validate(card.views), card.normalisation)
        network.load_state_dict(load_file(weights))
    except (ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{directory}: {CARD_FILE} does not describe its weights: {_short(error)}") from error
    return Expert(card, network.to(device).eval(), device, load_trained_on(directory))


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
