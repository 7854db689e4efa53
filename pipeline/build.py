"""The build: the data's way from video files to a cache, from top to bottom of this file.

    plan      manifest, facts of every video, views of every clip, experts -> a started cache
    prepare   decoding processes read each clip once for all its views      (mmkd.pipeline.prepare)
    flow      TV-L1 in the same processes on a CPU, here on a GPU            (mmkd.pipeline.flow)
    experts   logits in batches that depend on the shard alone               (mmkd.pipeline.shard_block)
    write     objects, then the commit record of each node                   (mmkd.cache_tools.commits)
    finalize  one root record with the hashes of all records

Killed at any instant it loses the shards in flight: the next run finds what is committed and checks its bytes.
"""

import dataclasses
import json
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mmkd.cache_tools.arrays import Objects
from mmkd.cache_tools.atomic import write_atomically
from mmkd.cache_tools.commits import publish, read_commit, read_verified
from mmkd.cache_tools.data import ClipSet, ClipVideo
from mmkd.cache_tools.fingerprints import file_sha256, fingerprint
from mmkd.cache_tools.interrupt import StopRequest, stop_on_signals
from mmkd.cache_tools.layout import SCHEMA, THUMBPRINT, CachePaths, Shard, SplitLayout
from mmkd.cache_tools.pool import run_tasks
from mmkd.cache_tools.progress import Progress
from mmkd.cache_tools.reader import CacheReader, seal
from mmkd.cache_tools.records import View
from mmkd.data_manifests.errors import InterruptedByUserError, VerificationError, VideoError
from mmkd.data_manifests.records import Manifest
from mmkd.pipeline.boxes import BoxFile
from mmkd.pipeline.cache_init import (
    SplitPlan,
    base_fields,
    draw_views,
    expert_fingerprint,
    initialise,
)
from mmkd.pipeline.experts import Expert, common_held_out
from mmkd.pipeline.flow import clip_flow
from mmkd.pipeline.prepare import ClipJob, FlowJob, PreparedClip, needed_pairs, prepare_clip
from mmkd.pipeline.recipe import TeacherRecipe
from mmkd.pipeline.shard_block import ShardBlock
from mmkd.pipeline.stages import Stages
from mmkd.pipeline.teacher import boxes_fields, check_teacher, open_boxes


@dataclass(frozen=True)
class BuildPlan:
    """Everything that is known before the first clip is decoded."""

    paths: CachePaths
    """Where the cache lies."""
    recipe: TeacherRecipe
    """What was asked for."""
    clip_set: ClipSet
    """Manifest and videos."""
    splits: tuple[SplitPlan, ...]
    """Rows and views of each split."""
    experts: tuple[Expert, ...]
    """The teacher."""
    boxes: BoxFile | None
    """Object annotations, where an expert needs them."""
    objects: Objects
    """The static objects of the group, among them every array's metadata."""
    fingerprints: dict[str, str]
    """Node (thumbprint or expert) -> fingerprint."""


@dataclass
class BuildReport:
    """What a build did."""

    clips: int = 0
    """Clips computed by this run."""
    skipped_shards: int = 0
    """Shards that were already committed and whole."""
    shards: int = 0
    """Shards written by this run."""
    unusable: dict[str, str] = field(default_factory=dict)
    """split/clip id -> reason, over the whole cache."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Stage -> seconds; decode and flow on a CPU are summed over processes."""

    def lines(self, out: Path) -> list[str]:
        """Return the report for people."""
        total = self.seconds["total"]
        stages = ", ".join(f"{name} {value:.1f} s" for name, value in self.seconds.items() if name != "total")
        rate = f"{self.clips / total:.1f} clips/s" if self.clips else "nothing left to do"
        return [
            f"{out}: {self.shards} shards built, {self.skipped_shards} were there; {self.clips} clips in "
            f"{total:.1f} s, {rate}; {len(self.unusable)} unusable",
            *([f"time: {stages} (decode and flow summed over processes)"] if stages else []),
        ]


def build(recipe: TeacherRecipe, experts: tuple[Expert, ...], out: Path) -> BuildReport:
    """Build the cache in `out`, or finish the one there.

    Raises InputError, FingerprintError, StorageError, or InterruptedByUserError after a clean stop.
    """
    plan = plan_build(recipe, experts, out)
    report = BuildReport()
    began = time.perf_counter()
    pending = list(pending_shards(plan, report))
    with stop_on_signals() as stop:
        build_shards(plan, pending, report, stop)
    finalize(plan)
    report.unusable = {
        f"{split.layout.name}/{item.clip_id}": item.reason
        for split in plan.splits
        for items in CacheReader(out).unusable(split.layout.name).values()
        for item in items
    }
    report.seconds["total"] = time.perf_counter() - began
    return report


def plan_build(recipe: TeacherRecipe, experts: tuple[Expert, ...], out: Path) -> BuildPlan:
    """Fix rows, views and fingerprints, and start the cache or check that the one there is the same."""
    clip_set = ClipSet(recipe.data)
    manifest = clip_set.manifest
    check_teacher([expert.card for expert in experts], manifest, recipe)
    splits = tuple(plan_split(name, clip_set, recipe) for name in cached_splits(manifest, recipe))
    boxes = None
    if any(expert.modality == "boxes" for expert in experts):
        boxes = open_boxes(recipe.boxes, {clip.video for split in splits for clip in split.clips})
    box_identity = boxes_fields(recipe.boxes) if boxes else None
    base = base_fields(manifest, recipe.views, train_split=recipe.train_split, view_seed=recipe.view_seed)
    fields = {
        expert.name: expert.card.fingerprint_fields(box_identity) | {"batch_views": recipe.build.batch_views}
        for expert in experts
    }
    paths = CachePaths(out)
    held_out = common_held_out([expert.card for expert in experts])
    objects = initialise(paths, splits, manifest=manifest, base=base, experts=fields, held_out=held_out)
    nodes = {name: expert_fingerprint(base, value) for name, value in fields.items()}
    return BuildPlan(
        paths, recipe, clip_set, splits, experts, boxes, objects, {THUMBPRINT: fingerprint(base)} | nodes
    )


def cached_splits(manifest: Manifest, recipe: TeacherRecipe) -> tuple[str, ...]:
    """Return the splits to cache: those asked for, or all in which some clip has a label."""
    for name in (recipe.train_split, *(recipe.build.splits or ())):
        manifest.split(name)
    if recipe.build.splits is not None:
        return recipe.build.splits
    labelled = {clip.split for clip in manifest.clips if any(v is not None for v in clip.labels.values())}
    return tuple(name for name in manifest.splits if name in labelled)


def plan_split(name: str, clip_set: ClipSet, recipe: TeacherRecipe) -> SplitPlan:
    """Probe a split's videos and draw its views: random ones for training, fixed ones for evaluation."""
    clips = clip_set.manifest.split(name)
    training = recipe.build.views if name == recipe.train_split else None
    views = training or recipe.views.evaluation_views
    shard_views = recipe.build.shard_views if training and recipe.build.shard_views else views
    layout = SplitLayout(name, len(clips), views, recipe.build.shard_rows, shard_views)
    items = clip_set.probe(clips)
    drawn = [
        draw_views(item, recipe.views, manifest=clip_set.manifest, seed=recipe.view_seed, training_views=training)
        for item in items
    ]
    return SplitPlan(layout, clips, items, drawn)


def pending_shards(plan: BuildPlan, report: BuildReport) -> Iterator[tuple[SplitPlan, Shard]]:
    """Yield the shards of which a node is not committed, or not whole any more."""
    for split in plan.splits:
        for shard in split.layout.shards():
            if all(is_whole(plan, shard, node) for node in plan.fingerprints):
                report.skipped_shards += 1
            else:
                yield split, shard


def is_whole(plan: BuildPlan, shard: Shard, node: str) -> bool:
    """Return whether a node of a shard is committed under its fingerprint and all its bytes are right."""
    try:
        record = read_commit(plan.paths, shard, node)
        if record is None or record.fingerprint != plan.fingerprints[node]:
            return False
        for key, sha256 in record.objects.items():
            read_verified(plan.paths.group, key, sha256)
    except VerificationError:
        return False
    return True


def build_shards(
    plan: BuildPlan, pending: list[tuple[SplitPlan, Shard]], report: BuildReport, stop: StopRequest
) -> None:
    """Compute and commit the shards in order, clips flowing through all of them without a pause."""
    stage = Stages(report.seconds)
    prepared = run_tasks(
        prepare_clip,
        clip_jobs(plan, pending),
        workers=plan.recipe.data.workers,
        timeout_seconds=plan.recipe.data.clip_timeout_seconds,
    )
    total = sum(len(shard.rows) for _, shard in pending)
    try:
        with Progress("building", total=total, unit="clip") as progress:
            for split, shard in pending:
                began = time.perf_counter()
                block = ShardBlock(shard, plan.experts, plan.recipe, boxes=plan.boxes)
                for row in shard.rows:
                    if stop.requested:
                        raise InterruptedByUserError("stopped; run the same command again to go on")
                    add_clip(plan, block, split, row=row, prepared=prepared, stage=stage)
                    progress.advance(1, note=stage.shares())
                with stage("experts"):
                    block.finish()
                with stage("write"):
                    write_shard(plan, block, split)
                report.clips += len(shard.rows)
                report.shards += 1
                log_shard(plan, shard, time.perf_counter() - began)
    finally:
        prepared.close()


def add_clip(
    plan: BuildPlan,
    block: ShardBlock,
    split: SplitPlan,
    *,
    row: int,
    prepared: Iterator[tuple[int, PreparedClip | VideoError]],
    stage: Stages,
) -> None:
    """Take the next prepared clip and give it to the experts; a clip that cannot be read fails its row alone."""
    item = split.items[row]
    if isinstance(item, VideoError):
        block.fail(row, str(item))
        return
    with stage("wait"):
        _, clip = next(prepared)
    if isinstance(clip, VideoError):
        block.fail(row, str(clip))
        return
    for name, seconds in clip.seconds.items():
        stage.add(name, seconds)
    views = shard_views(split, row, block.shard)
    if clip.frames is not None:
        with stage("flow"):
            starts = needed_pairs(views, item, plan.recipe.flow.step)
            device = str(plan.experts[0].device)
            flow = clip_flow(clip.frames, item.facts, starts, recipe=plan.recipe.flow, device=device)
            clip = dataclasses.replace(clip, flow=flow, frames=None)
    with stage("experts"):
        block.add(row, item, views, clip)


def shard_views(split: SplitPlan, row: int, shard: Shard) -> tuple[View, ...]:
    """Return the views of a row that belong to a shard."""
    return split.views[row][shard.views.start : shard.views.stop]


def clip_jobs(plan: BuildPlan, pending: list[tuple[SplitPlan, Shard]]) -> Iterator[ClipJob]:
    """Yield one job for each readable clip of the pending shards, in order."""
    recipe = plan.recipe
    flow = None
    if any(expert.modality == "flow" for expert in plan.experts):
        flow = FlowJob(recipe.flow, recipe.scratch, plan.experts[0].device.type)
    for split, shard in pending:
        for row in shard.rows:
            item = split.items[row]
            if isinstance(item, ClipVideo):
                views = shard_views(split, row, shard)
                yield ClipJob(plan.clip_set.source, item, views, recipe.views.size_px, flow)


def write_shard(plan: BuildPlan, block: ShardBlock, split: SplitPlan) -> None:
    """Publish every node of a finished block: its objects, then its commit record."""
    for node, result in block.results(split.clips).items():
        objects = result.encode(plan.objects)
        record = result.record(plan.fingerprints[node], objects)
        publish(plan.paths, block.shard, record, objects)


def finalize(plan: BuildPlan) -> None:
    """Write the root record over all commit records; raise VerificationError when one is missing."""
    records: dict[str, str] = {}
    for split in plan.splits:
        for shard in split.layout.shards():
            for node in plan.fingerprints:
                path = plan.paths.commit(shard, node)
                if not path.is_file():
                    raise VerificationError(f"{path} is missing; run `mmkd-cache build` again")
                records[path.relative_to(plan.paths.root).as_posix()] = file_sha256(path)
    root = {"schema": SCHEMA, "init": file_sha256(plan.paths.init), "records": records}
    text = json.dumps(root | {"seal": seal(root)}, sort_keys=True, indent=1)
    write_atomically(plan.paths.final, (text + "\n").encode())


def log_shard(plan: BuildPlan, shard: Shard, seconds: float) -> None:
    """Append host, time and rate to the journal; nothing ever depends on it."""
    entry = {
        "shard": shard.name,
        "host": socket.gethostname(),
        "unix_seconds": round(time.time(), 3),
        "seconds": round(seconds, 3),
        "clips_per_second": round(len(shard.rows) / seconds, 3),
    }
    with plan.paths.journal.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
