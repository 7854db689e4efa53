"""What a build computes: rows, views, experts and fingerprints, all known before the first clip is decoded."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from mmkd.cache_tools.data import ClipSet
from mmkd.cache_tools.fingerprints import fingerprint
from mmkd.cache_tools.init_record import CacheInit, expert_fingerprint
from mmkd.cache_tools.layout import (
    GROUP,
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
from mmkd.cache_tools.records import View
from mmkd.cache_tools.storage_formats import FORMATS, format_of
from mmkd.cache_tools.store import Store
from mmkd.data_manifests.records import Manifest
from mmkd.pipeline.boxes import BoxFile
from mmkd.pipeline.cache_init import ExpertNode, SplitPlan, base_fields, draw_views
from mmkd.pipeline.experts import Expert
from mmkd.pipeline.recipe import TeacherRecipe
from mmkd.pipeline.teacher import boxes_fields, check_teacher, open_boxes


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


def plan_build(recipe: TeacherRecipe, experts: tuple[Expert, ...]) -> BuildPlan:
    """Fix rows, views and fingerprints; raise InputError for what cannot be built."""
    clip_set = ClipSet(recipe.data)
    manifest = clip_set.manifest
    check_teacher([expert.card for expert in experts], manifest, recipe)
    splits = tuple(plan_split(name, clip_set, recipe) for name in cached_splits(manifest, recipe))
    boxes = None
    if any(expert.modality == "boxes" for expert in experts):
        boxes = open_boxes(recipe.boxes, {clip.video for split in splits for clip in split.clips})
    box_identity = boxes_fields(recipe.boxes) if boxes else None
    base = base_fields(manifest, recipe.views, train_split=recipe.train_split, view_seed=recipe.view_seed)
    nodes = {expert.name: expert_node(expert, box_identity, recipe) for expert in experts}
    return BuildPlan(recipe, clip_set, splits, experts, boxes, base, nodes)


def expert_node(expert: Expert, boxes: dict[str, Any] | None, recipe: TeacherRecipe) -> ExpertNode:
    """Return what the cache keeps of an expert."""
    form = {"batch_views": recipe.build.batch_views, "precision": FORMATS[recipe.build.precision].name}
    return ExpertNode(expert.card.fingerprint_fields(boxes) | form, expert.card.held_out)


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
    drawn = draw_views(
        items,
        recipe.views,
        manifest=clip_set.manifest,
        seed=recipe.view_seed,
        training_views=training,
    )
    return SplitPlan(layout, items, drawn)


def committed_nodes(store: Store, init: CacheInit) -> set[tuple[str, str]]:
    """Return (shard, node) of everything that has its commit record; two listings, whatever the cache's size.

    A record whose objects are gone is removed, so that its shard is computed anew.
    """
    missing = {(shard.name, node) for shard, node in init.missing(store)}
    objects = store.list(GROUP)
    there = set()
    for shard, node, node_fingerprint in init.wanted():
        if (shard.name, node) in missing:
            continue
        if all(group_key(key) in objects for key in node_objects(shard, node, init)):
            there.add((shard.name, node))
        else:
            store.delete(commit_key(shard, node, node_fingerprint))
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
    own = [work for number, work in enumerate(works) if number % count == index]
    rest = [work for number, work in enumerate(works) if number % count != index]
    pending = [work for work in (*own, *rest) if work.nodes]
    return pending, len(works) - len(pending)


def count_clips(works: Sequence[ShardWork]) -> int:
    """Return the number of clips in the shards."""
    return sum(len(work.shard.rows) for work in works)
