"""A finished cache of given logits, written by the cache's own parts, without videos, experts or a build."""

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mmkd.cache_tools.cache.arrays import Objects, encode_block, encode_group, split_arrays, static_arrays
from mmkd.cache_tools.cache.commits import CommitRecord, Unusable, hash_objects, publish
from mmkd.cache_tools.cache.init_record import CacheInit
from mmkd.cache_tools.cache.logit_formats import FORMATS, StorageFormat
from mmkd.cache_tools.frames.records import ClipFacts
from mmkd.cache_tools.layout import (
    INIT,
    THUMBPRINT,
    Shard,
    SplitLayout,
    Status,
    group_key,
    part_array,
    status_array,
    thumbprint_arrays,
)
from mmkd.cache_tools.storage.local_store import LocalStore
from mmkd.cache_tools.storage.store import Store
from mmkd.cache_tools.tasks.finish import finalize_cache
from mmkd.cache_tools.views.canonical import THUMBNAIL_SIZE
from mmkd.cache_tools.views.drawing import ViewPolicy, evaluation_views, random_views
from mmkd.cache_tools.views.held_out import HeldOut
from mmkd.cache_tools.views.view import View
from mmkd.data_manifests.manifest import Manifest
from mmkd.pipeline.build.work import base_fields

POLICY, VIEW_SEED = ViewPolicy(frames=2, size_px=24), 3
FACTS = ClipFacts(64, 48, 0, 9)


def write_cache(
    root: Path | Store,
    manifest: Manifest,
    logits: Mapping[str, Mapping[str, Mapping[str, np.ndarray]]],
    *,
    held_out: HeldOut | None = None,
    shard_rows: int = 4,
    shard_views: int = 1,
    precision: str = "fp16",
) -> Store:
    """Write logits[split][expert][head] (rows, views, classes); an expert's NaN rows are stored as unusable.

    The training split has the random views of POLICY, as every split whose views are not as many as it has for
    evaluation.
    """
    store = LocalStore(root) if isinstance(root, Path) else root
    layouts = {}
    for name, experts in logits.items():
        rows, views = next(iter(next(iter(experts.values())).values())).shape[:2]
        layouts[name] = SplitLayout(name, rows, views, shard_rows, shard_views if views % shard_views == 0 else 1)
    storage = FORMATS[precision]
    experts = tuple(next(iter(logits.values())))
    heads = {head.name: len(head.classes) for head in manifest.heads}
    static, specs = {}, []
    for layout in layouts.values():
        static |= static_values(manifest, layout)
        arrays = split_arrays(layout, dict.fromkeys(experts, storage), heads, thumbnail_size=THUMBNAIL_SIZE)
        specs += [(spec, layout) for spec in arrays]
    objects = encode_group(static, specs, {name: layout.shard_views for name, layout in layouts.items()})
    for key, data in objects.items():
        store.write(group_key(key), data)
    init = CacheInit(
        base=base_fields(manifest, POLICY, train_split="train", view_seed=VIEW_SEED),
        experts={name: {"weights": name, "modality": name, "precision": storage.name} for name in experts},
        splits=tuple(layouts.values()),
        held_out={name: held_out or HeldOut(0.0, 0) for name in experts},
        objects=hash_objects(objects),
        environment={"mmkd": "of a test"},
    )
    store.write(INIT, init.to_bytes())
    nodes = init.fingerprints()
    for name, layout in layouts.items():
        clip_ids = [clip.clip_id for clip in manifest.split(name)]
        for shard in layout.shards():
            publish_thumbprints(store, shard, nodes[THUMBPRINT], metadata=objects, clip_ids=clip_ids)
            for expert in experts:
                blocks, unusable = expert_blocks(shard, expert, logits[name][expert], storage, clip_ids)
                encoded = encode_blocks(shard, blocks, objects)
                record = CommitRecord(shard.name, expert, nodes[expert], hash_objects(encoded), unusable)
                publish(store, shard, record, encoded)
    finalize_cache(store)
    return store


def static_values(manifest: Manifest, layout: SplitLayout) -> dict:
    clips = manifest.split(layout.name)
    drawn = [draw(manifest, layout, clip.clip_id) for clip in clips]
    values = {
        "clip_id": [clip.clip_id for clip in clips],
        "video_identity": [f"identity of {clip.video}" for clip in clips],
        "facts": np.tile(np.array([64, 48, 0, 9], np.int32), (layout.rows, 1)),
        "frame_index": np.array([[view.frame_indices for view in views] for views in drawn], np.int32),
        "crop_xywh": np.array([[view.crop_xywh for view in views] for views in drawn], np.int32),
        "flip": np.array([[view.flip for view in views] for views in drawn], np.bool_),
    }
    labels = {
        head.name: np.array([-1 if (label := clip.labels[head.name]) is None else label for clip in clips])
        for head in manifest.heads
    }
    return static_arrays(layout.name, values, labels)


def draw(manifest: Manifest, layout: SplitLayout, clip_id: str) -> tuple[View, ...]:
    """The views of a clip, by the rules of a build."""
    if layout.name != "train" and layout.views == POLICY.evaluation_views:
        return evaluation_views(FACTS, POLICY)
    return random_views(
        FACTS,
        POLICY,
        dataset=manifest.dataset,
        clip_id=clip_id,
        seed=VIEW_SEED,
        flip_allowed=manifest.flip_allowed,
        numbers=range(layout.views),
    )


def publish_thumbprints(
    store: Store, shard: Shard, fingerprint: str, *, metadata: Mapping, clip_ids: Sequence[str]
) -> None:
    """Publish thumbprints that are a function of clip and view."""
    grid = (shard.split.shard_rows, len(shard.views))
    hashes, thumbnails = np.zeros(grid, np.uint64), np.zeros((*grid, THUMBNAIL_SIZE), np.uint8)
    for row in shard.rows:
        for view in shard.views:
            place = row - shard.rows.start, view - shard.views.start
            hashes[place] = zlib.crc32(f"{clip_ids[row]} {view}".encode())
            thumbnails[place] = hashes[place] % 251
    blocks = dict(zip(thumbprint_arrays(shard.split.name), (hashes, thumbnails), strict=True))
    objects = encode_blocks(shard, blocks, metadata)
    publish(store, shard, CommitRecord(shard.name, THUMBPRINT, fingerprint, hash_objects(objects)), objects)


def encode_blocks(shard: Shard, blocks: Mapping[str, np.ndarray], metadata: Mapping) -> Objects:
    start = (shard.rows.start, shard.views.start)
    objects = {}
    for name, block in blocks.items():
        objects |= encode_block(name, metadata[f"{name}/zarr.json"], start=start, block=block)
    return objects


def expert_blocks(
    shard: Shard, expert: str, logits: Mapping, storage: StorageFormat, clip_ids: Sequence[str]
) -> tuple[dict[str, np.ndarray], tuple[Unusable, ...]]:
    """Array name -> block of one expert's node of one shard, and its unusable clips."""
    split, rows = shard.split, slice(shard.rows.start, shard.rows.stop)
    count = len(shard.rows)
    ok = np.zeros((split.shard_rows, len(shard.views)), np.bool_)
    found = {head: value[rows, shard.views.start : shard.views.stop] for head, value in logits.items()}
    ok[:count] = np.logical_and.reduce([np.isfinite(value).all(-1) for value in found.values()])
    blocks = {}
    for head, value in found.items():
        padded = np.full((*ok.shape, value.shape[-1]), np.nan, np.float32)
        padded[ok] = value[ok[:count]]
        for part, block in storage.encode(padded).items():
            blocks[part_array(split.name, expert, part, head=head)] = block
    status = np.where(ok, Status.OK, Status.FLOW_FAILED).astype(np.uint8)
    status[count:] = Status.NOT_COMPUTED
    blocks[status_array(split.name, expert)] = status
    unusable = tuple(
        Unusable(rows.start + row, clip_ids[rows.start + row], int(Status.FLOW_FAILED), "as the test wants it")
        for row in np.flatnonzero(~ok[:count].all(1)).tolist()
    )
    return blocks, unusable
