"""Stage two: train the RGB student on cached targets, or the baseline on labels alone with everything else equal.

The data's way: cache -> mixed teacher -> target source; manifest + RGB videos + stored views -> canonical pixels;
both -> the loop. Nothing here can load flow, boxes or experts.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from mmkd.cache_tools.atomic import write_atomically
from mmkd.cache_tools.data import ClipSet
from mmkd.cache_tools.precision import kl_divergence
from mmkd.cache_tools.reader import CacheReader
from mmkd.cache_tools.records import Float32Array
from mmkd.data_manifests.errors import InputError
from mmkd.student.cached_targets import HeadWeights, choose_weights, mix_split
from mmkd.student.checkpoint import encode_network, latest_checkpoint
from mmkd.student.evaluation import SplitMetrics, evaluate_split, evaluation_splits
from mmkd.student.metrics import average_views
from mmkd.student.networks import build_network
from mmkd.student.predict import predict
from mmkd.student.run_data import SplitData, check_manifest, open_split
from mmkd.student.shared_targets import copies_folder, shared_targets
from mmkd.student.student_recipe import StudentRecipe
from mmkd.student.thumbprints import check_thumbprints
from mmkd.student.training import FitReport, fit

log = logging.getLogger("mmkd")
EVALUATION_BATCH = 32
MODEL_FILE = "model.safetensors"


@dataclass(frozen=True)
class Mode:
    """What kind of run this is."""

    labels_only: bool = False
    """The baseline: no teacher."""
    fresh_views: bool = False
    """Baseline only: a new view every epoch in place of the cached ones."""


def train_student(recipe: StudentRecipe, cache: Path, out: Path, *, mode: Mode, device: torch.device) -> FitReport:
    """Train into the directory `out` (or finish the run there), and evaluate on the cache's other splits.

    Student and baseline of one recipe have the same initial weights, clips, views, order and augmentation.
    Raises InputError for a cache of another manifest, VerificationError for damaged data or other pixels.
    """
    if mode.fresh_views and not mode.labels_only:
        raise InputError("--fresh-views needs --labels-only: cached targets belong to cached views")
    reader, clip_set = CacheReader(cache), ClipSet(recipe.data)
    check_manifest(reader, clip_set.manifest)
    copies = None if mode.labels_only else copies_folder(recipe.node_copies, cache)
    split = open_training(recipe, reader, clip_set, mode)
    for name in evaluation_splits(reader, recipe.train_split):
        open_split(reader, clip_set, name, memory_bytes=0)  # what cannot be evaluated shows now, not after training
    weights, warning = choose_weights(
        reader,
        recipe.teacher.weights,
        weights_temperature=recipe.teacher.weights_temperature,
        train_split=recipe.train_split,
    )
    if warning and not mode.labels_only:
        log.warning(warning)
    targets = None
    if copies:
        targets = shared_targets(
            reader,
            recipe.train_split,
            weights,
            missing=recipe.teacher.missing,
            rows=split.rows,
            directory=copies,
        )
        report_missing(targets.mask[split.rows], recipe)
    if latest_checkpoint(out) is None:  # else this run goes on under what was written then, or is refused
        write_run(out, recipe, reader, mode=mode, weights=None if mode.labels_only else weights)
    network = new_network(recipe, reader)
    report = fit(
        network,
        split.data,
        recipe.train,
        targets=targets,
        loss=recipe.resolved_loss(),
        run_dir=out,
        device=device,
        identity={
            "cache": reader.fingerprint,
            "weights": weights if targets else None,
            "missing": recipe.teacher.missing if targets else None,
        },
    )
    write_atomically(out / MODEL_FILE, encode_network(network))
    evaluate_run(recipe, cache, out, device=device)
    return report


def open_training(recipe: StudentRecipe, reader: CacheReader, clip_set: ClipSet, mode: Mode) -> SplitData:
    """Open the training clips and compare a sample of their pixels with the teacher's."""
    memory_bytes = int(recipe.train.decoded_clips_gib * 2**30)
    split = open_split(
        reader, clip_set, recipe.train_split, memory_bytes=memory_bytes, fresh_views=mode.fresh_views
    )
    if split.left_out:
        log.warning("%d of %d training clips are left out: unreadable", split.left_out, split.table.rows)
    if not mode.fresh_views:
        found = check_thumbprints(reader, split.table, split.data, rows=split.rows, sample=recipe.thumbprint_sample)
        if found.rounded:
            log.warning(
                "%d of %d sampled views differ from the teacher's pixels by rounding alone (another processor or "
                "library version); the student learns from nearly the same views",
                found.rounded,
                found.checked,
            )
    return split


def report_missing(valid: npt.NDArray[np.bool_], recipe: StudentRecipe) -> None:
    """Say how many views of usable clips have no teacher, and what becomes of them."""
    missing = int((~valid).sum())
    if missing:
        fate = "learn from their labels" if recipe.teacher.missing == "label-only" else "are left out"
        log.warning("%d of %d training views have no teacher and %s", missing, valid.size, fate)


def new_network(recipe: StudentRecipe, reader: CacheReader) -> nn.Module:
    """Return the RGB network, initialised from the seed alone (and from a weights file, if there is one)."""
    torch.manual_seed(recipe.train.seed)
    heads = {head.name: len(head.classes) for head in reader.heads}
    return build_network(recipe.train, heads=heads, modality="rgb")


def write_run(
    out: Path, recipe: StudentRecipe, reader: CacheReader, *, mode: Mode, weights: HeadWeights | None
) -> None:
    """Write what this run is, before its first step."""
    run = {
        "recipe": recipe.model_dump(mode="json"),
        "cache": reader.fingerprint,
        "heads": {head.name: list(head.classes) for head in reader.heads},
        "labels_only": mode.labels_only,
        "fresh_views": mode.fresh_views,
        "weights": weights,
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
    }
    write_atomically(out / "run.json", (json.dumps(run, indent=1) + "\n").encode())


def evaluate_run(recipe: StudentRecipe, cache: Path, run: Path, *, device: torch.device) -> SplitMetrics:
    """Evaluate a finished run on every evaluation split of the cache, and write evaluation.json."""
    reader, clip_set = CacheReader(cache), ClipSet(recipe.data)
    check_manifest(reader, clip_set.manifest)
    network = new_network(recipe, reader)
    load_model(network, run)
    metrics: SplitMetrics = {}
    for name in evaluation_splits(reader, recipe.train_split):
        metrics |= evaluate_on(network, reader, clip_set, name, recipe=recipe, device=device)
    value = {"cache": reader.fingerprint, "metrics": metrics}
    write_atomically(run / "evaluation.json", (json.dumps(value, indent=1) + "\n").encode())
    return metrics


def load_model(network: nn.Module, run: Path) -> None:
    """Load a finished run's weights; raise InputError when there are none or they do not fit."""
    path = run / MODEL_FILE
    if not path.is_file():
        raise InputError(f"{path} is missing: the run is not finished; run `mmkd-student train` again")
    try:
        network.load_state_dict(load_file(path))
    except (RuntimeError, SafetensorError) as error:
        raise InputError(f"{path} does not fit the recipe's network: {str(error).splitlines()[0]}") from error


def evaluate_on(
    network: nn.Module,
    reader: CacheReader,
    clip_set: ClipSet,
    name: str,
    *,
    recipe: StudentRecipe,
    device: torch.device,
) -> SplitMetrics:
    """Evaluate a network on one split, over its stored views; with its agreement with the teacher."""
    split = open_split(reader, clip_set, name, memory_bytes=0)
    found = predict(
        network,
        split.data,
        np.arange(len(split.rows)),
        np.arange(split.table.views),
        batch_size=EVALUATION_BATCH,
        device=device,
    )
    usable = np.zeros(split.table.rows, np.bool_)
    usable[split.rows] = True
    logits = {}
    for head, value in found.items():
        logits[head] = np.full((split.table.rows, *value.shape[1:]), np.nan, np.float32)
        logits[head][split.rows] = value
    clips = clip_set.manifest.split(name)
    metrics = evaluate_split(split.table, logits, usable, clips=clips)
    for head, found_agreement in agreement(reader, name, logits, usable, recipe=recipe).items():
        metrics[name][head] |= found_agreement
    return metrics


def agreement(
    reader: CacheReader,
    split: str,
    logits: Mapping[str, Float32Array],
    usable: npt.NDArray[np.bool_],
    *,
    recipe: StudentRecipe,
) -> dict[str, dict[str, float]]:
    """Return head -> agreement of a student's logits (rows, V, C) with the teacher's, over clips that both have."""
    weights, _ = choose_weights(
        reader,
        recipe.teacher.weights,
        weights_temperature=recipe.teacher.weights_temperature,
        train_split=recipe.train_split,
    )
    try:
        teacher = mix_split(reader, split, weights, recipe.teacher.missing)
    except InputError as error:  # a trained student is worth its metrics even where it has no teacher
        log.warning("agreement with the teacher is not known: %s", error)
        return {}
    both = usable & teacher.valid.all(axis=1)
    if not both.any():
        return {}
    result = {}
    for head, value in logits.items():
        ours, theirs = average_views(value[both]), average_views(teacher.logits[head][both])
        result[head] = {
            "teacher_agreement": float((ours.argmax(1) == theirs.argmax(1)).mean()),
            "teacher_kl": float(kl_divergence(theirs, ours).mean()),
        }
    return result
