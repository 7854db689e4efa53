"""Evaluating a finished run: its student on a cache's evaluation splits, and how far it agrees with its teacher."""

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from mmkd.cache_tools.cache.fingerprints import differences
from mmkd.cache_tools.cache.reader import CacheReader
from mmkd.cache_tools.cache.softmax import kl_divergence
from mmkd.cache_tools.frames.clip_set import ClipSet
from mmkd.cache_tools.frames.records import Float32Array
from mmkd.cache_tools.views.drawing import ViewPolicy
from mmkd.data_manifests.atomic import write_atomically
from mmkd.data_manifests.errors import FingerprintError, InputError, VerificationError
from mmkd.student.data.evaluation_views import EvaluationLook
from mmkd.student.data.reading import Reading
from mmkd.student.data.split_data import SplitData
from mmkd.student.data.splits import CachedSplits, ManifestSplits, Splits, check_views
from mmkd.student.evaluation.evaluate import (
    Averaged,
    SplitMetrics,
    SplitScores,
    evaluation_splits,
    left_out_splits,
    refuse_nothing,
    score_split,
)
from mmkd.student.evaluation.evaluation_file import write_evaluation
from mmkd.student.evaluation.metrics import average_views
from mmkd.student.evaluation.per_class import per_class_csv
from mmkd.student.evaluation.run_files import (
    MODEL_FILE,
    RunRecord,
    StudentInput,
    evaluation_path,
    read_run,
    run_mixtures,
)
from mmkd.student.evaluation.submission import check_epic_heads, submission, write_submission
from mmkd.student.evaluation.trained import model_state, student_input, without_weights
from mmkd.student.network_table import Normalisation, before_it_was_stated
from mmkd.student.networks.networks import VideoClassifier, build_network
from mmkd.student.networks.own_networks import require_trust
from mmkd.student.recipes.student import Missing, StudentRecipe
from mmkd.student.recipes.train import TrainRecipe
from mmkd.student.teacher.cached_teacher import choose_mixtures, mix_split
from mmkd.student.teacher.mixing import HeadMixtures
from mmkd.student.training.predict import predict
from mmkd.student.training.ranks import ALONE, Ranks

log = logging.getLogger("mmkd")
EVALUATION_BATCH = 32


def evaluate_run(
    recipe: StudentRecipe,
    cache: Path | str | None,
    run: Path,
    *,
    device: torch.device,
    may_be_empty: bool = False,
    per_class: Path | None = None,
    trusted: Collection[str] = (),
    look: EvaluationLook | None = None,
    network: VideoClassifier | None = None,
    ranks: Ranks = ALONE,
) -> SplitMetrics:
    """Evaluate a finished run on every evaluation split of a cache, and write `evaluation_path`.

    Without a cache the splits are those of the manifest in which some clip has a label, seen under the evaluation
    views of the run's student. A `look` asks for other evaluation views than the cache or the run has: each clip
    counts by the mean of its logits over them, and the file has a name of its own. The network is read from the
    run's folder unless it is at hand. Several processes share the views, the first writes.

    With `per_class` a CSV file of how each class fared is written, too. The file that its network started from, and
    the experts that it learned from, need not be there any more.
    Raises InputError for a cache or a manifest without such a split, unless it `may_be_empty`.
    """
    splits = splits_of_run(recipe, cache, run, look)
    manifest = splits.clip_set.manifest
    record = same_classes(run, splits)
    names = evaluation_splits(splits.names, manifest, recipe.train_split)
    if not may_be_empty:
        refuse_nothing(splits.names, manifest, names, recipe.train_split)
    for line in left_out_splits(splits.names, manifest, recipe.train_split):
        log.warning(line)
    if record.input and (lines := other_views(record.input.views, splits.policy, look)):
        lines = [line.replace(": cache ", ": run ").replace(", now ", ", cache ") for line in lines]
        log.warning("the student learned from other views than this cache's: %s", "; ".join(lines))
    if network is None:
        network = finished_network(recipe, splits, run, record, trusted)
    mixtures = teacher_of_run(recipe, splits.reader, run)
    scores, metrics = [], SplitMetrics()
    for name in names:
        found = evaluate_on(network, splits, name, recipe=recipe, mixtures=mixtures, device=device, ranks=ranks)
        scores.append(found[0])
        metrics |= found[1]
    if not ranks.is_first:
        return metrics
    path = evaluation_path(run, splits.fingerprint, own=record.cache == splits.fingerprint)
    write_evaluation(path, splits.fingerprint, metrics, scores)
    if per_class is not None:
        write_atomically(per_class, per_class_csv(scores, manifest).encode())
    return metrics


def other_views(learned: Mapping[str, Any], policy: ViewPolicy, look: EvaluationLook | None) -> list[str]:
    """Return how views differ from those that a student learned from, but for what a `look` asks for."""
    if look is not None:
        learned = look.of(ViewPolicy.model_validate(learned)).identity()
    return list(differences(learned, policy.identity()))


def splits_of_run(
    recipe: StudentRecipe, cache: Path | str | None, run: Path, look: EvaluationLook | None = None
) -> Splits:
    """Return the clips to evaluate a run on: a cache's, or those of the manifest as the run's student sees them.

    With a `look` both are seen under its views. Raises InputError for a recipe that asks for other views than the
    student's: a student sees its own.
    """
    if cache is not None:
        return CachedSplits(CacheReader(cache), ClipSet(recipe.data), look)
    policy = ViewPolicy.model_validate(student_input(run, read_run(run)).views)
    check_views(recipe, policy, of="the run")
    policy = policy if look is None else look.of(policy)
    return ManifestSplits(ClipSet(recipe.data), policy, train_split=recipe.train_split)


def submit_run(
    recipe: StudentRecipe,
    cache: Path | str,
    run: Path,
    *,
    split: str,
    out: Path,
    levels: tuple[int, int, int],
    device: torch.device,
    trusted: Collection[str] = (),
) -> tuple[int, int]:
    """Write the EPIC-KITCHENS-100 submission of a finished run for one split of a cache.

    `levels` are those of `mmkd.student.evaluation.submission.submission`. Returns how many clips it holds, and how
    many of them have equal scores because they could not be read. Raises InputError for other heads than EPIC's.
    """
    splits = CachedSplits(reader := CacheReader(cache), clip_set := ClipSet(recipe.data))
    check_epic_heads(reader.heads)
    if split not in reader.layouts or split not in clip_set.manifest.splits:
        raise InputError(
            f"the cache and the manifest have no split {split!r} in common; the cache has "
            f"{', '.join(reader.layouts)}. `mmkd-cache build --set build.splits=[{split}]` caches another"
        )
    record = same_classes(run, splits)
    network = finished_network(recipe, splits, run, record, trusted)
    found = predict_split(network, splits, split, recipe=recipe, device=device)
    averaged = {head: average_views(value) for head, value in found.logits.items()}
    write_submission(out, submission(found.split.table.clip_ids, averaged, levels))
    return len(found.usable), int((~found.usable).sum())


def same_classes(run: Path, splits: Splits) -> RunRecord:
    """Return a run's record; InputError when it was trained for other classes than the cache's or manifest's."""
    record = read_run(run)
    if record.heads != {head.name: list(head.classes) for head in splits.heads}:
        whose = "cache" if splits.reader else "manifest"
        raise InputError(f"{run} was trained for other classes than the {whose}'s (names or order differ)")
    return record


def finished_network(
    recipe: StudentRecipe, splits: Splits, run: Path, record: RunRecord, trusted: Collection[str]
) -> VideoClassifier:
    """Return a finished run's network with its weights; raises as `load_model`, and for code that is not
    `trusted`."""
    require_trust(recipe.train.network, trusted, f"run {run}")
    refuse_another_look(recipe.train, record, run)
    network = new_network(without_weights(recipe.train), splits, record.input)
    if record.input is None:
        network.set_normalisation(before_it_was_stated("rgb"))
    load_model(network, run, record)
    return network


def refuse_another_look(train: TrainRecipe, record: RunRecord, run: Path) -> None:
    """Raise InputError for a recipe whose network would see other parts of a view than the run's student."""
    own = TrainRecipe.model_validate(record.recipe["train"])
    for name in ("input", "stem"):
        if getattr(train, name) != getattr(own, name):
            raise InputError(
                f"train.{name} is not what the student of {run} was trained with: leave it out, since the run says "
                "what its student sees"
            )


def teacher_of_run(recipe: StudentRecipe, reader: CacheReader | None, run: Path) -> HeadMixtures | None:
    """Return what the run learned from, or for a baseline what its recipe says; None where no cache has it.

    That is said: a trained student is worth its metrics even where it has no teacher.
    """
    mixtures = run_mixtures(run)
    if reader is None:
        if mixtures:
            log.info("agreement with the teacher is left out: give --cache for it")
        return None
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


def load_model(network: nn.Module, run: Path, record: RunRecord) -> None:
    """Load a finished run's weights; InputError when they do not fit, else as `read_model`."""
    state = model_state(run, record)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(
            f"{run / MODEL_FILE} does not fit the recipe's network; give the recipe that the run was trained with "
            "(-c)"
        ) from error


def evaluate_on(
    network: nn.Module,
    splits: Splits,
    name: str,
    *,
    recipe: StudentRecipe,
    mixtures: HeadMixtures | None,
    device: torch.device,
    ranks: Ranks = ALONE,
) -> tuple[SplitScores, SplitMetrics]:
    """Evaluate a network on one split, over its stored views; with its agreement with a teacher, if given."""
    predicted = predict_split(network, splits, name, recipe=recipe, device=device, ranks=ranks)
    scores = score_split(predicted.split.table, predicted.logits, predicted.usable, Averaged.of(splits.policy))
    metrics = scores.metrics(splits.clip_set.manifest.split(name))
    if mixtures is not None and splits.reader is not None:
        missing = recipe.teacher.missing
        for head, found_agreement in agreement(
            splits.reader, name, predicted.logits, predicted.usable, mixtures=mixtures, missing=missing
        ).items():
            metrics[name][head] |= found_agreement
    return scores, metrics


@dataclass(frozen=True)
class PredictedSplit:
    """What a network says of a split's clips."""

    split: SplitData
    """The split."""
    logits: dict[str, Float32Array]
    """Head -> (rows, V, classes), NaN for a clip that could not be read."""
    usable: npt.NDArray[np.bool_]
    """(rows,) which could."""


def predict_split(
    network: nn.Module,
    splits: Splits,
    name: str,
    *,
    recipe: StudentRecipe,
    device: torch.device,
    ranks: Ranks = ALONE,
) -> PredictedSplit:
    """Run a network over the evaluation views of a split; VerificationError where it gives NaN or infinity."""
    split = splits.open(name, memory_bytes=0)
    found = predict(
        network,
        split.data,
        np.arange(len(split.rows)),
        np.arange(split.table.views),
        batch_size=EVALUATION_BATCH,
        device=device,
        reading=Reading.of(recipe.train, device.type),
        precision=recipe.train.precision,
        ranks=ranks,
    )
    if not all(np.isfinite(value).all() for value in found.values()):
        raise VerificationError(
            f"split {name!r}: the student gives NaN or infinity: no finished training has such weights; train "
            "it again into another folder"
        )
    usable = np.zeros(split.table.rows, np.bool_)
    usable[split.rows] = True
    logits = {}
    for head, value in found.items():
        logits[head] = np.full((split.table.rows, *value.shape[1:]), np.nan, np.float32)
        logits[head][split.rows] = value
    return PredictedSplit(split, logits, usable)


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


def new_network(recipe: TrainRecipe, splits: Splits, seen: StudentInput | None = None) -> VideoClassifier:
    """Return the RGB network, initialised from the seed alone (and from a weights file, if there is one).

    It sees the splits' views, normalised as `seen` says of a run, and else as the recipe does.
    """
    torch.manual_seed(recipe.seed)
    policy = splits.policy
    return build_network(
        recipe,
        heads={head.name: len(head.classes) for head in splits.heads},
        modality="rgb",
        frames=policy.frames,
        size_px=policy.size_px,
        normalisation=None if seen is None else Normalisation(tuple(seen.mean), tuple(seen.std)),
    )


def chosen_mixtures(recipe: StudentRecipe, reader: CacheReader) -> tuple[HeadMixtures, str | None]:
    """Return the recipe's mixture of each head, and a warning or None."""
    return choose_mixtures(
        reader,
        recipe.teacher.weights,
        weights_temperature=recipe.teacher.weights_temperature,
        train_split=recipe.train_split,
    )
