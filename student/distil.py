"""Stage two: train the RGB student on cached targets, or the baseline on labels alone with everything else equal.

The data's way: cache -> mixed teacher -> target source; manifest + RGB videos + stored views -> canonical pixels;
both -> the loop. Nothing here can load flow, boxes or experts.
"""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mmkd.cache_tools.cache.reader import CacheReader
from mmkd.cache_tools.frames.clip_set import ClipSet
from mmkd.cache_tools.tasks.folder_lock import FolderLock, folder_lock
from mmkd.data_manifests.errors import InputError, VerificationError
from mmkd.student.data.split_data import SplitData, check_manifest, open_split
from mmkd.student.data.thumbprints import check_thumbprints
from mmkd.student.evaluation.evaluate import evaluation_splits
from mmkd.student.evaluation.run_evaluation import (
    chosen_mixtures,
    evaluate_run,
    new_network,
)
from mmkd.student.evaluation.run_files import (
    EVALUATION_FILE,
    MODEL_FILE,
    RUN_FILE,
    RunRecord,
    StudentInput,
    read_run,
    write_model,
    write_run,
)
from mmkd.student.networks.networks import RGB_MEAN, RGB_STD
from mmkd.student.recipe import StudentRecipe
from mmkd.student.teacher.cached_targets import (
    CachedTargets,
    copies_folder,
    shared_targets,
)
from mmkd.student.teacher.mixing import HeadMixtures
from mmkd.student.training.checkpoint import encode_network, latest_checkpoint
from mmkd.student.training.loop import METRICS_FILE, FitReport, fit
from mmkd.student.training.one_process import refuse_several_processes

log = logging.getLogger("mmkd")
OTHER_CONTENTS = {"expert.json": "an expert", "targets.zarr": "a cache"}
"""What a run is never written into, by a file or folder that it has."""


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
    Raises InputError for a cache of another manifest and for a folder in which another process is at work,
    VerificationError for damaged data or other pixels.
    """
    if mode.fresh_views and not mode.labels_only:
        raise InputError("--fresh-views needs --labels-only: cached targets belong to cached views")
    refuse_several_processes("mmkd-student train")
    refuse_other_contents(out)
    with folder_lock(out) as lock:
        return train_in_folder(recipe, cache, out, mode=mode, device=device, lock=lock)


def refuse_other_contents(out: Path) -> None:
    """Raise InputError for a folder that is an expert's or a cache's."""
    for name, what in OTHER_CONTENTS.items():
        if (out / name).exists():
            raise InputError(f"{out} holds {what}; name another folder with -o")
    if out.is_dir() and latest_checkpoint(out) is None:
        refuse_other_run(out)


def refuse_other_run(out: Path) -> None:
    """Raise InputError where a folder without a checkpoint holds files of a run's names that no run wrote there."""
    try:
        if (out / RUN_FILE).exists():
            read_run(out)
            return
    except VerificationError as error:
        raise InputError(
            f"{out / RUN_FILE} is damaged, or not of `mmkd-student train`; name another folder, or delete it"
        ) from error
    for name in (METRICS_FILE, MODEL_FILE, EVALUATION_FILE):
        if (out / name).exists():
            raise InputError(
                f"{out} holds {name}, but no {RUN_FILE} that would tell whose it is; name another folder with -o"
            )


def train_in_folder(
    recipe: StudentRecipe, cache: Path | str, out: Path, *, mode: Mode, device: torch.device, lock: FolderLock
) -> FitReport:
    """Train and evaluate in a folder that this process holds; raises as `train_student`."""
    reader, clip_set = CacheReader(cache), ClipSet(recipe.data)
    check_manifest(reader, clip_set.manifest)
    split, targets, mixtures = training_data(recipe, reader, clip_set, cache=cache, mode=mode)
    record = describe_student(recipe, reader, mode=mode, mixtures=mixtures)
    if latest_checkpoint(out) is None:  # else this run goes on under what was written then, or is refused
        lock.check()
        write_run(out, record)
    elif (out / RUN_FILE).exists():
        record = replace(read_run(out), input=record.input)  # an earlier version did not say what a student sees
    network = new_network(recipe.train, reader)
    report = fit(
        network,
        split.data,
        recipe.train,
        targets=targets,
        loss=recipe.loss_options(),
        run_dir=out,
        lock=lock,
        device=device,
        identity={
            "cache": reader.fingerprint,
            "weights": None if mixtures is None else mixtures_json(mixtures),
            "missing": None if mixtures is None else recipe.teacher.missing,
        },
    )
    lock.check()
    write_model(out, record, encode_network(network))
    evaluate_run(recipe, cache, out, device=device, may_be_empty=True)
    return report


def training_data(
    recipe: StudentRecipe, reader: CacheReader, clip_set: ClipSet, *, cache: Path | str, mode: Mode
) -> tuple[SplitData, CachedTargets | None, HeadMixtures | None]:
    """Return the training clips, and the teacher's targets and mixture: None for a baseline.

    All that the run will need is opened, so that what is missing shows now and not after training.
    """
    copies = None if mode.labels_only else copies_folder(recipe.node_copies, cache)
    mixtures = None
    if copies is not None:
        mixtures, warning = chosen_mixtures(recipe, reader)
        if warning:
            log.warning(warning)
    split = open_training(recipe, reader, clip_set, mode)
    for name in evaluation_splits(reader, clip_set.manifest, recipe.train_split):
        open_split(reader, clip_set, name, memory_bytes=0)
    if copies is None or mixtures is None:
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


def mixtures_json(mixtures: HeadMixtures) -> dict[str, Any]:
    """Return the mixtures for run.json and for the run's identity: their values, wherever they come from."""
    return {head: mixture.to_json() for head, mixture in mixtures.items()}


def describe_student(
    recipe: StudentRecipe, reader: CacheReader, *, mode: Mode, mixtures: HeadMixtures | None
) -> RunRecord:
    """Return what run.json says of a run and of its student."""
    base = reader.init.base
    return RunRecord(
        recipe=recipe.model_dump(mode="json"),
        cache=reader.fingerprint,
        heads={head.name: list(head.classes) for head in reader.heads},
        labels_only=mode.labels_only,
        fresh_views=mode.fresh_views,
        weights=None if mixtures is None else mixtures_json(mixtures),
        versions={"torch": torch.__version__, "numpy": np.__version__},
        input=StudentInput(
            views=dict(base["views"]),
            view_rules=str(base["view_rules"]),
            canonical=str(base["canonical"]),
            decoder=str(base["decoder"]),
            mean=list(RGB_MEAN),
            std=list(RGB_STD),
        ),
    )
