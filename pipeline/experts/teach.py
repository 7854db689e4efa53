"""Teaching one expert: the student's loop on labels alone, with another modality at the input."""

import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mmkd.cache_tools.frames.clip_set import ClipSet, ClipVideo, kind_of
from mmkd.cache_tools.process.interrupt import stop_on_signals
from mmkd.cache_tools.process.pool import run_tasks
from mmkd.cache_tools.process.progress import Progress
from mmkd.cache_tools.tasks.folder_lock import FolderLock
from mmkd.cache_tools.views.coverage import short_views_line
from mmkd.cache_tools.views.held_out import HeldOut
from mmkd.data_manifests.counted import counted
from mmkd.data_manifests.errors import InputError, StorageError, VideoError
from mmkd.data_manifests.leaks import TrainedOn, trained_on
from mmkd.data_manifests.manifest import Manifest
from mmkd.pipeline.audio.sound_views import check_sound
from mmkd.pipeline.experts.expert import (
    CARD_FILE,
    WEIGHTS_FILE,
    ExpertCard,
    has_weights,
    make_network,
    numbers_of,
    read_card,
    save_expert,
    seen_shape,
    write_card,
)
from mmkd.pipeline.experts.trained_on import write_trained_on
from mmkd.pipeline.flow.clip_flow import all_pairs, clip_flow
from mmkd.pipeline.flow.flow_digests import digest_of_clips
from mmkd.pipeline.flow.flow_files import FlowFiles
from mmkd.pipeline.flow.scratch import FlowStore
from mmkd.pipeline.inputs.boxes import BoxFile, boxes_at, open_boxes
from mmkd.pipeline.inputs.expert_views import LookStream
from mmkd.pipeline.inputs.modalities import MODALITIES, TaughtClips, mel_params, open_flow
from mmkd.pipeline.inputs.prepare import FlowFill, FlowJob, fill_flow
from mmkd.pipeline.missing import BoxesMissingError, FlowMissingError, SoundMissingError
from mmkd.pipeline.recipe import ExpertRecipe, LayoutRecipe, TeacherRecipe
from mmkd.student.data.batches import ViewDataset
from mmkd.student.data.evaluation_views import evaluation_stream, one_view
from mmkd.student.data.held_out_clips import held_out_mask
from mmkd.student.data.view_streams import DrawnViews, ViewStream
from mmkd.student.evaluation.held_out_metrics import after_epochs, held_out_metrics
from mmkd.student.evaluation.run_files import RUN_FILE
from mmkd.student.looking.watches import check_looking, watches_of
from mmkd.student.network_table import before_it_was_stated, check_input
from mmkd.student.recipes.student import UNWATCHED, Looking
from mmkd.student.training.best import Validate
from mmkd.student.training.checkpoint import encode_network, latest_checkpoint
from mmkd.student.training.loop import fit
from mmkd.student.training.ranks import Ranks, held_by_first, joined
from mmkd.student.training.watch import Watch, Watches

log = logging.getLogger("mmkd")
TRAINING = "training"
"""The folder of the checkpoints, in an expert's."""
FLOW_FILES = "flow_files"
"""Among what training reports: a hash of the flow files that it read."""


@dataclass(frozen=True)
class TeachReport:
    """What teaching did."""

    card: ExpertCard
    """The expert."""
    trained: bool
    """False when it was there already."""


@dataclass(frozen=True)
class ExpertData:
    """Clips as one expert sees them."""

    data: ViewDataset
    """Views with labels."""
    skipped: int
    """Clips that this expert cannot use."""


@dataclass(frozen=True)
class Taught:
    """The training split as one expert needs it."""

    training: ExpertData
    """Clips that it learns from."""
    validate: Validate | None
    """Tells after each epoch how it does on those of `train.held_out`; None without them."""
    held_out: Sequence[ClipVideo | VideoError]
    """Clips that no expert learns from."""
    flow_files: str | None = None
    """Hash of the flow files of all of them; None where none are read."""


def teach_expert(
    recipe: TeacherRecipe, name: str, out: Path, device: torch.device, *, looking: Looking = UNWATCHED
) -> TeachReport:
    """Train the recipe's expert `name` into the directory `out`, unless it is there already.

    An expert whose weights are lost or damaged is trained again, from what training left. Raises InputError for
    one that was trained with another recipe and for a folder in which another process is at work or another
    thing lies, VerificationError when its card is damaged.
    """
    check_looking(looking)
    clip_set, expert = ClipSet(recipe.data), recipe.experts[name]
    if expert.modality != "boxes":  # before a video is probed
        frames, size_px = seen_shape(expert, recipe.views)
        check_input(expert.train.network, frames=frames, size_px=size_px)
    seen = expert_identity(recipe, recipe.experts[name], clip_set)
    with joined(device) as ranks:
        if (card := ranks.same(lambda: whole_expert(out, name, seen, recipe, clip_set))) is not None:
            return TeachReport(card, trained=False)
        with held_by_first(out, ranks) as lock:
            watch = Watches(watches_of(looking, out / TRAINING, lock))
            card = train_expert(
                recipe, name, clip_set, out=out, seen=seen, lock=lock, device=device, ranks=ranks, watch=watch
            )
    return TeachReport(card, trained=True)


def trained_clips(recipe: TeacherRecipe, clip_set: ClipSet) -> TrainedOn:
    """Return which clips formed an expert: the training split without the part held out for weights.

    Those by which its best epoch was told are among them.
    """
    manifest = clip_set.manifest
    ids = [clip.clip_id for clip in manifest.split(recipe.train_split)]
    held = HeldOut(**recipe.held_out.model_dump()).mask(manifest.dataset, ids)
    kept = (clip_id for clip_id, out in zip(ids, held, strict=True) if not out)
    return trained_on(f"{manifest.dataset}, split {recipe.train_split}", kept)


def whole_expert(
    out: Path, name: str, seen: dict[str, Any], recipe: TeacherRecipe, clip_set: ClipSet
) -> ExpertCard | None:
    """Return the card of the expert in `out`, None where it has to be trained; raises as `teach_expert`."""
    for folder in (out, out / TRAINING):
        if (folder / RUN_FILE).exists():
            raise InputError(f"{folder} holds a run of `mmkd-student train`; name another folder with -o")
    if not (out / CARD_FILE).exists():
        if (out / WEIGHTS_FILE).exists() and latest_checkpoint(out / TRAINING) is None:
            raise InputError(
                f"{out} holds {WEIGHTS_FILE}, but no {CARD_FILE} that would tell whose it is; name another folder "
                "with -o"
            )
        return None
    card = same_expert(out, name, seen)
    check_same_flow(out, card, recipe, clip_set)
    if has_weights(out, card):
        write_card(out, card)  # with the seal that an earlier version did not write
        return card
    log.warning("%s is missing or damaged, so the expert is trained again", out / WEIGHTS_FILE)
    return None


def train_expert(
    recipe: TeacherRecipe,
    name: str,
    clip_set: ClipSet,
    *,
    out: Path,
    seen: dict[str, Any],
    lock: FolderLock | None,
    device: torch.device,
    ranks: Ranks,
    watch: Watch,
) -> ExpertCard:
    """Train an expert into a folder that the first process of the run holds, and return its card."""
    expert, manifest, run_dir = recipe.experts[name], clip_set.manifest, out / TRAINING
    taught = ranks.in_turn(lambda: open_taught(recipe, expert, clip_set, device))
    torch.manual_seed(expert.train.seed)
    heads = {head.name: len(head.classes) for head in manifest.heads}
    network = make_network(expert, heads, recipe.views)
    run_dir.mkdir(parents=True, exist_ok=True)  # a folder that cannot be written shows now, not later
    fitted = fit(
        network,
        taught.training.data,
        expert.train,
        run_dir=run_dir,
        lock=lock,
        device=device,
        identity=run_identity(seen),
        validate=taught.validate,
        ranks=ranks,
        watch=watch,
        what=name,
    )

    def finish() -> ExpertCard:
        report: dict[str, Any] = {
            "steps": fitted.steps,
            "clips": taught.training.data.rows,
            "skipped": taught.training.skipped,
        }
        if taught.flow_files:
            report[FLOW_FILES] = taught.flow_files
        if taught.held_out:
            held_data = expert_data(recipe, expert, clip_set, items=taught.held_out, device=device).data
            precision = expert.train.precision
            report["held_out"] = held_out_metrics(network, held_data, manifest.heads, device, precision=precision)
        state = encode_network(network)
        card = ExpertCard(name=name, weights_sha256=hashlib.sha256(state).hexdigest(), training=report, **seen)
        if lock is not None:
            lock.check()
        write_trained_on(out, trained_clips(recipe, clip_set))
        save_expert(out, card, state)
        return card

    return ranks.same(finish)


def open_taught(recipe: TeacherRecipe, expert: ExpertRecipe, clip_set: ClipSet, device: torch.device) -> Taught:
    """Open the training split for an expert; raises as `expert_data`."""
    clips = clip_set.manifest.split(recipe.train_split)
    items = clip_set.probe(clips)
    if line := short_views_line(recipe.views, [items]):
        log.warning(line)
    parts = training_parts(recipe, expert, clip_set.manifest)
    seen_items, told_by, held_items = (
        [items[row] for row in np.flatnonzero(parts == part).tolist()] for part in Part
    )
    if unlabelled := clip_set.manifest.unlabelled(recipe.train_split):
        log.warning("%d of %s have no label, and teach nothing", unlabelled, counted(len(clips), "training clip"))
    training = expert_data(recipe, expert, clip_set, items=seen_items, device=device)
    flow = digest_of_clips(recipe.flow, items) if MODALITIES[expert.modality].needs_flow else None
    if not told_by:
        return Taught(training, None, held_items, flow)
    log.info("training on %s; %d tell which epoch is the best", counted(training.data.rows, "clip"), len(told_by))
    looked_at = expert_data(recipe, expert, clip_set, items=told_by, device=device, evaluation=True)
    validate = after_epochs(looked_at.data, clip_set.manifest.heads, device, expert.train)
    return Taught(training, validate, held_items, flow)


class Part(IntEnum):
    """What a clip of the training split is for."""

    LEARNED = 0
    """The expert learns from it."""
    BEST_EPOCH = 1
    """It tells which epoch is the best (`train.held_out`)."""
    WEIGHTS = 2
    """No expert learns from it, so that weights of experts can be fitted on it (`held_out`)."""


def training_parts(recipe: TeacherRecipe, expert: ExpertRecipe, manifest: Manifest) -> npt.NDArray[np.int64]:
    """Return (rows,) the `Part` of each clip of the training split; that for weights is every expert's."""
    clips = manifest.split(recipe.train_split)
    held = HeldOut(**recipe.held_out.model_dump()).mask(manifest.dataset, [clip.clip_id for clip in clips])
    parts = np.where(held, Part.WEIGHTS, Part.LEARNED)
    left = np.flatnonzero(~held)
    mask = held_out_mask([clips[row] for row in left], expert.train, manifest.dataset)
    parts[left[mask]] = Part.BEST_EPOCH
    return parts


def expert_identity(recipe: TeacherRecipe, expert: ExpertRecipe, clip_set: ClipSet) -> dict[str, Any]:
    """Return the part of an expert's card that is known before training."""
    manifest = clip_set.manifest
    return {
        "recipe": expert.model_dump(mode="json"),
        "heads": {head.name: list(head.classes) for head in manifest.heads},
        "manifest": manifest.fingerprint(),
        "views": recipe.views.identity(),
        "normalisation": None
        if expert.modality == "boxes"
        else numbers_of(expert.train.normalised(expert.modality)),
        **MODALITIES[expert.modality].identity(recipe),
        "held_out": recipe.held_out.model_dump(mode="json"),
    }


def run_identity(seen: dict[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint is checked against: without what an earlier version could not have stated.

    So training that it left unfinished goes on.
    """
    unset = {"look": {"frames": None, "size_px": None}, "flow_stack": 1}
    recipe = {key: value for key, value in seen["recipe"].items() if key not in unset or unset[key] != value}
    layout = LayoutRecipe.model_validate(recipe["layout"]).identity()
    found = seen | {"recipe": recipe | {"layout": layout}}
    if found["normalisation"] in (None, numbers_of(before_it_was_stated(recipe["modality"]))):
        del found["normalisation"]
    return found


def same_expert(out: Path, name: str, seen: dict[str, Any]) -> ExpertCard:
    """Return the card of the expert in `out`; raise InputError when another recipe or data set made it."""
    card = read_card(out)
    changed = [key for key, value in {**seen, "name": name}.items() if getattr(card, key) != value]
    if changed:
        raise InputError(
            f"{out} holds an expert made with another {', '.join(changed)}; train into another directory, or "
            "delete this one"
        )
    return card


def check_same_flow(out: Path, card: ExpertCard, recipe: TeacherRecipe, clip_set: ClipSet) -> None:
    """Raise InputError unless the expert in `out` learned from the flow files that are there now.

    One of an earlier version does not say from which.
    """
    if recipe.flow.files is None or (before := card.training.get(FLOW_FILES)) is None:
        return
    if before != digest_of_clips(recipe.flow, clip_set.probe(clip_set.manifest.split(recipe.train_split))):
        raise InputError(
            f"{out} holds an expert made with other flow files than those in {recipe.flow.files.path}, or with "
            "fewer; train into another directory, or delete this one"
        )


def expert_data(
    recipe: TeacherRecipe,
    expert: ExpertRecipe,
    clip_set: ClipSet,
    *,
    items: Sequence[ClipVideo | VideoError],
    device: torch.device,
    evaluation: bool = False,
) -> ExpertData:
    """Open clips for an expert; those that it cannot use are counted, logged and left out.

    Their views are those to learn from, or for `evaluation` the one in the middle of each clip.
    """
    clips = [item for item in items if isinstance(item, ClipVideo)]
    reasons = [str(item) for item in items if not isinstance(item, ClipVideo)]
    boxes, modality = None, MODALITIES[expert.modality]
    if modality.needs_boxes:
        boxes = open_boxes(recipe.boxes, {item.clip.video for item in clips})
        clips, missing = with_boxes(clips, boxes)
        reasons += missing
    if modality.needs_sound:
        clips, silent = with_sound(clips, clip_set)
        reasons += silent
    if modality.needs_flow:
        files = recipe.flow.files
        filled = with_flow_files(recipe, clips) if files else fill_store(recipe, clip_set, clips, device=device)
        clips, failed = filled
        reasons += failed
    if not clips:
        reason = f"the first reason: {reasons[0]}" if reasons else "all are held out; lower held_out.fraction"
        raise InputError(f"no clip is left for a {expert.modality} expert; {reason}")
    if reasons:
        kinds = "; ".join(f"{kind}: {count}" for kind, count in Counter(map(kind_of, reasons)).most_common())
        log.warning("%d of %s are left out (%s)", len(reasons), counted(len(items), "clip"), kinds)
    data = view_dataset(recipe, expert, clip_set, clips=clips, boxes=boxes, device=device, evaluation=evaluation)
    return ExpertData(data, len(reasons))


def view_dataset(
    recipe: TeacherRecipe,
    expert: ExpertRecipe,
    clip_set: ClipSet,
    *,
    clips: Sequence[ClipVideo],
    boxes: BoxFile | None,
    device: torch.device,
    evaluation: bool = False,
) -> ViewDataset:
    """Return the data set of a modality over usable clips."""
    manifest = clip_set.manifest
    stream: ViewStream
    if evaluation:
        stream = evaluation_stream(clips, manifest.heads, one_view(recipe.views))
    else:
        stream = DrawnViews(
            clips,
            recipe.views,
            dataset=manifest.dataset,
            seed=recipe.view_seed,
            flip_allowed=manifest.flip_allowed,
            views=expert.views,
        )
    share = expert.train.held_out if evaluation else 1 - expert.train.held_out
    modality = MODALITIES[expert.modality]
    taught = TaughtClips(
        clips=clips,
        stream=LookStream(stream, expert.look.frames),
        heads=manifest.heads,
        size_px=expert.look.size_px or recipe.views.size_px,
        source=clip_set.source,
        memory_bytes=int(expert.train.decoded_clips_gib * share * 2**30),
        flow=open_flow(recipe, str(device)) if modality.needs_flow else None,
        boxes=boxes,
        flow_stack=expert.flow_stack,
        mel=mel_params(recipe.audio),
    )
    return modality.data_set(taught)


def with_boxes(clips: Sequence[ClipVideo], boxes: BoxFile) -> tuple[list[ClipVideo], list[str]]:
    """Return the clips whose every frame has fitting boxes or none, and the reasons of the others."""
    kept, reasons = [], []
    for item in clips:
        try:
            times_seconds = item.video.times_seconds[item.facts.first_frame :][: item.facts.frame_count]
            track = boxes.track(item.clip.video)
            boxes_at(track, times_seconds, width=item.facts.width, height=item.facts.height)
            kept.append(item)
        except BoxesMissingError as error:
            reasons.append(f"clip {item.clip.clip_id!r}: {error}")
    return kept, reasons


def with_sound(clips: Sequence[ClipVideo], clip_set: ClipSet) -> tuple[list[ClipVideo], list[str]]:
    """Return the clips whose videos have a sound track, and the reasons of the others; each video is looked at
    once."""
    faults: dict[str, str | None] = {}
    kept, reasons = [], []
    for item in clips:
        video = item.clip.video
        if video not in faults:
            try:
                check_sound(clip_set.source, item)
                faults[video] = None
            except SoundMissingError as error:
                faults[video] = str(error)
        if (fault := faults[video]) is None:
            kept.append(item)
        else:
            reasons.append(f"clip {item.clip.clip_id!r}: {fault}")
    return kept, reasons


def with_flow_files(recipe: TeacherRecipe, clips: Sequence[ClipVideo]) -> tuple[list[ClipVideo], list[str]]:
    """Return the clips whose flow is among a user's files and fits, and the reasons of the others."""
    store, kept, reasons = open_flow(recipe, "cpu"), list[ClipVideo](), list[str]()
    if not isinstance(store, FlowFiles):
        return list(clips), []
    faults: dict[str, str | None] = {}  # each video is asked once, whose clips may be hundreds
    for item in clips:
        source = store.source_of(item)
        if source not in faults:
            try:
                store.check(item)
                faults[source] = None
            except FlowMissingError as error:
                faults[source] = str(error)
        if (fault := faults[source]) is None:
            kept.append(item)
        else:
            reasons.append(f"clip {item.clip.clip_id!r}: {fault}")
    return kept, reasons


def fill_store(
    recipe: TeacherRecipe, clip_set: ClipSet, clips: Sequence[ClipVideo], *, device: torch.device
) -> tuple[list[ClipVideo], list[str]]:
    """Compute the flow of every native pair that the scratch store lacks; return usable clips and reasons."""
    store = FlowStore(recipe.scratch, recipe.flow, str(device))
    todo = [position for position, item in enumerate(clips) if not store.has(item)]
    jobs = (FlowFill(clip_set.source, clips[i], FlowJob(recipe.flow, store, device.type)) for i in todo)
    results = run_tasks(
        fill_flow, jobs, workers=recipe.data.workers, timeout_seconds=recipe.data.clip_timeout_seconds
    )
    failed: dict[int, str] = {}
    with (
        stop_on_signals() as stop,
        Progress("optical flow", total=len(clips), done=len(clips) - len(todo)) as bar,
    ):
        try:
            for index, result in results:
                stop.check("the flow computed so far is kept")
                item = clips[todo[index]]
                if isinstance(result, StorageError):
                    raise result
                if isinstance(result, VideoError):
                    failed[todo[index]] = f"clip {item.clip.clip_id!r}: {result}"
                elif result is not None:
                    starts = all_pairs(item.facts, recipe.flow.step)
                    store.write(item, clip_flow(result, item.facts, starts, recipe=recipe.flow, device=str(device)))
                bar.advance()
        finally:
            results.close()
    usable = [item for position, item in enumerate(clips) if position not in failed]
    return usable, list(failed.values())
