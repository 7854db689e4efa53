"""What a build computes: rows, views, experts and fingerprints, all known before the first clip is decoded."""

import difflib
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmkd.cache_tools.cache.fingerprints import fingerprint
from mmkd.cache_tools.cache.init_record import CacheInit, expert_fingerprint
from mmkd.cache_tools.cache.logit_formats import FORMATS, format_of
from mmkd.cache_tools.frames.clip_set import ClipSet, ClipVideos, decoder_of, unusable_line
from mmkd.cache_tools.frames.source import DECODER_RULES
from mmkd.cache_tools.layout import (
    GROUP,
    SCHEMA,
    THUMBPRINT,
    Shard,
    SplitLayout,
    block_key,
    commit_key,
    group_key,
    part_array,
    status_array,
    thumbprint_arrays,
)
from mmkd.cache_tools.storage.store import Store
from mmkd.cache_tools.tasks.claims import Claims
from mmkd.cache_tools.views.canonical import CANONICAL_RULES
from mmkd.cache_tools.views.coverage import short_views_line
from mmkd.cache_tools.views.drawing import VIEW_RULES, ViewPolicy, evaluation_view_table, random_view_table
from mmkd.cache_tools.views.view import View, ViewTable
from mmkd.data_manifests.counted import ARE, counted
from mmkd.data_manifests.errors import InputError, VideoError
from mmkd.data_manifests.leaks import leak_lines
from mmkd.data_manifests.manifest import Clip, Manifest
from mmkd.pipeline.experts.expert import Expert
from mmkd.pipeline.experts.teacher import check_teacher
from mmkd.pipeline.flow.flow_digests import BY_CONTENT, FlowDigests, rules_of
from mmkd.pipeline.flow.flow_files import FlowFiles
from mmkd.pipeline.inputs.boxes import BoxFile, boxes_fields, open_boxes
from mmkd.pipeline.inputs.modalities import needs_boxes, needs_flow
from mmkd.pipeline.recipe import BuildRecipe, TeacherRecipe


@dataclass(frozen=True)
class ExpertNode:
    """What a cache keeps of an expert."""

    fields: Mapping[str, Any]
    """Everything that could change its logits, over the base."""
    held_out: Mapping[str, Any]
    """Fraction and seed of the training clips it did not see."""


@dataclass(frozen=True)
class SplitPlan:
    """One split with everything that is known before decoding."""

    layout: SplitLayout
    """Rows, views and blocks."""
    items: ClipVideos
    """(rows,) the manifest's clips, in order, with their facts, or why there are none."""
    drawn: ViewTable
    """The views of each clip; zeros where there are no facts."""

    @property
    def clips(self) -> Sequence[Clip]:
        """(rows,) the manifest's clips, in order."""
        return self.items.clips

    def views(self, row: int, numbers: range) -> tuple[View, ...]:
        """Return views of a clip; none where its video is unreadable."""
        unreadable = isinstance(self.items.videos[row], VideoError)
        return () if unreadable else tuple(self.drawn.view(row, number) for number in numbers)


def base_fields(
    manifest: Manifest, policy: ViewPolicy, *, train_split: str, view_seed: int, decoder: str = DECODER_RULES
) -> dict[str, Any]:
    """Return the base node: everything that could change what a view shows or means."""
    return {
        "schema": SCHEMA,
        "dataset": manifest.dataset,
        "manifest": manifest.fingerprint(),
        "heads": {head.name: list(head.classes) for head in manifest.heads},
        "train_split": train_split,
        "views": policy.identity(),
        "view_seed": view_seed,
        "view_rules": VIEW_RULES,
        "canonical": CANONICAL_RULES,
        "decoder": decoder,
    }


def draw_views(
    items: ClipVideos,
    policy: ViewPolicy,
    *,
    manifest: Manifest,
    seed: int,
    training_views: int | None,
) -> ViewTable:
    """Return the clips' random views (0..training_views-1), or their evaluation views; zeros without facts."""
    times = items.times() if policy.is_timed else None
    if training_views is None:
        return evaluation_view_table(items.facts, policy, times)
    return random_view_table(
        items.facts,
        policy,
        dataset=manifest.dataset,
        clip_ids=[clip.clip_id for clip in items.clips],
        seed=seed,
        flip_allowed=manifest.flip_allowed,
        numbers=range(training_views),
        times=times,
    )


log = logging.getLogger("mmkd")
FLOW_FIELD = "flow_files"
"""The field of an expert's node that has the hash of its flow files."""
LIKE = 0.75
"""From this similarity of two names on (difflib's ratio), one is taken for the other mistyped."""


@dataclass(frozen=True)
class BuildPlan:
    """Everything that is known before the first clip is decoded."""

    recipe: TeacherRecipe
    """What was asked for."""
    clip_set: ClipSet
    """Manifest and videos."""
    splits: tuple[SplitPlan, ...]
    """Rows and views of each split."""
    experts: tuple[Expert, ...]
    """Those that were given; the cache may hold others."""
    boxes: BoxFile | None
    """Object annotations, where an expert needs them."""
    base: dict[str, Any]
    """Fields of the base node."""
    nodes: dict[str, ExpertNode]
    """Expert -> what the cache keeps of it."""
    flow: FlowDigests | None = None
    """What tells flow files apart, where an expert reads such."""

    @property
    def fingerprints(self) -> dict[str, str]:
        """Node (thumbprint or given expert) -> fingerprint."""
        base = fingerprint(self.base)
        experts = {name: expert_fingerprint(base, node.fields) for name, node in self.nodes.items()}
        return {THUMBPRINT: base} | experts

    def experts_of(self, nodes: Collection[str]) -> tuple[Expert, ...]:
        """Return the experts among the nodes, in the plan's order."""
        return tuple(expert for expert in self.experts if expert.name in nodes)


@dataclass(frozen=True)
class ShardWork:
    """A shard and what of it has to be computed."""

    split: SplitPlan
    """Its split."""
    shard: Shard
    """The shard."""
    nodes: tuple[str, ...]
    """Nodes (thumbprint or experts) without a commit record."""

    def views(self, row: int) -> tuple[View, ...]:
        """Return the views of a row of the split that belong to the shard; none where the video is unreadable."""
        return self.split.views(row, self.shard.views)


def plan_build(
    recipe: TeacherRecipe,
    experts: tuple[Expert, ...],
    there: CacheInit | None = None,
    *,
    replace: Collection[str] = (),
) -> BuildPlan:
    """Fix rows, views and fingerprints; raise InputError for what cannot be built.

    `there` is the cache that is to grow: its views come in the blocks that it has, and what it says of flow files
    is compared by the rules that it was made by, but for experts that are to be replaced.
    """
    layouts = {} if there is None else there.layouts()
    clip_set = ClipSet(recipe.data)
    manifest = clip_set.manifest
    check_teacher([expert.card for expert in experts], manifest, recipe)
    names = cached_splits(manifest, recipe)
    warn_of_leaks(experts, manifest, [name for name in names if name != recipe.train_split])
    splits = tuple(plan_split(name, clip_set, recipe, layouts.get(name)) for name in names)
    items = [split.items for split in splits]
    for line in filter(None, (unusable_line(items), short_views_line(recipe.views, items))):
        log.warning(line)
    boxes = None
    if needs_boxes(expert.modality for expert in experts):
        boxes = open_boxes(recipe.boxes, {clip.video for split in splits for clip in split.clips})
    box_identity = boxes_fields(recipe.boxes) if boxes else None
    base = base_fields(
        manifest,
        recipe.views,
        train_split=recipe.train_split,
        view_seed=recipe.view_seed,
        decoder=decoder_of(items),
    )
    flow = flow_digests(recipe, experts, items)
    stored = {name: fields for name, fields in (there.experts if there else {}).items() if name not in replace}
    nodes = {
        expert.name: expert_node(expert, box_identity, recipe, flow_field(flow, stored.get(expert.name)))
        for expert in experts
    }
    return BuildPlan(recipe, clip_set, splits, experts, boxes, base, nodes, flow)


def warn_of_leaks(experts: Sequence[Expert], manifest: Manifest, splits: Sequence[str]) -> None:
    """Say loudly which experts were trained on clips of the evaluation splits."""
    for expert in experts:
        if expert.trained_on is None:
            log.info("expert %s does not say which clips it was trained on: a leak cannot be noticed", expert.name)
            continue
        for line in leak_lines(expert.name, expert.trained_on, manifest, splits):
            log.warning(line)


def flow_digests(
    recipe: TeacherRecipe, experts: Sequence[Expert], splits: Sequence[ClipVideos]
) -> FlowDigests | None:
    """Return what tells the flow files of all clips apart; None where no expert sees such, or flow is computed."""
    if recipe.flow.files is None or not needs_flow(expert.modality for expert in experts):
        return None
    return FlowDigests(FlowFiles(recipe.flow.files, recipe.flow), splits)


def flow_field(flow: FlowDigests | None, stored: Mapping[str, Any] | None) -> dict[str, str] | None:
    """Return the hash of the flow files, made as that in the `stored` fields of the same expert was."""
    if flow is None:
        return None
    before = (stored or {}).get(FLOW_FIELD)
    return {FLOW_FIELD: flow.digest(rules_of(before) if before else BY_CONTENT)}


def expert_node(
    expert: Expert, boxes: dict[str, Any] | None, recipe: TeacherRecipe, flow: dict[str, str] | None = None
) -> ExpertNode:
    """Return what the cache keeps of an expert; `flow` is a hash of the files that its flow is read from."""
    own = flow if flow and needs_flow([expert.modality]) else {}
    form = {"batch_views": recipe.build.batch_views, "precision": FORMATS[recipe.build.precision].name}
    return ExpertNode(expert.card.fingerprint_fields(boxes) | form | own, expert.card.held_out)


def cached_splits(manifest: Manifest, recipe: TeacherRecipe) -> tuple[str, ...]:
    """Return the splits to cache: those asked for, or all in which some clip has a label.

    Without the training split among them the cache is for evaluation alone, which is said.
    """
    check_train_split(manifest, recipe.train_split)
    labelled = {clip.split for clip in manifest.clips if any(v is not None for v in clip.labels.values())}
    names = recipe.build.splits
    if names is None:
        names = tuple(name for name in manifest.splits if name in labelled)
        for name in (name for name in manifest.splits if name not in labelled):
            clips = counted(len(manifest.split(name)), "clip", ARE)
            log.info("split %s: %s left out, without a label; --set build.splits=... caches them", name, clips)
    if not names:
        raise InputError(
            "no clip of the manifest has a label; name the splits to cache, e.g. --set build.splits=[test]"
        )
    for name in names:
        manifest.split(name)
    if recipe.train_split not in names:
        log.info(
            "%s without the training split %r: a cache for evaluation alone", ", ".join(names), recipe.train_split
        )
    return names


def check_train_split(manifest: Manifest, train_split: str) -> None:
    """Raise InputError for a training split that is not in the manifest, but under another name seems to be."""
    if train_split not in manifest.splits:
        like = difflib.get_close_matches(train_split, manifest.splits, n=1, cutoff=LIKE)
        if like:
            raise InputError(
                f"the manifest has no split {train_split!r}, but {like[0]!r}: give --set train_split={like[0]} if "
                "that is for training, or --set train_split=none if all splits are for evaluation"
            )


def plan_split(name: str, clip_set: ClipSet, recipe: TeacherRecipe, there: SplitLayout | None = None) -> SplitPlan:
    """Probe a split's videos and draw its views: random ones for training, fixed ones for evaluation.

    A split that is `there` already, with fewer views, grows by blocks of the size that it has.
    """
    clips = clip_set.manifest.split(name)
    training = recipe.build.views if name == recipe.train_split else None
    views = training or recipe.views.evaluation_views
    shard_views = view_block(recipe.build, there) if training else views
    layout = SplitLayout(name, len(clips), views, recipe.build.shard_rows, shard_views)
    items = clip_set.probe(clips)
    drawn = draw_views(
        items,
        recipe.views,
        manifest=clip_set.manifest,
        seed=recipe.view_seed,
        training_views=training,
    )
    return SplitPlan(layout, items, drawn)


def view_block(build: BuildRecipe, there: SplitLayout | None) -> int:
    """Return how many training views a shard holds: as many as asked for, as the cache's shards, or all.

    Raises InputError, with the numbers of views that are possible, when the cache cannot grow to as many.
    """
    if build.shard_views is not None:
        return build.shard_views
    if there is None or build.views < there.views:
        return build.views
    if build.views % there.shard_views:
        below = build.views // there.shard_views * there.shard_views
        possible = [number for number in (below, below + there.shard_views) if number > there.views]
        raise InputError(
            f"--views {build.views}: the cache has {counted(there.views, 'view')} in blocks of "
            f"{there.shard_views}, and grows "
            f"by whole blocks; give {' or '.join(map(str, possible))}"
        )
    return there.shard_views


def committed_nodes(store: Store, init: CacheInit, claims: Claims) -> set[tuple[str, str]]:
    """Return (shard, node) of everything that has its commit record; two listings, whatever the cache's size.

    A record whose objects are gone is removed, so that its shard is computed again: under the claim on it, since
    another task may be about to do so.
    """
    missing = {(shard.name, node) for shard, node in init.missing(store)}
    objects = store.list(GROUP)
    there = set()
    for shard, node, node_fingerprint in init.wanted():
        if (shard.name, node) in missing:
            continue
        keys = [group_key(key) for key in node_objects(shard, node, init)]
        if all(key in objects for key in keys):
            there.add((shard.name, node))
        elif claims.take(shard):
            # Asked again under the claim: another task may have written them since the listing.
            if not all(map(store.exists, keys)):
                store.delete(commit_key(shard, node, node_fingerprint))
            claims.release(shard)
    return there


def node_objects(shard: Shard, node: str, init: CacheInit) -> list[str]:
    """Return the keys, within the group, of the objects of one node of one shard of a cache."""
    split = shard.split.name
    if node == THUMBPRINT:
        hashes, thumbnails = thumbprint_arrays(split)
        return [block_key(hashes, shard, 2), block_key(thumbnails, shard, 3)]
    keys = [block_key(status_array(split, node), shard, 2)]
    for head, classes in init.base["heads"].items():
        for part in format_of(init.experts[node]["precision"]).parts(len(classes)):
            name = part_array(split, node, part.name, head=head)
            keys.append(block_key(name, shard, 2 + len(part.shape)))
    return keys


def pending_shards(
    plan: BuildPlan, there: Collection[tuple[str, str]], *, task: tuple[int, int]
) -> tuple[list[ShardWork], int]:
    """Return the shards that task (i, n) computes, every n-th first and then the rest, and how many are done."""
    works = [
        ShardWork(split, shard, tuple(node for node in plan.fingerprints if (shard.name, node) not in there))
        for split in plan.splits
        for shard in split.layout.shards()
    ]
    index, count = task
    # Own shards first, so that tasks seldom meet; then all others, in case their task never came.
    own = [work for number, work in enumerate(works) if number % count == index]
    rest = [work for number, work in enumerate(works) if number % count != index]
    pending = [work for work in (*own, *rest) if work.nodes]
    return pending, len(works) - len(pending)


def count_clips(works: Sequence[ShardWork]) -> int:
    """Return the number of clips in the shards."""
    return sum(len(work.shard.rows) for work in works)
