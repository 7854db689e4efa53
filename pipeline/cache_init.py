"""Starting a cache: rows, views and fingerprints are fixed before the first clip is decoded, or found the same.

`initialise` writes the static part of the group and init.json, or, where they exist, checks field by field that
the build would compute the same numbers.
"""

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mmkd.cache_tools.arrays import Objects, encode_group, split_arrays, static_arrays
from mmkd.cache_tools.atomic import write_atomically
from mmkd.cache_tools.canonical import CANONICAL_RULES, THUMBNAIL_SIZE
from mmkd.cache_tools.commits import hash_objects
from mmkd.cache_tools.data import ClipVideo
from mmkd.cache_tools.fingerprints import fingerprint, require_same
from mmkd.cache_tools.frames import DECODER_RULES
from mmkd.cache_tools.heldout import HeldOut
from mmkd.cache_tools.layout import SCHEMA, CachePaths, SplitLayout
from mmkd.cache_tools.precision import FORMAT
from mmkd.cache_tools.records import View
from mmkd.cache_tools.views import VIEW_RULES, ViewPolicy, evaluation_views, random_views
from mmkd.data_manifests.errors import FingerprintError, VideoError
from mmkd.data_manifests.records import Clip, Manifest

NEW_PLACE = "Build into another directory, or restore what changed"


@dataclass(frozen=True)
class SplitPlan:
    """One split with everything that is known before decoding."""

    layout: SplitLayout
    """Rows, views and blocks."""
    clips: tuple[Clip, ...]
    """The manifest's rows, in order."""
    items: list[ClipVideo | VideoError]
    """(rows,) facts, or why there are none."""
    views: list[tuple[View, ...]]
    """(rows,) views of each clip; empty where there are no facts."""


def base_fields(manifest: Manifest, policy: ViewPolicy, *, train_split: str, view_seed: int) -> dict[str, Any]:
    """Return the base node: everything that could change what a view shows or means."""
    return {
        "schema": SCHEMA,
        "dataset": manifest.dataset,
        "manifest": manifest.fingerprint(),
        "heads": {head.name: list(head.classes) for head in manifest.heads},
        "train_split": train_split,
        "views": policy.model_dump(mode="json"),
        "view_seed": view_seed,
        "view_rules": VIEW_RULES,
        "canonical": CANONICAL_RULES,
        "decoder": DECODER_RULES,
        "precision": FORMAT,
    }


def draw_views(
    item: ClipVideo | VideoError,
    policy: ViewPolicy,
    *,
    manifest: Manifest,
    seed: int,
    training_views: int | None,
) -> tuple[View, ...]:
    """Return a clip's random views (0..training_views-1), or its evaluation views; none without facts."""
    if isinstance(item, VideoError):
        return ()
    if training_views is None:
        return evaluation_views(item.facts, policy)
    return random_views(
        item.facts,
        policy,
        dataset=manifest.dataset,
        clip_id=item.clip.clip_id,
        seed=seed,
        flip_allowed=manifest.flip_allowed,
        numbers=range(training_views),
    )


def static_values(plan: SplitPlan, manifest: Manifest, frames: int) -> dict[str, Any]:
    """Return array name -> contents of one split's static arrays."""
    rows, views = plan.layout.rows, plan.layout.views
    facts = np.zeros((rows, 4), np.int32)
    frame_index = np.zeros((rows, views, frames), np.int32)
    crop_xywh = np.zeros((rows, views, 4), np.int32)
    flip = np.zeros((rows, views), np.bool_)
    identity = [""] * rows
    for row, (item, drawn) in enumerate(zip(plan.items, plan.views, strict=True)):
        if isinstance(item, VideoError):
            continue
        identity[row] = item.video.identity
        facts[row] = (item.facts.width, item.facts.height, item.facts.first_frame, item.facts.frame_count)
        for number, view in enumerate(drawn):
            frame_index[row, number] = view.frame_indices
            crop_xywh[row, number] = view.crop_xywh
            flip[row, number] = view.flip
    labels = {
        head.name: np.array(
            [-1 if clip.labels[head.name] is None else clip.labels[head.name] for clip in plan.clips],
            np.int64,
        )
        for head in manifest.heads
    }
    values = {
        "clip_id": [clip.clip_id for clip in plan.clips],
        "video_identity": identity,
        "facts": facts,
        "frame_index": frame_index,
        "crop_xywh": crop_xywh,
        "flip": flip,
    }
    return static_arrays(plan.layout.name, values, labels)


def initialise(
    paths: CachePaths,
    plans: Sequence[SplitPlan],
    *,
    manifest: Manifest,
    base: Mapping[str, Any],
    experts: Mapping[str, Mapping[str, Any]],
    held_out: HeldOut | None,
) -> Objects:
    """Write a cache's static part, or check that the one there is the same; return its objects.

    Raises FingerprintError with a field-by-field difference when it is not.
    """
    static: dict[str, Any] = {}
    specs = []
    heads = {head.name: len(head.classes) for head in manifest.heads}
    for plan in plans:
        static |= static_values(plan, manifest, base["views"]["frames"])
        arrays = split_arrays(plan.layout, experts, heads, thumbnail_size=THUMBNAIL_SIZE)
        specs += [(spec, plan.layout) for spec in arrays]
    objects = encode_group(static, specs)
    init = {
        "schema": SCHEMA,
        "base": dict(base),
        "experts": {name: dict(fields) for name, fields in experts.items()},
        "splits": [asdict(plan.layout) for plan in plans],
        "held_out": asdict(held_out) if held_out else None,
        "objects": hash_objects(objects),
    }
    if paths.init.exists():
        _check_same(paths, init)
    else:
        for key, data in objects.items():
            write_atomically(paths.group / key, data)
        # Written last: a group without it is a leftover, and is written again.
        write_atomically(paths.init, (json.dumps(init | {"environment": environment()}, indent=1) + "\n").encode())
    return objects


def _check_same(paths: CachePaths, init: Mapping[str, Any]) -> None:
    stored = json.loads(paths.init.read_bytes())
    for part, what in (
        ("base", "the data or its views"),
        ("experts", "the teacher"),
        ("held_out", "the held-out part"),
    ):
        require_same({part: stored.get(part)}, {part: init[part]}, what=f"{paths.root}: {what}", advice=NEW_PLACE)
    layouts = [{item["name"]: item for item in value["splits"]} for value in (stored, init)]
    require_same(*layouts, what=f"{paths.root}: the layout", advice=NEW_PLACE)
    changed = [key for key, value in init["objects"].items() if stored["objects"].get(key) != value]
    if changed:
        raise FingerprintError(
            f"{paths.root}: the videos changed since the cache was started (in {changed[0]}). {NEW_PLACE}"
        )


def expert_fingerprint(base: Mapping[str, Any], fields: Mapping[str, Any]) -> str:
    """Return the fingerprint of an expert's node: its own fields over the base."""
    return fingerprint({"base": fingerprint(base), "expert": dict(fields)})


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
