"""What is in a cache, for people and for programs."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmkd.cache_tools.cache.commits import CommitRecord, read_commit
from mmkd.cache_tools.cache.init_record import CacheInit, read_init
from mmkd.cache_tools.cache.reader import CacheReader
from mmkd.cache_tools.frames.clip_set import kind_of
from mmkd.cache_tools.layout import ROOT, THUMBPRINT, Status
from mmkd.cache_tools.storage.open import open_store
from mmkd.cache_tools.storage.store import Store
from mmkd.data_manifests.counted import counted

LISTED = 20
"""Unusable clips that are printed for each split and expert; --json has all."""


def describe_cache(cache: Path | str) -> dict[str, Any]:
    """Return everything worth knowing of a cache, finished or not, as JSON values.

    Of an unfinished one `fingerprint` is None, and `missing` says what its build still owes. Raises InputError for
    what is not a cache, VerificationError for a damaged one.
    """
    store = open_store(cache)
    if ROOT in store.top():  # not `exists`: a pipe or device of that name is damage, and no unfinished cache
        reader = CacheReader(store)
        found = describe_records(store, reader.init, reader.records)
        held_out = asdict(reader.held_out) if reader.held_out else None
        return found | {"fingerprint": reader.fingerprint, "held_out": held_out}
    init = read_init(store)
    records = (read_commit(store, shard, node, own) for shard, node, own in init.wanted())
    found = describe_records(store, init, [record for record in records if record is not None])
    return found | {"fingerprint": None, "held_out": None}


def describe_records(store: Store, init: CacheInit, records: Sequence[CommitRecord]) -> dict[str, Any]:
    """Return what a cache was asked to hold and what the given records say that it holds."""
    done = Counter((record.shard.partition("/")[0], record.node) for record in records)
    shards = {layout.name: len(list(layout.shards())) for layout in init.splits}
    nodes = init.fingerprints()
    left = {node: {name: count - done[name, node] for name, count in shards.items()} for node in nodes}
    experts = {
        name: {"modality": item["modality"], "weights_sha256": item["weights"], "precision": item["precision"]}
        for name, item in init.experts.items()
    }
    return {
        "dataset": init.dataset,
        "heads": {head.name: len(head.classes) for head in init.heads},
        "views": init.base["views"],
        "view_seed": init.view_seed,
        "train_split": init.train_split,
        "worst_kl_nats": max((value for record in records for value in record.worst_kl.values()), default=0.0),
        "experts": experts,
        "splits": {
            layout.name: {
                "clips": layout.rows,
                "views": layout.views,
                "shards": shards[layout.name],
                "unusable": _unusable(records, layout.name),
            }
            for layout in init.splits
        },
        "missing": {node: counts for node, counts in left.items() if any(counts.values())},
        "bytes": sum(stored.size_bytes for stored in store.list().values()),
        "environment": dict(init.environment),
    }


def _unusable(records: Sequence[CommitRecord], split: str) -> dict[str, list[dict[str, str]]]:
    """Return expert -> the clips of a split that it has no logits for."""
    found: dict[str, dict[int, dict[str, str]]] = {}
    for record in records:
        if record.node != THUMBPRINT and record.shard.startswith(f"{split}/"):
            for item in record.unusable:
                status = Status(item.status).name.lower()
                about = {"clip_id": item.clip_id, "status": status, "reason": item.reason}
                found.setdefault(record.node, {})[item.row] = about
    return {expert: [rows[row] for row in sorted(rows)] for expert, rows in found.items()}


def describe_lines(found: dict[str, Any]) -> list[str]:
    """Return the description as lines."""
    views = found["views"]
    heads = ", ".join(f"{head} ({counted(classes, 'class')})" for head, classes in found["heads"].items())
    lines = [
        f"data set     {found['dataset']}: {heads}",
        f"fingerprint  {(found['fingerprint'] or 'none yet')[:16]}",
        f"views        {views['sampling']}, {counted(views['frames'], 'frame')} of "
        f"{views['size_px']} x {views['size_px']}, "
        f"seed {found['view_seed']}",
        f"stored       {found['bytes'] / 2**20:.1f} MiB, worst error {found['worst_kl_nats']:.1e} nats",
    ]
    for node, counts in found["missing"].items():
        parts = ", ".join(f"{count} of {found['splits'][name]['shards']} {name}" for name, count in counts.items())
        lines.append(f"missing      {node}: shards {parts}; run the same `mmkd-cache build` again")
    for name, expert in found["experts"].items():
        weights = expert["weights_sha256"][:12]
        lines.append(f"expert       {name}: {expert['modality']}, weights {weights}, {expert['precision']}")
    for name, split in found["splits"].items():
        lines.append(
            f"split        {name}: {counted(split['clips'], 'clip')} x "
            f"{counted(split['views'], 'view')}, {counted(split['shards'], 'shard')}"
        )
        for expert, items in split["unusable"].items():
            lines.append(f"  {counted(len(items), 'clip')} without {expert} logits:")
            lines += [f"    {item['clip_id']}: {item['status']}: {item['reason']}" for item in items[:LISTED]]
            if len(items) > LISTED:
                lines.append(f"    ... {len(items) - LISTED} more; --json lists all; of all clips:")
                kinds = Counter(kind_of(item["reason"]) for item in items)
                lines += [f"    {counted(count, 'clip')}: {kind}" for kind, count in kinds.most_common(LISTED)]
    return lines
