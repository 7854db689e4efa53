"""A finished cache of given logits, written by the cache's own parts, without videos, experts or a build."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np

from mmkd.cache_tools.arrays import encode_block, encode_group, split_arrays, static_arrays
from mmkd.cache_tools.canonical import THUMBNAIL_SIZE
from mmkd.cache_tools.commits import CommitRecord, Unusable, hash_objects, publish
from mmkd.cache_tools.finalize import finalize, node_fingerprints, seal
from mmkd.cache_tools.heldout import HeldOut
from mmkd.cache_tools.layout import (
    INIT,
    SCHEMA,
    THUMBPRINT,
    Shard,
    SplitLayout,
    Status,
    group_key,
    part_array,
    thumbprint_arrays,
)
from mmkd.cache_tools.precision import encode_logits
from mmkd.cache_tools.storage_formats import FORMATS
from mmkd.cache_tools.store import LocalStore
from mmkd.data_manifests.records import Manifest

FRAMES = 2


def write_cache(
    root: Path,
    manifest: Manifest,
    logits: Mapping[str, Mapping[str, Mapping[str, np.ndarray]]],
    *,
    held_out: HeldOut | None = None,
    shard_rows: int = 4,
) -> LocalStore:
    """Write logits[split][expert][head] (rows, views, classes); an expert's NaN rows are stored as unusable."""
    store = LocalStore(root)
    layouts = {
        name: SplitLayout(name, *next(iter(next(iter(experts.values())).values())).shape[:2], shard_rows, 1)
        for name, experts in logits.items()
    }
    experts = tuple(next(iter(logits.values())))
    heads = {head.name: len(head.classes) for head in manifest.heads}
    static, specs = {}, []
    for layout in layouts.values():
        static |= static_values(manifest, layout)
        arrays = split_arrays(layout, dict.fromkeys(experts, FORMATS["fp16"]), heads, thumbnail_size=THUMBNAIL_SIZE)
        specs += [(spec, layout) for spec in arrays]
    objects = encode_group(static, specs, dict.fromkeys(layouts, 1))
    for key, data in objects.items():
        store.write(group_key(key), data)
    init = {
        "schema": SCHEMA,
        "base": {
            "dataset": manifest.dataset,
            "heads": {head.name: list(head.classes) for head in manifest.heads},
            "manifest": manifest.fingerprint(),
        },
        "experts": {name: {"weights": name, "precision": FORMATS["fp16"].name} for name in experts},
        "splits": [asdict(layout) for layout in layouts.values()],
        "held_out": {name: asdict(held_out or HeldOut(0.0, 0)) for name in experts},
        "objects": hash_objects(objects),
    }
    store.write(INIT, json.dumps(seal(init)).encode())
    nodes = node_fingerprints(init)
    for name, layout in layouts.items():
        for shard in layout.shards():
            publish_thumbprints(store, shard, nodes[THUMBPRINT], objects)
            for expert in experts:
                publish_shard(store, shard, expert, logits[name][expert], objects, nodes[expert])
    finalize(store)
    return store


def static_values(manifest: Manifest, layout: SplitLayout) -> dict:
    clips, grid = manifest.split(layout.name), (layout.rows, layout.views)
    values = {
        "clip_id": [clip.clip_id for clip in clips],
        "facts": np.tile(np.array([64, 48, 0, 9], np.int32), (layout.rows, 1)),
        "frame_index": np.zeros((*grid, FRAMES), np.int32),
        "crop_xywh": np.tile(np.array([0, 0, 48, 48], np.int32), (*grid, 1)),
        "flip": np.zeros(grid, np.bool_),
    }
    labels = {
        head.name: np.array([-1 if (label := clip.labels[head.name]) is None else label for clip in clips])
        for head in manifest.heads
    }
    return static_arrays(layout.name, values, labels)


def publish_thumbprints(store: LocalStore, shard: Shard, fingerprint: str, metadata: Mapping) -> None:
    start = (shard.rows.start, shard.views.start)
    grid = (shard.split.shard_rows, len(shard.views))
    objects = {}
    for name, block in zip(
        thumbprint_arrays(shard.split.name),
        (np.zeros(grid, np.uint64), np.zeros((*grid, THUMBNAIL_SIZE), np.uint8)),
        strict=True,
    ):
        objects |= encode_block(name, metadata[f"{name}/zarr.json"], start=start, block=block)
    publish(store, shard, CommitRecord(shard.name, THUMBPRINT, fingerprint, hash_objects(objects)), objects)


def publish_shard(
    store: LocalStore, shard: Shard, expert: str, logits: Mapping, metadata: Mapping, fingerprint: str
) -> None:
    """Publish one expert's node of one shard."""
    split, rows = shard.split, slice(shard.rows.start, shard.rows.stop)
    start, count = (shard.rows.start, shard.views.start), len(shard.rows)
    blocks = {}
    ok = np.zeros((split.shard_rows, len(shard.views)), np.bool_)
    ok[:count] = np.logical_and.reduce([np.isfinite(value[rows, shard.views]).all(-1) for value in logits.values()])
    for head, value in logits.items():
        shifted = np.full((*ok.shape, value.shape[-1]), np.nan, np.float16)
        maximum = np.full(ok.shape, np.nan, np.float32)
        shifted[ok], maximum[ok] = encode_logits(value[rows, shard.views][ok[:count]])
        blocks[part_array(split.name, expert, "logits", head=head)] = shifted
        blocks[part_array(split.name, expert, "maximum", head=head)] = maximum
    status = np.where(ok, Status.OK, Status.FLOW_FAILED).astype(np.uint8)
    status[count:] = Status.NOT_COMPUTED
    blocks[f"{split.name}/{expert}/status"] = status
    objects = {}
    for name, block in blocks.items():
        objects |= encode_block(name, metadata[f"{name}/zarr.json"], start=start, block=block)
    unusable = tuple(
        Unusable(start[0] + row, f"clip-{start[0] + row}", int(Status.FLOW_FAILED), "as the test wants it")
        for row in np.flatnonzero(~ok[:count].all(1)).tolist()
    )
    record = CommitRecord(shard.name, expert, fingerprint, hash_objects(objects), unusable)
    publish(store, shard, record, objects)
