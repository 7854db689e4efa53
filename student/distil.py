"""Stage two: train the RGB student on cached targets, or the baseline on labels alone with everything else equal.

The data's way: cache -> mixed teacher -> target source; manifest + RGB videos + stored views -> canonical pixels;
both -> the loop. Nothing here can load flow, boxes or experts.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from mmkd.cache_tools.data import ClipSet
from mmkd.cache_tools.mixing import HeadMixtures, Missing
from mmkd.cache_tools.precision import kl_divergence
from mmkd.cache_tools.reader import CacheReader
from mmkd.cache_tools.records import Float32Array
from mmkd.data_manifests.atomic import write_atomically
from mmkd.data_manifests.errors import FingerprintError, InputError
from mmkd.student.cached_targets import choose_weights, mix_split
from mmkd.student.checkpoint import encode_network, latest_checkpoint
from mmkd.student.evaluation import (
    SplitMetrics,
    SplitScores,
    evaluation_splits,
    left_out_splits,
    refuse_nothing,
    score_split,
)
from mmkd.student.evaluation_file import write_evaluation
from mmkd.student.metrics import average_views
from mmkd.student.networks import build_network
from mmkd.student.predict import predict
from mmkd.student.run_data import SplitData, check_manifest, open_split
from mmkd.student.run_files import RUN_FILE, evaluation_path, read_run, run_mixtures
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


def train_student(
    recipe: StudentRecipe, cache: Path | str, out: Path, *, mode: Mode, device: torch.device
) -> FitReport:
    """Train into the directory `out` (or finish the run there), and evaluate on the cache's other splits.

    Student and baseline of one recipe have the same initial weights, clips, views, order and augmentation.
    Raises InputError for a cache of another manifest, VerificationError for damaged data or other pixels.
    """
    if mode.fresh_views and not mode.labels_only:
        raise InputError("--fresh-views needs --labels-only: cached targets belong to cached views")
    reader, clip_set = CacheReader(cache), ClipSet(recipe.data)
    check_manifest(reader, clip_set.manifest)
    copies = None if mode.labels_only else copies_folder(recipe.node_copies, cache)
    mixtures, warning = chosen_mixtures(recipe, reader)
    if warning and not mode.labels_only:
        log.warning(warning)
    split = open_training(recipe, reader, clip_set, mode)
    for name in evaluation_splits(reader, clip_set.manifest, recipe.train_split):
        open_split(reader, clip_set, name, memory_bytes=0)  # what cannot be evaluated shows now, not after training
    targets = None
    if copies:
        targets = shared_targets(
            reader,
            recipe.train_split,
            mixtures,
            missing=recipe.teacher.missing,
            rows=split.rows,
            directory=copies,
        )
        report_missing(targets.mask[split.rows], recipe)
    if latest_checkpoint(out) is None:  # else this run goes on under what was written then, or is refused
        write_run(out, recipe, reader, mode=mode, mixtures=None if mode.labels_only else mixtures)
    network = new_network(recipe, reader)
    report = fit(
        network,
        split.data,
        recipe.train,
        targets=targets,
        loss=recipe.loss_options(),
        run_dir=out,
        device=device,
        identity={
            "cache": reader.fingerprint,
            "weights": mixtures_json(mixtures) if targets else None,
            "missing": recipe.teacher.missing if targets else None,
        },
    )
    write_atomically(out / MODEL_FILE, encode_network(network))
    evaluate_run(recipe, cache, out, device=device, may_be_empty=True)
    return report


def open_training(recipe: StudentRecipe, reader: CacheReader, clip_set: ClipSet, mode: Mode) -> SplitData:
    """Open the training clips and compare a sample of their pixels with the teacher's."""
    memory_bytes = int(recipe.train.decoded_clips_gib * 2**30)
    split = open_split(
        reader, clip_set, recipe.train_split, memory_bytes=memory_bytes, fresh_views=mode.fresh_views
    )
    clips = len(split.rows) + split.left_out
    if clips < split.table.rows:
        log.info("training on %d of the cache's %d training clips: those of the manifest", clips, split.table.rows)
    if split.left_out:
        log.warning("%d of %d training clips are left out: unreadable", split.left_out, clips)
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


def chosen_mixtures(recipe: StudentRecipe, reader: CacheReader) -> tuple[HeadMixtures, str | None]:
    """Return the recipe's mixture of each head, and a warning or None."""
    return choose_weights(
        reader,
        recipe.teacher.weights,
        weights_temperature=recipe.teacher.weights_temperature,
        train_split=recipe.train_split,
    )


def mixtures_json(mixtures: HeadMixtures) -> dict[str, Any]:
    """Return the mixtures for run.json and for the run's identity: their values, wherever they come from."""
    return {head: mixture.to_json() for head, mixture in mixtures.items()}


def write_run(
    out: Path, recipe: StudentRecipe, reader: CacheReader, *, mode: Mode, mixtures: HeadMixtures | None
) -> None:
    """Write what this run is, before its first step."""
    run = {
        "recipe": recipe.model_dump(mode="json"),
        "cache": reader.fingerprint,
        "heads": {head.name: list(head.classes) for head in reader.heads},
        "labels_only": mode.labels_only,
        "fresh_views": mode.fresh_views,
        "weights": None if mixtures is None else mixtures_json(mixtures),
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
    }
    write_atomically(out / RUN_FILE, (json.dumps(run, indent=1) + "\n").encode())


def evaluate_run(
    recipe: StudentRecipe, cache: Path | str, run: Path, *, device: torch.device, may_be_empty: bool = False
) -> SplitMetrics:
    """Evaluate a finished run on every evaluation split of a cache, and write `evaluation_path`.

    Raises InputError for a cache or a manifest without such a split, unless it `may_be_empty`.
    """
    reader, clip_set = CacheReader(cache), ClipSet(recipe.data)
    check_manifest(reader, clip_set.manifest)
    stored = read_run(run)
    if stored["heads"] != {head.name: list(head.classes) for head in reader.heads}:
        raise InputError(f"{run} was trained for other classes than the cache's (names or order differ)")
    names = evaluation_splits(reader, clip_set.manifest, recipe.train_split)
    if not may_be_empty:
        refuse_nothing(reader, clip_set.manifest, names, recipe.train_split)
    for line in left_out_splits(reader, clip_set.manifest, recipe.train_split):
        log.warning(line)
    network = new_network(recipe, reader)
    load_model(network, run)
    mixtures = teacher_of_run(recipe, reader, run)
    scores, metrics = [], SplitMetrics()
    for name in names:
        found = evaluate_on(network, reader, clip_set, name, recipe=recipe, mixtures=mixtures, device=device)
        scores.append(found[0])
        metrics |= found[1]
    path = evaluation_path(run, reader.fingerprint, own=stored["cache"] == reader.fingerprint)
    write_evaluation(path, reader.fingerprint, metrics, scores)
    return metrics


def teacher_of_run(recipe: StudentRecipe, reader: CacheReader, run: Path) -> HeadMixtures | None:
    """Return what the run learned from, or for a baseline what its recipe says; None where the cache lacks it.

    That is said: a trained student is worth its metrics even where it has no teacher.
    """
    mixtures = run_mixtures(run)
    warning = None
    try:
        if mixtures is None:
            mixtures, warning = chosen_mixtures(recipe, reader)
    except (InputError, FingerprintError) as error:  # other experts, or a weights file that is not there any more
        log.warning("agreement with the teacher is left out: %s", error)
        return None
    absent = {expert for mixture in mixtures.values() for expert in mixture.weights} - set(reader.experts)
    if absent:
        log.warning("agreement with the teacher is left out: the cache lacks %s", ", ".join(sorted(absent)))
        return None
    if warning:
        log.warning("agreement with the teacher: %s", warning)
    return mixtures


def load_model(network: nn.Module, run: Path) -> None:
    """Load a finished run's weights; raise InputError when there are none or they do not fit."""
    path = run / MODEL_FILE
    if not path.is_file():
        raise InputError(f"{path} is missing: the run is not finished; run `mmkd-student train` again")
    try:
        network.load_state_dict(load_file(path))
    except SafetensorError as error:
        raise InputError(f"{path} is damaged ({error}); run `mmkd-student train` again") from error
    except RuntimeError as error:
        raise InputError(
            f"{path} does not fit the recipe's network; give the recipe that the run was trained with (-c)"
        ) from error


def evaluate_on(
    network: nn.Module,
    reader: CacheReader,
    clip_set: ClipSet,
    name: str,
    *,
    recipe: StudentRecipe,
    mixtures: HeadMixtures | None,
    device: torch.device,
) -> tuple[SplitScores, SplitMetrics]:
    """Evaluate a network on one split, over its stored views; with its agreement with a teacher, if given."""
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
    scores = score_split(split.table, logits, usable)
    metrics = scores.metrics(clip_set.manifest.split(name))
    if mixtures is not None:
        missing = recipe.teacher.missing
        for head, found_agreement in agreement(
            reader, name, logits, usable, mixtures=mixtures, missing=missing
        ).items():
            metrics[name][head] |= found_agreement
    return scores, metrics


def agreement(
    reader: CacheReader,
    split: str,
    logits: Mapping[str, Float32Array],
    usable: npt.NDArray[np.bool_],
    *,
    mixtures: HeadMixtures,
    missing: Missing,
) -> dict[str, dict[str, float]]:
    """Return head -> agreement of a student's logits (rows, V, C) with the teacher's, over clips that both have."""
    try:
        teacher = mix_split(reader, split, mixtures, missing)
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
