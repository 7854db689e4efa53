"""Starting a cache: rows, views and fingerprints are fixed before the first clip is decoded, or found the same.

`initialise` writes the static part of the group and init.json, or, where they exist, checks field by field that
the build would compute the same numbers, and lets the cache grow by experts and views.
"""

import platform
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from mmkd.cache_tools.cache.arrays import Objects, array_of, encode_group, split_arrays, static_arrays
from mmkd.cache_tools.cache.clip_rows import base_differences
from mmkd.cache_tools.cache.commits import drop_all, hash_objects
from mmkd.cache_tools.cache.fingerprints import refuse_differences, require_same
from mmkd.cache_tools.cache.init_record import CacheInit, read_init
from mmkd.cache_tools.cache.logit_formats import format_of
from mmkd.cache_tools.layout import GROUP, INDEX, INIT, ROOT, SplitLayout, group_key
from mmkd.cache_tools.storage.store import MissingObjectError, Store, TakenOverError
from mmkd.cache_tools.views.canonical import THUMBNAIL_SIZE
from mmkd.cache_tools.views.held_out import HeldOut
from mmkd.data_manifests.errors import FingerprintError, InputError, VideoError
from mmkd.data_manifests.manifest import Manifest
from mmkd.pipeline.build.work import FLOW_FIELD, ExpertNode, SplitPlan

NEW_PLACE = "Build into another directory, or restore what changed"


def static_values(plan: SplitPlan, manifest: Manifest) -> dict[str, Any]:
    """Return array name -> contents of one split's static arrays."""
    labels = {
        head.name: np.array(
            [-1 if clip.labels[head.name] is None else clip.labels[head.name] for clip in plan.clips],
            np.int64,
        )
        for head in manifest.heads
    }
    values = {
        "clip_id": [clip.clip_id for clip in plan.clips],
        "video_identity": ["" if isinstance(video, VideoError) else video.identity for video in plan.items.videos],
        "facts": plan.items.facts,
        "frame_index": plan.drawn.frame_index,
        "crop_xywh": plan.drawn.crop_xywh,
        "flip": plan.drawn.flip,
    }
    return static_arrays(plan.layout.name, values, labels)


def initialise(
    store: Store,
    plans: Sequence[SplitPlan],
    *,
    manifest: Manifest,
    base: Mapping[str, Any],
    experts: Mapping[str, ExpertNode],
    replace: Collection[str] = (),
    still_ours: Callable[[], bool] = lambda: True,
) -> tuple[CacheInit, Objects]:
    """Write a cache's static part, or let the one there grow; return its init record and static objects.

    The caller holds the claim on the cache as a whole; `still_ours` tells whether it was taken over meanwhile.
    Raises as `plan_init`, and StorageError when it was.
    """
    there, init, objects = plan_init(store, plans, manifest=manifest, base=base, experts=experts, replace=replace)
    if there != init:
        for key in (ROOT, INDEX):  # from here on the cache is unfinished
            store.delete(key)
    if there is None:
        drop_unproven(store, objects)
    else:
        # The new logits take the place of the old ones, so no older record may ever vouch for them again.
        old, new = there.experts, init.experts
        if replaced := {name for name in old if old[name] != new[name]}:
            drop_all(store, replaced)
    write_missing(store, objects, still_ours)
    if there != init:
        refuse_late(store, still_ours)
        # Written last: a group without it is a leftover, and is written again.
        store.write(INIT, init.to_bytes())
    return init, objects


def plan_init(
    store: Store,
    plans: Sequence[SplitPlan],
    *,
    manifest: Manifest,
    base: Mapping[str, Any],
    experts: Mapping[str, ExpertNode],
    replace: Collection[str] = (),
) -> tuple[CacheInit | None, CacheInit, Objects]:
    """Return the init record that is there, or None, the one to be, and all static objects; write nothing.

    A cache may be given further experts, more views, and other experts in the place of those named in `replace`.
    Raises FingerprintError with a field-by-field difference for anything else that differs.
    """
    fields = {name: node.fields for name, node in experts.items()}
    held_out = {name: HeldOut(**node.held_out) for name, node in experts.items()}
    layouts = tuple(plan.layout for plan in plans)
    there = stored_init(store)
    if there is not None:
        refuse_differences(
            base_differences(store, there, base, manifest),
            what=f"{store.locate()}: the data or its views",
            advice=NEW_PLACE,
        )
        check_same(store.locate(), there, layouts=layouts, experts=fields, replace=replace)
        fields = {**there.experts, **fields}
        held_out = {**there.held_out, **held_out}
    objects = static_objects(plans, manifest, fields)
    hashes = hash_objects(objects)
    if there is not None:
        changed = [key for key, value in there.objects.items() if hashes.get(key, value) != value]
        if contents := [key for key in changed if not key.endswith("zarr.json")]:
            raise FingerprintError(
                f"{store.locate()}: the videos changed since the cache was started (in {contents[0]}). "
                f"{NEW_PLACE}. "
                "Where videos could not be read then and can be now, build with --retry-unusable"
            )
    versions = environment() if there is None else there.environment
    return there, CacheInit(base, fields, layouts, held_out, hashes, versions), objects


def static_objects(
    plans: Sequence[SplitPlan], manifest: Manifest, experts: Mapping[str, Mapping[str, Any]]
) -> Objects:
    """Return what init writes of the Zarr group: every array's metadata and the contents of the static ones."""
    static: dict[str, Any] = {}
    specs = []
    heads = {head.name: len(head.classes) for head in manifest.heads}
    storage = {name: format_of(fields["precision"]) for name, fields in experts.items()}
    for plan in plans:
        static |= static_values(plan, manifest)
        arrays = split_arrays(plan.layout, storage, heads, thumbnail_size=THUMBNAIL_SIZE)
        specs += [(spec, plan.layout) for spec in arrays]
    return encode_group(static, specs, {plan.layout.name: plan.layout.shard_views for plan in plans})


def drop_unproven(store: Store, objects: Objects) -> None:
    """Remove all commit records of a cache whose init.json is gone, unless they are of these same static objects.

    Fingerprints do not cover the videos and the blocks, init.json does: without it a shard may be one of other
    videos. An array of which nothing is there yet is a new expert's.
    """
    there = store.list(GROUP)
    started = {array_of(key.removeprefix(f"{GROUP}/")) for key in there}
    wanted = {key: data for key, data in objects.items() if array_of(key) in started}
    whole = all(key in there for key in (group_key(key) for key in wanted))
    if not whole or any(store.read(group_key(key)) != data for key, data in wanted.items()):
        drop_all(store)


def write_missing(store: Store, objects: Objects, still_ours: Callable[[], bool]) -> None:
    """Write those static objects that are absent or different: metadata of a group that grew, or a torn start."""
    there = store.list(GROUP)
    for key, data in objects.items():
        stored = there.get(group_key(key))
        if stored is None or stored.size_bytes != len(data) or store.read(group_key(key)) != data:
            refuse_late(store, still_ours)
            store.write(group_key(key), data)


def refuse_late(store: Store, still_ours: Callable[[], bool]) -> None:
    """Raise StorageError when this task slept and another one started or changed the cache in its place."""
    if not still_ours():
        raise TakenOverError(store.locate())


def stored_init(store: Store) -> CacheInit | None:
    """Return the init record of the cache that was started there, or None."""
    try:
        store.read(INIT)
    except MissingObjectError:
        return None
    return read_init(store)


def check_same(
    where: str,
    stored: CacheInit,
    *,
    layouts: Sequence[SplitLayout],
    experts: Mapping[str, Mapping[str, Any]],
    replace: Collection[str],
) -> None:
    """Raise FingerprintError unless the build would add to the layout and teacher that are stored, and change none.

    Raises InputError for an expert to replace that is not given.
    """
    old, new = ({item.name: asdict(item) for item in items} for items in (stored.splits, layouts))
    for name in old.keys() & new.keys():
        if new[name]["views"] > old[name]["views"]:
            new[name]["views"] = old[name]["views"]
    require_same(old, new, what=f"{where}: the layout", advice=layout_advice(old, new))
    if unknown := set(replace) - set(experts):
        raise InputError(f"--replace {sorted(unknown)[0]}: give that expert with --expert, too")
    kept = {name: fields for name, fields in stored.experts.items() if name in experts and name not in replace}
    require_same(
        {"experts": kept},
        {"experts": {name: experts[name] for name in kept}},
        what=f"{where}: the teacher",
        advice=f"{flow_advice(kept, experts)}Give --replace NAME to compute that expert again, or build into "
        "another directory",
    )


def flow_advice(kept: Mapping[str, Mapping[str, Any]], experts: Mapping[str, Mapping[str, Any]]) -> str:
    """Return what to do where flow files are not those that the cache's experts saw."""
    if all(fields.get(FLOW_FIELD) == experts[name].get(FLOW_FIELD) for name, fields in kept.items()):
        return ""
    return "If flow was missing and has come since, --retry-unusable computes what lacked it. "


def layout_advice(old: Mapping[str, Mapping[str, Any]], new: Mapping[str, Mapping[str, Any]]) -> str:
    """Return how to keep the layout (split -> fields) of the cache that is there."""
    if old.keys() != new.keys():
        return f"Give --set build.splits=[{','.join(old)}], the cache's. {NEW_PLACE}"
    changed = {key: old[name][key] for name in old for key in old[name] if old[name][key] != new[name][key]}
    if "views" in changed:
        return f"Views can only be added. {NEW_PLACE}"
    options = " ".join(
        f"--set build.{key}={changed[key]}" for key in ("shard_rows", "shard_views") if key in changed
    )
    return f"Blocks stay as they are: give {options}. {NEW_PLACE}" if options else NEW_PLACE


def environment() -> dict[str, str]:
    """Return the versions that the numbers were made with: recorded, but part of no fingerprint."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in (
        "mmkd",
        "torch",
        "torchvision",
        "numpy",
        "opencv-python-headless",
        "av",
        "decord",
        "zarr",
    ):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found
