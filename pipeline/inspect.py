"""What is in a cache, for people and for programs."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmkd.cache_tools.layout import Status
from mmkd.cache_tools.reader import CacheReader
from mmkd.data_manifests.counted import counted

LISTED = 20
"""Unusable clips that are printed for each split and expert; --json has all."""


def describe(cache: Path | str) -> dict[str, Any]:
    """Return everything worth knowing of a finished cache, as JSON values."""
    reader = CacheReader(cache)
    splits = {}
    for name, layout in reader.layouts.items():
        splits[name] = {
            "clips": layout.rows,
            "views": layout.views,
            "shards": len(list(layout.shards())),
            "unusable": {
                expert: [
                    {
                        "clip_id": item.clip_id,
                        "status": Status(item.status).name.lower(),
                        "reason": item.reason,
                    }
                    for item in items
                ]
                for expert, items in reader.unusable(name).items()
                if items
            },
        }
    return {
        "dataset": reader.dataset,
        "fingerprint": reader.fingerprint,
        "heads": {head.name: len(head.classes) for head in reader.heads},
        "views": reader.init.base["views"],
        "view_seed": reader.init.view_seed,
        "train_split": reader.init.train_split,
        "held_out": asdict(reader.held_out) if reader.held_out else None,
        "worst_kl_nats": max(
            (value for record in reader.records for value in record.worst_kl.values()), default=0.0
        ),
        "experts": {
            name: {
                "modality": fields["modality"],
                "weights_sha256": fields["weights"],
                "precision": fields["precision"],
            }
            for name, fields in reader.init.experts.items()
        },
        "splits": splits,
        "bytes": sum(stored.size_bytes for stored in reader.store.list().values()),
        "environment": dict(reader.init.environment),
    }


def describe_lines(found: dict[str, Any]) -> list[str]:
    """Return the description as lines."""
    views = found["views"]
    heads = ", ".join(f"{head} ({counted(classes, 'class')})" for head, classes in found["heads"].items())
    lines = [
        f"data set     {found['dataset']}: {heads}",
        f"fingerprint  {found['fingerprint'][:16]}",
        f"views        {views['sampling']}, {counted(views['frames'], 'frame')} of "
        f"{views['size_px']} x {views['size_px']}, "
        f"seed {found['view_seed']}",
        f"stored       {found['bytes'] / 2**20:.1f} MiB, worst error {found['worst_kl_nats']:.1e} nats",
    ]
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
                lines.append(f"    ... {len(items) - LISTED} more; --json lists all")
    return lines
