"""Clips that were recorded as unusable and can be read now are computed again: what was wrong was not their video.

So are those whose flow files were missing, for the experts that see them. A status is for good otherwise: a row's
views, its video's identity and its logits never change. This goes the way
of growth: under the claim on the whole cache, and with no other task at work, the records of the shards that hold
such rows are dropped, and the rows' facts and views are written as an undisturbed start would have written them. So
the finished cache has that start's bytes. Killed at any instant it is gone on with by the same command.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from mmkd.cache_tools.cache.clip_rows import base_differences, static_array
from mmkd.cache_tools.cache.commits import hash_objects, read_commit
from mmkd.cache_tools.cache.fingerprints import refuse_differences
from mmkd.cache_tools.cache.init_record import CacheInit
from mmkd.cache_tools.frames.clip_set import ClipVideos
from mmkd.cache_tools.layout import INDEX, INIT, ROOT, Status, commit_key
from mmkd.cache_tools.storage.store import Store
from mmkd.cache_tools.tasks.heartbeat import OtherTasks
from mmkd.data_manifests.counted import counted
from mmkd.data_manifests.errors import InputError, VideoError
from mmkd.pipeline.build.flow_came import FlowCame, flow_that_came, write_again
from mmkd.pipeline.build.start import NEW_PLACE, check_same, static_objects, stored_init
from mmkd.pipeline.build.work import BuildPlan, SplitPlan, draw_views

log = logging.getLogger("mmkd")
Rows = Mapping[str, set[int]]
"""Split -> rows."""


def retry_unusable(store: Store, plan: BuildPlan, others: OtherTasks) -> None:
    """Forget what is recorded of clips that the plan can read; the caller holds the claim on the whole cache.

    Raises InputError when other tasks are at work, or an expert of the cache is not given: all of them saw those
    clips as unusable.
    """
    init = stored_init(store)
    if init is None:
        return
    came = flow_that_came(store, init, plan)
    refuse_other_cache(store, init, plan, came)
    changed = changed_objects(init, plan)
    revived = revived_rows(store, init, plan) if changed else {}
    if changed and not revived:
        return  # other videos than the cache's: the start says so
    failed = failed_rows(store, init, plan)
    rows = {split: revived.get(split, set()) | failed.get(split, set()) for split in {*revived, *failed}}
    shards = [
        own
        for own in init.wanted()
        if not rows.get(own[0].split.name, set()).isdisjoint(own[0].rows) or came.lacks(own[0], own[1])
    ]
    if not shards and not came.before:
        log.info("no clip that is recorded as unusable can be read now")
        return
    if any(rows.values()) and (absent := init.experts.keys() - plan.nodes.keys()):
        raise InputError(f"--retry-unusable: give all experts of the cache; {sorted(absent)[0]!r} is missing")
    if living := others.living():
        raise InputError(
            f"--retry-unusable: {counted(len(living), 'other task')} at work on {store.locate()}; "
            "wait for the end, or stop them"
        )
    lacked = [(split, row) for own in (rows, *came.rows.values()) for split in own for row in own[split]]
    log.info("%s can be read now, and computed again", counted(len(set(lacked)), "unusable clip"))
    for key in (ROOT, INDEX):  # from here on the cache is unfinished
        store.delete(key)
    for shard, node, fingerprint in shards:
        if node not in came.before:  # whose old records tell what lacked flow, until init.json is written
            store.delete(commit_key(shard, node, fingerprint))
    after = came.as_now(replace(init, objects={**init.objects, **(changed if revived else {})}), plan)
    write_again(store, came, init, after, {(shard.name, node) for shard, node, _ in shards})
    if after != init:
        # Before the objects: those that differ from it are written again by any later start.
        store.write(INIT, after.to_bytes())
    for shard, node, fingerprint in init.wanted():
        if node in came.before:
            store.delete(commit_key(shard, node, fingerprint))


def refuse_other_cache(store: Store, init: CacheInit, plan: BuildPlan, came: FlowCame) -> None:
    """Raise FingerprintError, before anything is dropped, unless the plan is the cache's own but for what came."""
    found = base_differences(store, init, plan.base, plan.clip_set.manifest)
    refuse_differences(found, what=f"{store.locate()}: the data or its views", advice=NEW_PLACE)
    fields = came.as_before({name: node.fields for name, node in plan.nodes.items()})
    layouts = [split.layout for split in plan.splits]
    check_same(store.locate(), init, layouts=layouts, experts=fields, replace=())


def revived_rows(store: Store, init: CacheInit, plan: BuildPlan) -> dict[str, set[int]]:
    """Return the rows without a video in the cache whose video can be read now.

    Nothing when any other row differs, which the start then refuses: the cache must be of the same videos.
    """
    found: dict[str, set[int]] = {}
    before = []
    for split in plan.splits:
        known = split.layout.name in init.layouts()
        lacked = (
            static_array(store, init, f"{split.layout.name}/video_identity") == "" if known else np.zeros(0, bool)
        )
        found[split.layout.name] = {row for row in np.flatnonzero(lacked).tolist() if is_readable(split, row)}
        before.append(without_videos(split, found[split.layout.name], plan))
    hashes = hash_objects(static_objects(before, plan.clip_set.manifest, init.experts))
    if any(hashes.get(key, value) != value for key, value in init.objects.items() if is_content(key)):
        return {}
    return {split: rows for split, rows in found.items() if rows}


def failed_rows(store: Store, init: CacheInit, plan: BuildPlan) -> dict[str, set[int]]:
    """Return the rows that the commit records call unreadable and whose video can be read now."""
    splits = {split.layout.name: split for split in plan.splits}
    found: dict[str, set[int]] = {}
    for shard, node, fingerprint in init.wanted():
        split = splits.get(shard.split.name)
        record = read_commit(store, shard, node, fingerprint)
        if split is None or record is None:
            continue
        rows = {item.row for item in record.unusable if item.status == Status.DECODE_FAILED}
        readable = {row for row in rows if is_readable(split, row)}
        if readable:
            found.setdefault(shard.split.name, set()).update(readable)
    return found


def is_readable(split: SplitPlan, row: int) -> bool:
    """Return whether the probe could read a row's video, and its segment holds frames."""
    return not isinstance(split.items.videos[row], VideoError)


def without_videos(split: SplitPlan, rows: set[int], plan: BuildPlan) -> SplitPlan:
    """Return a split as it would be planned if some rows' videos could not be read."""
    videos = [VideoError("") if row in rows else video for row, video in enumerate(split.items.videos)]
    facts = split.items.facts.copy()
    facts[sorted(rows)] = 0
    items = ClipVideos(split.items.clips, videos, facts)
    recipe = plan.recipe
    drawn = draw_views(
        items,
        recipe.views,
        manifest=plan.clip_set.manifest,
        seed=recipe.view_seed,
        training_views=split.layout.views if split.layout.name == recipe.train_split else None,
    )
    return SplitPlan(split.layout, items, drawn)


def changed_objects(init: CacheInit, plan: BuildPlan) -> dict[str, str]:
    """Return the hashes that the plan has for those of the cache's objects with values which would change."""
    hashes = hash_objects(static_objects(plan.splits, plan.clip_set.manifest, init.experts))
    return {
        key: hashes[key]
        for key, value in init.objects.items()
        if is_content(key) and hashes.get(key, value) != value
    }


def is_content(key: str) -> bool:
    """Return whether an object holds values, and not an array's metadata, which growth changes."""
    return not key.endswith("zarr.json")
