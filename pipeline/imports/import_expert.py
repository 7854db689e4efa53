"""Making an expert of a checkpoint: read, renamed, its classes put in the manifest's order, written as if taught.

From top to bottom of this file. Nothing is written before all of it is known to fit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmkd.cache_tools.cache.fingerprints import file_sha256
from mmkd.cache_tools.frames.clip_set import ClipSet
from mmkd.data_manifests.counted import counted
from mmkd.data_manifests.errors import InputError
from mmkd.data_manifests.leaks import read_trained_on
from mmkd.data_manifests.manifest import Head
from mmkd.pipeline.experts.expert import make_network
from mmkd.pipeline.experts.teach import expert_identity
from mmkd.pipeline.imports.class_files import read_class_names
from mmkd.pipeline.imports.class_matching import match_classes
from mmkd.pipeline.imports.closest import closest_line
from mmkd.pipeline.imports.head_sources import HeadSource, class_files, head_sources
from mmkd.pipeline.imports.stlt_layout import all_positions, fitted
from mmkd.pipeline.imports.write_expert import card_fields, write_once
from mmkd.pipeline.recipe import ExpertRecipe, TeacherRecipe
from mmkd.student.checkpoints.checkpoint_file import read_checkpoint
from mmkd.student.checkpoints.containers import Weights
from mmkd.student.checkpoints.fit import fit_of
from mmkd.student.key_maps.key_map import Classifier, MappedWeights
from mmkd.student.key_maps.key_maps import AUTO, map_weights
from mmkd.student.networks.networks import CHANNELS
from mmkd.student.networks.own_networks import CLASSIFIER


@dataclass(frozen=True, kw_only=True)
class ImportRequest:
    """What is to be imported."""

    file: Path
    """The checkpoint."""
    classes: Sequence[str]
    """Class lists: FILE, or HEAD=FILE."""
    heads: Sequence[str] = ()
    """Classifiers of heads that the names do not tell: HEAD=NAME or HEAD=NAME[FIRST:LAST]."""
    key_map: str = AUTO
    """The key map, or `auto`."""
    weights_key: str | None = None
    """Which set of parameters of the file; None: the plain one."""
    licence: str | None = None
    """What the user says of the weights' licence."""
    trained_on: Path | None = None
    """Names the clips that the network was trained on: a manifest, a split file, or an id in each line."""


@dataclass(frozen=True)
class HeadReport:
    """What became of one head."""

    source: str
    """The classifier in the file."""
    rows: int
    """Classes that it has."""
    classes: int
    """Classes of the manifest's head, each of which is one of them."""


@dataclass(frozen=True, kw_only=True)
class ImportReport:
    """Every key of the checkpoint, and every class of the manifest, accounted for."""

    name: str
    """The expert's."""
    imported: Mapping[str, Any]
    """What the card says of the source."""
    used: int
    """Parameters and buffers of the file that the expert has, classifiers included."""
    left_over: tuple[str, ...]
    """Classifiers of the file that no head uses."""
    computed: tuple[str, ...]
    """Buffers of the network that the file lacks, which the network computes itself."""
    other_weights: tuple[str, ...]
    """Other sets of parameters in the file."""
    heads: Mapping[str, HeadReport]
    """Head -> what became of it."""
    written: bool
    """False for a dry run, and where the same expert was there already."""


def import_expert(recipe: TeacherRecipe, name: str, request: ImportRequest, out: Path | None) -> ImportReport:
    """Make the expert `name` of a checkpoint in the folder `out`, unless it is there; without one, report only.

    Raises InputError for whatever does not fit, naming the file, option, key or class; then nothing was written.
    """
    clip_set = ClipSet(recipe.data)
    weights = read_checkpoint(request.file, request.weights_key)
    mapped = map_weights(weights.state, request.file, request.key_map)
    expert = without_weights(recipe.experts[name])
    if expert.modality == "boxes":
        expert = fitted(expert, mapped, request.file)
        mapped = all_positions(mapped, recipe.views.frames, request.file)
    heads = clip_set.manifest.heads
    sources = head_sources(request.heads, [head.name for head in heads], list(mapped.classifiers))
    lists = class_files(request.classes, [head.name for head in heads])
    layers, reports = matched_heads(mapped, sources, heads, lists)
    network = make_network(expert, {head.name: len(head.classes) for head in heads}, recipe.views)
    computed = fill(network, expert, mapped, layers, request.file)
    imported = provenance(request, weights, mapped, lists)
    seen = expert_identity(recipe, expert, clip_set)
    seen["held_out"] = {**seen["held_out"], "fraction": 0.0}  # nobody here kept clips from it
    trained = None if request.trained_on is None else read_trained_on(request.trained_on)
    written = out is not None and write_once(out, network, card_fields(name, seen, imported), trained)
    left = sorted(set(mapped.classifiers) - {source.source for source in sources.values()})
    return ImportReport(
        name=name,
        imported=imported,
        used=len(mapped.names)
        - sum(f"{head}.{part}" in mapped.names for head in left for part in ("weight", "bias")),
        left_over=tuple(left),
        computed=computed,
        other_weights=weights.others,
        heads=reports,
        written=written,
    )


def without_weights(expert: ExpertRecipe) -> ExpertRecipe:
    """Return an expert's recipe that starts from no file: the imported weights are all of its own."""
    return expert.model_copy(update={"train": expert.train.model_copy(update={"weights": None})})


def matched_heads(
    mapped: MappedWeights, sources: Mapping[str, HeadSource], heads: Sequence[Head], files: Mapping[str, Path]
) -> tuple[dict[str, Classifier], dict[str, HeadReport]]:
    """Return each head's layer with its rows in the manifest's order, and what became of it."""
    layers, reports = {}, {}
    for head in heads:
        source = sources[head.name]
        layer = some_rows(mapped.classifiers[source.source], source, head.name)
        names = read_class_names(files[head.name])
        if len(names) != len(layer.weight):
            raise InputError(
                f"{files[head.name]} has {counted(len(names), 'class')}, but the classifier {source.source!r} of "
                f"the checkpoint has {counted(len(layer.weight), 'row')} for head {head.name!r}"
            )
        rows = match_classes(names, head, files[head.name])
        bias = torch.zeros(len(rows)) if layer.bias is None else layer.bias[rows]
        layers[head.name] = Classifier(layer.weight[rows], bias)
        reports[head.name] = HeadReport(source.source, len(names), len(rows))
    return layers, reports


def some_rows(layer: Classifier, source: HeadSource, head: str) -> Classifier:
    """Return the rows of a classifier that are one head's."""
    if source.rows is None:
        return layer
    first, last = source.rows
    if not first < last <= len(layer.weight):
        raise InputError(
            f"--head {head}={source.source}[{first}:{last}]: that classifier has rows 0 to {len(layer.weight)}"
        )
    return Classifier(layer.weight[first:last], None if layer.bias is None else layer.bias[first:last])


def fill(
    network: nn.Module, expert: ExpertRecipe, mapped: MappedWeights, layers: Mapping[str, Classifier], path: Path
) -> tuple[str, ...]:
    """Give the network the checkpoint's parameters; return the buffers that it computes itself.

    Raises InputError where any parameter is missing, unexpected, of another size or not finite.
    """
    state = dict(mapped.backbone)
    places = {own_name(name): name for name in network.state_dict()}
    for head, layer in layers.items():
        assert layer.bias is not None
        place = f"heads.{head}"
        if f"{place}.weight" not in places and len(layers) == 1 and f"{CLASSIFIER}.weight" in places:
            place = CLASSIFIER  # a network of somebody's that gives logits itself
        state |= {f"{place}.weight": layer.weight, f"{place}.bias": layer.bias}
    fit = fit_of(state, {own: network.state_dict()[name] for own, name in places.items()})
    if fit.problems:
        called = "STLT" if expert.modality == "boxes" else expert.train.network
        raise InputError(
            f"the weights {path} are not those of {called}: {fit.problems}{closest(mapped.backbone, expert)}"
        )
    if bad := next((name for name, value in state.items() if not finite(value)), None):
        raise InputError(f"the weights {path} are not finite numbers: {mapped.names.get(bad, bad)}")
    # Not strict: what the network computes may be absent.
    network.load_state_dict({places[own]: value for own, value in state.items()}, strict=False)
    return fit.computed


def own_name(name: str) -> str:
    """Return a parameter's name in its backbone, or below `heads`, from that in an expert's network."""
    while name.startswith("network."):  # twice, where a network gives logits itself
        name = name.removeprefix("network.")
    return name.removeprefix("backbone.")


def closest(state: dict[str, Tensor], expert: ExpertRecipe) -> str:
    """Return the end of an error about a checkpoint of another network; there is one for boxes alone."""
    if expert.modality == "boxes":
        return ""
    return f"; {closest_line(state, expert.train.network, CHANNELS[expert.modality])}"


def finite(value: Tensor) -> bool:
    """Return whether a parameter has only numbers that a network can compute with, and takes as float32."""
    return not value.is_floating_point() or bool(torch.isfinite(value.float()).all())


def provenance(
    request: ImportRequest, weights: Weights, mapped: MappedWeights, lists: Mapping[str, Path]
) -> dict[str, Any]:
    """Return what the card says of the source: by content, with the file's name for people."""
    return {
        "file": request.file.name,
        "sha256": file_sha256(request.file),
        "key": weights.key,
        "map": mapped.map.name,
        "classes": {head: file_sha256(path) for head, path in lists.items()},
        "licence": request.licence,
    }
