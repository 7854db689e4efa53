"""Before a long build: how many rows and bytes, how fast, how many tasks, and whether the disk holds it.

Sizes come from the storage format and the arrays' metadata, times from a few clips that are really prepared and
given to the experts. What a cache already holds is not counted again, so that this also tells what growing it
costs. Nothing of the cache is written.
"""

import math
import os
import shutil
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch

from mmkd.cache_tools.cache.arrays import INNER_ROWS, Objects
from mmkd.cache_tools.cache.commits import Unusable
from mmkd.cache_tools.cache.init_record import CacheInit
from mmkd.cache_tools.cache.logit_formats import bytes_per_row, format_of
from mmkd.cache_tools.layout import THUMBPRINT, Status
from mmkd.cache_tools.storage.local_store import LocalStore
from mmkd.cache_tools.storage.open import open_store
from mmkd.cache_tools.storage.store import Store
from mmkd.cache_tools.upkeep.free_place import require_own_place
from mmkd.data_manifests.counted import ARE, counted
from mmkd.data_manifests.errors import InputError, StorageError, VideoError
from mmkd.pipeline.build.start import plan_init, stored_init
from mmkd.pipeline.build.work import BuildPlan, ShardWork, SplitPlan, pending_shards, plan_build
from mmkd.pipeline.experts.expert import Expert
from mmkd.pipeline.forecast.rates import WriteRate, measure_clips, measure_folder, measure_writes, readable_rows
from mmkd.pipeline.forecast.report import Disk, PlanReport, Sizes, SplitForecast
from mmkd.pipeline.forecast.sizes import node_size, unusable_bytes
from mmkd.pipeline.recipe import TeacherRecipe

SHARD_SECONDS = 600.0
"""Longest time of a shard: what a killed task loses at most."""
TASK_SHARDS = 8
"""Shards of a task at least, so that tasks end at about the same time."""
ROOT_BYTES = 512
"""Bytes of root.json, at most."""
FIXED_OBJECTS = 3
"""Objects that every cache has: init.json, index.jsonl, root.json."""
JOURNAL_BYTES = 400
"""Bytes of a shard's line in the journal, about."""


def plan_cache(
    recipe: TeacherRecipe,
    experts: tuple[Expert, ...],
    out: Path | str,
    *,
    sample_clips: int = 8,
    hours_per_task: float = 4.0,
    replace: Collection[str] = (),
) -> PlanReport:
    """Measure and add up what `mmkd-cache build` with the same arguments would do.

    Raises what the build raises before it starts: InputError, FingerprintError. StorageError where nothing can be
    written; the report's `check` raises it when the disk is too small.
    """
    store = open_store(out)
    require_own_place(store)
    build_plan = plan_build(recipe, experts, stored_init(store), replace=replace)
    there, init, objects = plan_init(
        store,
        build_plan.splits,
        manifest=build_plan.clip_set.manifest,
        base=build_plan.base,
        experts=build_plan.nodes,
        replace=replace,
    )
    missing = {(shard.name, node) for shard, node in init.missing(store)}
    known = there.objects if there else {}
    sizes = forecast_sizes(build_plan, init, objects, missing=missing, known=known)
    disk = measure_disk(store, sizes)
    done = {(shard.name, node) for shard, node, _ in init.wanted()} - missing
    works, _ = pending_shards(build_plan, done, task=(0, 1))
    device, workers = experts[0].device.type, recipe.data.workers
    splits = {
        split.layout.name: forecast(build_plan, split, works, sample_clips=sample_clips, device=device)
        for split in build_plan.splits
    }
    seconds = sum(split.clip_seconds * split.clips_left for split in splits.values())
    busy = sum(
        (split.prepare_seconds + split.device_seconds * device_threads(device)) * split.clips_left
        for split in splits.values()
    )
    tasks = max(1, math.ceil(seconds / 3600 / hours_per_task))
    return PlanReport(
        out=store.locate(),
        exists=there is not None,
        splits=splits,
        sizes=sizes,
        device=device,
        workers=workers,
        clips_per_second=sum(split.clips_left for split in splits.values()) / seconds if seconds else 0.0,
        seconds=seconds,
        core_hours=busy / 3600,
        tasks=tasks,
        disk=disk,
        advice=advise(recipe, splits, tasks=tasks, fixed=there is not None),
    )


def device_threads(device: str) -> int:
    """Return how many cores the device part of a clip keeps busy."""
    return torch.get_num_threads() if device == "cpu" else 1


def forecast(
    build_plan: BuildPlan, split: SplitPlan, works: Sequence[ShardWork], *, sample_clips: int, device: str
) -> SplitForecast:
    """Measure what a split's missing shards cost, on its part of the sample (one clip at least)."""
    own = [work for work in works if work.split is split]
    rows = sum(len(readable_rows(work)) for work in works)
    left = [len(readable_rows(work)) for work in own]
    layout = split.layout
    counts = {
        "clips": layout.rows,
        "views": layout.views,
        "shards": len(list(layout.shards())),
        "shards_left": len(own),
        "clips_left": sum(left),
        "unusable": sum(isinstance(video, VideoError) for video in split.items.videos),
    }
    if not sum(left):
        return SplitForecast(**counts)
    cost = measure_clips(build_plan, own, max(1, round(sample_clips * sum(left) / rows)))
    seconds = cost.seconds(
        build_plan.recipe.data.workers,
        cores=len(os.sched_getaffinity(0)),
        device_threads=device_threads(device),
    )
    return SplitForecast(
        **counts,
        prepare_seconds=cost.prepare_seconds,
        device_seconds=cost.device_seconds,
        clip_seconds=seconds,
        shard_seconds=seconds * max(left),
    )


def forecast_sizes(
    build_plan: BuildPlan,
    init: CacheInit,
    objects: Objects,
    *,
    missing: Collection[tuple[str, str]],
    known: Mapping[str, str],
) -> Sizes:
    """Add up a cache's bytes: static objects exactly, shards at most. `known` are static objects already there."""
    heads = {head: len(classes) for head, classes in init.base["heads"].items()}
    total: Counter[str] = Counter()
    left: Counter[str] = Counter()
    for split in build_plan.splits:
        shards = list(split.layout.shards())
        for node in (THUMBPRINT, *init.experts):
            found = node_size(objects, shards[-1], node, heads=heads)
            parts = Counter(raw=found.raw_bytes, blocks=found.block_bytes, records=found.record_bytes)
            parts["objects"] = found.objects
            lacking = sum((shard.name, node) in missing for shard in shards) * (node in build_plan.fingerprints)
            for name, count in parts.items():
                total[name] += count * len(shards)
                left[name] += count * lacking
            if node != THUMBPRINT:
                blocks = split.layout.views // split.layout.shard_views
                total["records"] += unusable_bytes(known_unusable(split)) * blocks
                left["records"] += unusable_bytes(known_unusable(split)) * blocks if lacking else 0
        total["journal"] += JOURNAL_BYTES * len(shards)
    changed = [len(data) for key, data in objects.items() if init.objects[key] != known.get(key)]
    fixed = len(init.to_bytes()) + ROOT_BYTES + total["records"] + total["journal"]
    at_work = bool(changed or left["objects"])
    return Sizes(
        bytes_per_view={
            name: 1 + sum(bytes_per_row(format_of(fields["precision"]), count) for count in heads.values())
            for name, fields in init.experts.items()
        },
        raw_bytes=total["raw"],
        bytes=sum(map(len, objects.values())) + total["blocks"] + total["records"] + fixed,
        bytes_left=sum(changed) + left["blocks"] + left["records"] + (fixed if at_work else 0),
        objects_left=len(changed) + left["objects"] + (FIXED_OBJECTS if at_work else 0),
    )


def known_unusable(split: SplitPlan) -> list[Unusable]:
    """Return the rows whose video the probe could not read: each expert's record will name them."""
    return [
        Unusable(row, split.clips[row].clip_id, int(Status.DECODE_FAILED), str(video))
        for row, video in enumerate(split.items.videos)
        if isinstance(video, VideoError)
    ]


def measure_disk(store: Store, sizes: Sizes) -> Disk:
    """Measure where the cache is to lie: the object store, or the nearest folder that exists.

    Raises InputError when a file is in the way, StorageError when nothing can be written there.
    """
    if isinstance(store, LocalStore):
        return measure_local(store, sizes)
    return disk_of(store.locate(), measure_writes(store), sizes)


def disk_of(place: str, rate: WriteRate, sizes: Sizes, *, free_bytes: int | None = None, block: int = 0) -> Disk:
    """Return what a place with so many free bytes, in blocks of a size, and that rate is for the cache."""
    return Disk(
        folder=place,
        free_bytes=free_bytes,
        needed_bytes=sizes.bytes_left + sizes.objects_left * block,
        bytes_per_second=rate.bytes_per_second,
        object_seconds=rate.object_seconds,
        writing_seconds=sizes.objects_left * rate.object_seconds + sizes.bytes_left / rate.bytes_per_second,
    )


def measure_local(store: LocalStore, sizes: Sizes) -> Disk:
    """Measure the file system on which the cache is to lie; raises as `measure_disk`."""
    folder = store.root.absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise InputError(f"{folder} is a file; name another place with -o")
    rate = measure_folder(folder)
    try:
        free, block = shutil.disk_usage(folder).free, os.statvfs(folder).f_frsize
    except OSError as error:
        raise StorageError(f"cannot tell the free space of {folder}: {error.strerror}") from error
    return disk_of(str(folder), rate, sizes, free_bytes=free, block=block)


def advise(recipe: TeacherRecipe, splits: Mapping[str, SplitForecast], *, tasks: int, fixed: bool) -> list[str]:
    """Return what would make shards of a good size: at most 10 minutes each, and 8 or more for each task."""
    longest = max(split.shard_seconds for split in splits.values())
    shards = sum(split.shards_left for split in splits.values())
    enough = tasks == 1 or shards >= TASK_SHARDS * tasks
    if longest <= SHARD_SECONDS and enough:
        return []
    problem = (
        f"a shard takes {longest / 60:.0f} min, which a killed task loses"
        if longest > SHARD_SECONDS
        else f"{counted(shards, 'shard', ARE)} few for {counted(tasks, 'task')}: some end long before the others"
    )
    if fixed:
        return [f"{problem}; the layout of a cache that was started stays"]
    rows, views = better_shards(recipe, splits, tasks=tasks)
    views_option = "" if views is None else f" --set build.shard_views={views}"
    return [f"{problem}; begin with --set build.shard_rows={rows}{views_option}"]


def better_shards(
    recipe: TeacherRecipe, splits: Mapping[str, SplitForecast], *, tasks: int
) -> tuple[int, int | None]:
    """Return shard_rows (whole inner chunks if possible) and, where fewer rows do not help, shard_views."""
    per_clip = max(split.clip_seconds for split in splits.values())
    clips = sum(split.clips_left for split in splits.values())
    rows = min(recipe.build.shard_rows, int(SHARD_SECONDS / per_clip), clips // (TASK_SHARDS * tasks))
    if rows >= INNER_ROWS:
        return rows // INNER_ROWS * INNER_ROWS, None
    block = recipe.build.shard_views or recipe.build.views
    smaller = [views for views in range(1, block) if recipe.build.views % views == 0]
    wanted = max(1, int(block * max(rows, 1) / INNER_ROWS))
    if not smaller:
        return max(1, rows), None
    return INNER_ROWS, max((views for views in smaller if views <= wanted), default=1)
