"""Stage two: train the RGB student on cached targets, or the baseline on labels alone with everything else equal.

The data's way: cache -> mixed teacher -> target source; manifest + RGB videos + stored views -> canonical pixels;
both -> the loop. Nothing here can load flow, boxes or experts.
"""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load

from mmkd.cache_tools.cache.reader import CacheReader
from mmkd.cache_tools.frames.clip_set import ClipSet
from mmkd.cache_tools.tasks.folder_lock import FolderLock
from mmkd.data_manifests.counted import counted
from mmkd.student.data.evaluation_views import evaluation_data, one_view
from mmkd.student.data.held_out_clips import held_out_mask
from mmkd.student.data.split_data import SplitData
from mmkd.student.data.splits import CachedSplits, ManifestSplits, Splits, check_views
from mmkd.student.data.thumbprints import check_thumbprints
from mmkd.student.evaluation.evaluate import evaluation_splits
from mmkd.student.evaluation.held_out_metrics import after_epochs
from mmkd.student.evaluation.own_folder import refuse_other_contents
from mmkd.student.evaluation.run_evaluation import chosen_mixtures, evaluate_run, new_network
from mmkd.student.evaluation.run_files import RUN_FILE, RunRecord, StudentInput, read_run, write_model, write_run
from mmkd.student.evaluation.trained import without_weights
from mmkd.student.looking.watches import check_looking, watches_of
from mmkd.student.network_table import before_it_was_stated
from mmkd.student.recipes.student import UNWATCHED, Looking, Mode, StudentRecipe
from mmkd.student.recipes.train import TrainRecipe
from mmkd.student.teacher.cached_targets import CachedTargets, copies_folder, shared_targets
from mmkd.student.teacher.mixing import HeadMixtures
from mmkd.student.training.best import Validate
from mmkd.student.training.checkpoint import encode_network, latest_checkpoint
from mmkd.student.training.loop import FitReport, fit
from mmkd.student.training.ranks import ALONE, Ranks, held_by_first, joined
from mmkd.student.training.watch import Watches

log = logging.getLogger("mmkd")


def train_student(
    recipe: StudentRecipe,
    cache: Path | str | None,
    out: Path,
    *,
    mode: Mode,
    device: torch.device,
    looking: Looking = UNWATCHED,
) -> FitReport:
    """Train into the directory `out` (or finish the run there), and evaluate on the cache's other splits.

    Without a cache it learns from the labels of the manifest's clips, under a fresh view every epoch. Student and
    baseline of one recipe have the same initial weights, clips, views, order and augmentation.
    Raises InputError for a cache of another manifest and for a folder in which another process is at work,
    VerificationError for damaged data or other pixels.
    """
    check_looking(looking)
    with joined(device) as ranks:
        ranks.same(lambda: refuse_other_contents(out))
        with held_by_first(out, ranks) as lock:
            return train_in_folder(
                recipe, cache, out, mode=mode, device=device, lock=lock, ranks=ranks, looking=looking
            )


def train_in_folder(
    recipe: StudentRecipe,
    cache: Path | str | None,
    out: Path,
    *,
    mode: Mode,
    device: torch.device,
    lock: FolderLock | None,
    ranks: Ranks = ALONE,
    looking: Looking = UNWATCHED,
) -> FitReport:
    """Train and evaluate in a folder that the first process of a run holds; raises as `train_student`."""
    splits = open_splits(recipe, cache, mode)
    policy = splits.policy
    recipe.train.check_views(frames=policy.frames, size_px=policy.size_px)
    recipe.loss.check_heads([head.name for head in splits.heads])
    split, targets, mixtures = ranks.in_turn(lambda: training_data(recipe, splits, cache=cache, mode=mode))
    validate = ranks.in_turn(lambda: validation(recipe, splits, device))
    begun = describe_student(recipe, splits, mode=mode, mixtures=mixtures)
    record = ranks.same(lambda: begin_or_continue(out, begun, lock))
    start = starting_point(recipe.train, latest_checkpoint(out))
    network = new_network(start, splits, record.input)
    watches = watches_of(looking, out, lock)
    report = fit(
        network,
        split.data,
        recipe.train,
        targets=targets,
        loss=recipe.loss_options(),
        run_dir=out,
        lock=lock,
        device=device,
        ranks=ranks,
        other_start=start != recipe.train,
        validate=validate,
        watch=Watches(watches),
        identity={
            **splits.identity(split),
            "weights": None if mixtures is None else mixtures_json(mixtures),
            "missing": None if mixtures is None else recipe.teacher.missing,
        },
    )

    def leave() -> bytes:
        if lock is not None:
            lock.check()
        state = encode_network(network)
        write_model(out, record, state)
        return state

    student = new_network(without_weights(recipe.train), splits, record.input)  # as `evaluate` will have it
    student.load_state_dict(load(ranks.same(leave)))  # batch norms' statistics are the first process's
    metrics = evaluate_run(recipe, cache, out, device=device, may_be_empty=True, network=student, ranks=ranks)
    for watch in watches:
        watch.evaluated(metrics, report.steps)
    return report


def open_splits(recipe: StudentRecipe, cache: Path | str | None, mode: Mode) -> Splits:
    """Return what the run learns from and is evaluated on; InputError for other views than the cache's."""
    if cache is not None:
        splits = CachedSplits(CacheReader(cache), ClipSet(recipe.data))
        check_views(recipe, splits.policy, of="the cache", seed=splits.reader.init.view_seed)
        return splits
    if not mode.fresh_views:
        raise ValueError("without a cache there are fresh views alone")
    policy = recipe.policy()
    log.info(
        "no --cache: learning from labels alone, under fresh views of %d frames of %d x %d pixels",
        policy.frames,
        policy.size_px,
        policy.size_px,
    )
    return ManifestSplits(ClipSet(recipe.data), policy, train_split=recipe.train_split, view_seed=recipe.view_seed)


def begin_or_continue(out: Path, record: RunRecord, lock: FolderLock | None) -> RunRecord:
    """Write run.json before the first step; of a run with a checkpoint return what was written then."""
    if latest_checkpoint(out) is None:
        if lock is not None:
            lock.check()
        write_run(out, record)
    elif (out / RUN_FILE).exists():
        stored = read_run(out)
        return replace(stored, input=stored.input or as_before(record.input))
    return record


def as_before(seen: StudentInput | None) -> StudentInput | None:
    """Return what the student of an earlier version sees, which did not say so: every network saw the same
    numbers."""
    numbers = before_it_was_stated("rgb")
    return seen and replace(seen, mean=list(numbers.mean), std=list(numbers.std))


def starting_point(train: TrainRecipe, checkpoint: Path | None) -> TrainRecipe:
    """Return the recipe of the network to begin with: without its weights file where a checkpoint replaces that."""
    if checkpoint is None or train.weights is None or train.weights.exists():
        return train
    log.warning("%s, which the run started from, is gone: %s has all that is needed", train.weights, checkpoint)
    return without_weights(train)


def training_data(
    recipe: StudentRecipe, splits: Splits, *, cache: Path | str | None, mode: Mode
) -> tuple[SplitData, CachedTargets | None, HeadMixtures | None]:
    """Return the training clips, and the teacher's targets and mixture: None for a baseline.

    All that the run will need is opened, so that what is missing shows now and not after training.
    """
    reader = None if mode.labels_only else splits.reader
    copies = None if reader is None or cache is None else copies_folder(recipe.node_copies, cache)
    mixtures = None
    if reader is not None:
        mixtures, warning = chosen_mixtures(recipe, reader)
        if warning:
            log.warning(warning)
        if resting := recipe.of_labels_alone():
            log.warning("%s: no effect, as labels have the weight 0 (loss.label_weight)", ", ".join(resting))
    split = open_training(recipe, splits, mode)
    for name in evaluation_splits(splits.names, splits.clip_set.manifest, recipe.train_split):
        splits.open(name, memory_bytes=0)
    if isinstance(splits, ManifestSplits):
        for line in splits.warnings():
            log.warning(line)
    if reader is None or mixtures is None or copies is None:
        return split, None, None
    targets = shared_targets(
        reader,
        recipe.train_split,
        mixtures,
        missing=recipe.teacher.missing,
        rows=split.rows,
        directory=copies,
    )
    report_missing(targets.mask[split.rows], recipe)
    return split, targets, mixtures


def open_training(recipe: StudentRecipe, splits: Splits, mode: Mode) -> SplitData:
    """Open the training clips and compare a sample of their pixels with the teacher's."""
    learned, held_out = training_ids(recipe, splits.clip_set)
    split = splits.open(
        recipe.train_split,
        memory_bytes=decoded_bytes(recipe.train, 1 - recipe.train.held_out),
        fresh_views=mode.fresh_views,
        only=learned,
    )
    clips = len(split.rows) + split.left_out
    if held_out:
        log.info("training on %s; %d tell which epoch is the best", counted(clips, "clip"), len(held_out))
    elif clips < split.table.rows:
        log.info("training on %d of the cache's %d training clips: those of the manifest", clips, split.table.rows)
    if split.left_out and splits.reader is not None:
        log.warning("%d of %d training clips are left out: unreadable", split.left_out, clips)
    if mode.labels_only:
        report_unlabelled(split)
    if not mode.fresh_views and splits.reader is not None:
        found = check_thumbprints(
            splits.reader, split.table, split.data, rows=split.rows, sample=recipe.thumbprint_sample
        )
        if found.rounded:
            log.warning(
                "%d of %d sampled views differ from the teacher's pixels by rounding alone (another processor or "
                "library version); the student learns from nearly the same views",
                found.rounded,
                found.checked,
            )
    return split


def training_ids(recipe: StudentRecipe, clip_set: ClipSet) -> tuple[set[str] | None, set[str]]:
    """Return the ids of the training clips to learn from (None: all), and of those that tell the best epoch."""
    if not recipe.train.held_out:
        return None, set()
    clips = clip_set.manifest.split(recipe.train_split)
    mask = held_out_mask(clips, recipe.train, clip_set.manifest.dataset)
    held_out = {clip.clip_id for clip, out in zip(clips, mask, strict=True) if out}
    return {clip.clip_id for clip in clips} - held_out, held_out


def decoded_bytes(train: TrainRecipe, share: float) -> int:
    """Return a share of the memory for clips that are kept decoded."""
    return int(train.decoded_clips_gib * share * 2**30)


def validation(recipe: StudentRecipe, splits: Splits, device: torch.device) -> Validate | None:
    """Return what tells after each epoch how the network does on held-out clips, by the view in their middle."""
    _, held_out = training_ids(recipe, splits.clip_set)
    if not held_out:
        return None
    split = splits.open(recipe.train_split, memory_bytes=0, only=held_out)
    data = evaluation_data(
        splits.clip_set.source,
        split.clips,
        splits.heads,
        one_view(splits.policy),
        memory_bytes=decoded_bytes(recipe.train, recipe.train.held_out),
    )
    return after_epochs(data, splits.heads, device, recipe.train)


def report_unlabelled(split: SplitData) -> None:
    """Say how many clips teach a baseline nothing."""
    unlabelled = np.logical_and.reduce([labels < 0 for labels in split.data.labels.values()])
    if unlabelled.any():
        log.warning("%d of %d training clips have no label, and teach nothing", unlabelled.sum(), len(unlabelled))


def report_missing(valid: npt.NDArray[np.bool_], recipe: StudentRecipe) -> None:
    """Say how many views of usable clips have no teacher, and what becomes of them."""
    missing = int((~valid).sum())
    if missing:
        fate = "learn from their labels" if recipe.teacher.missing == "label-only" else "are left out"
        log.warning("%d of %d training views have no teacher and %s", missing, valid.size, fate)


def mixtures_json(mixtures: HeadMixtures) -> dict[str, Any]:
    """Return the mixtures for run.json and for the run's identity: their values, wherever they come from."""
    return {head: mixture.to_json() for head, mixture in mixtures.items()}


def describe_student(
    recipe: StudentRecipe, splits: Splits, *, mode: Mode, mixtures: HeadMixtures | None
) -> RunRecord:
    """Return what run.json says of a run and of its student."""
    numbers = recipe.train.normalised("rgb")
    return RunRecord(
        recipe=recipe.model_dump(mode="json"),
        cache=splits.fingerprint,
        dataset=splits.clip_set.manifest.dataset,
        heads={head.name: list(head.classes) for head in splits.heads},
        labels_only=mode.labels_only,
        fresh_views=mode.fresh_views,
        weights=None if mixtures is None else mixtures_json(mixtures),
        versions={"torch": torch.__version__, "numpy": np.__version__},
        input=StudentInput(**splits.seen(), mean=list(numbers.mean), std=list(numbers.std)),
    )
