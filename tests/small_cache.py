"""A finished cache of given logits, written by the cache's own parts, without videos, experts or a build."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np

from mmkd.cache_tools.arrays import encode_block, encode_group, split_arrays, static_arrays
from mmkd.cache_tools.atomic import write_atomically
from mmkd.cache_tools.canonical import THUMBNAIL_SIZE
from mmkd.cache_tools.commits import CommitRecord, Unusable, hash_objects, publish
from mmkd.cache_tools.fingerprints import file_sha256
from mmkd.cache_tools.heldout import HeldOut
from mmkd.cache_tools.layout import SCHEMA, CachePaths, Shard, SplitLayout, Status, logits_array, maximum_array
from mmkd.cache_tools.precision import encode_logits
from mmkd.cache_tools.reader import seal
from mmkd.data_manifests.records import Manifest

FRAMES = 2


def write_cache(
    root: Path,
    manifest: Manifest,
    logits: Mapping[str, Mapping[str, Mapping[str, np.ndarray]]],
    *,
    held_out: HeldOut | None = None,
    shard_rows: int = 4,
) -> CachePaths:
    """Write logits[split][expert][head] (rows, views, classes); an expert's NaN rows are stored as unusable."""
    paths = CachePaths(root)
    layouts = {
        name: SplitLayout(name, *next(iter(next(iter(experts.values())).values())).shape[:2], shard_rows, 1)
        for name, experts in logits.items()
    }
    experts = tuple(next(iter(logits.values())))
    heads = {head.name: len(head.classes) for head in manifest.heads}
    static, specs = {}, []
    for layout in layouts.values():
        static |= static_values(manifest, layout)
        arrays = split_arrays(layout, experts, heads, thumbnail_size=THUMBNAIL_SIZE)
        specs += [(spec, layout) for spec in arrays]
    objects = encode_group(static, specs)
    for key, data in objects.items():
        write_atomically(paths.group / key, data)
    init = {
        "schema": SCHEMA,
        "base": {
            "dataset": manifest.dataset,
            "heads": {head.name: list(head.classes) for head in manifest.heads},
            "manifest": manifest.fingerprint(),
        },
        "experts": {name: {} for name in experts},
        "splits": [asdict(layout) for layout in layouts.values()],
        "held_out": asdict(held_out) if held_out else None,
        "objects": hash_objects(objects),
    }
    write_atomically(paths.init, json.dumps(init).encode())
    records = {}
    for name, layout in layouts.items():
        for shard in layout.shards():
            for expert in experts:
                publish_shard(paths, shard, expert, logits[name][expert], objects)
                path = paths.commit(shard, expert)
                records[path.relative_to(root).as_posix()] = file_sha256(path)
    final = {"schema": SCHEMA, "init": file_sha256(paths.init), "records": records}
    write_atomically(paths.final, json.dumps(final | {"seal": seal(final)}).encode())
    return paths


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


def publish_shard(paths: CachePaths, shard: Shard, expert: str, logits: Mapping, metadata: Mapping) -> None:
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
        blocks[logits_array(split.name, expert, head)] = shifted
        blocks[maximum_array(split.name, expert, head)] = maximum
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
    record = CommitRecord(shard.name, expert, "f" * 64, hash_objects(objects), unusable)
    publish(paths, shard, record, objects)
