"""How large a cache will be, known before anything is computed: exact before compression, a bound after it.

What a row costs follows from the storage format; what an object costs at most from its array's metadata. Logits
hardly compress (fp16 by 5 to 15 %, packed bits not at all), so that the bound is near for real class counts. It
leaves out what nobody knows before: the reasons of clips that turn out to be unusable, and the journal's lines.
"""

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import numpy as np

from mmkd.cache_tools.cache.arrays import Objects
from mmkd.cache_tools.cache.commits import CommitRecord, Unusable
from mmkd.cache_tools.cache.fingerprints import canonical_json
from mmkd.cache_tools.layout import THUMBPRINT, Shard, block_key

INDEX_BYTES = 16
"""What a shard's index holds of each inner chunk: offset and length."""
CHECKSUM_BYTES = 4
LONGEST_NUMBER = 1.2345678901234567e-07
"""A number with as many digits as one can have in a record."""


@dataclass(frozen=True)
class NodeSize:
    """What one node (thumbprint or expert) of one shard takes."""

    objects: int
    """Objects, its commit record included."""
    raw_bytes: int
    """Its arrays before compression."""
    block_bytes: int
    """Its arrays as stored, at most."""
    record_bytes: int
    """Its commit record; the index holds it once more."""


def node_size(objects: Objects, shard: Shard, node: str, *, heads: Collection[str]) -> NodeSize:
    """Return the size of a node of a shard; `objects` are a cache's static ones, which hold every array's metadata.

    Rows that turn out to be unusable make the record longer: see `unusable_bytes`.
    """
    prefix, ending = f"{shard.split.name}/{node}/", "/zarr.json"
    arrays = {
        key.removesuffix(ending): json.loads(data)
        for key, data in objects.items()
        if key.startswith(prefix) and key.endswith(ending)
    }
    arrays = {name: metadata for name, metadata in arrays.items() if metadata["node_type"] == "array"}
    record = CommitRecord(
        shard.name,
        node,
        fingerprint="0" * 64,
        objects={block_key(name, shard, len(metadata["shape"])): "0" * 64 for name, metadata in arrays.items()},
        worst_kl={} if node == THUMBPRINT else dict.fromkeys(heads, LONGEST_NUMBER),
    )
    return NodeSize(
        objects=len(arrays) + 1,
        raw_bytes=sum(raw_bytes(metadata) for metadata in arrays.values()),
        block_bytes=sum(block_bound(metadata) for metadata in arrays.values()),
        record_bytes=len(record.to_bytes()),
    )


def unusable_bytes(unusable: Iterable[Unusable]) -> int:
    """Return by how much these rows make a commit record longer."""
    return sum(len(canonical_json(asdict(row)).encode()) + 1 for row in unusable)


def raw_bytes(metadata: Mapping[str, Any]) -> int:
    """Return the bytes of one whole shard of an array before compression, from its metadata (zarr.json)."""
    shard, _, item_bytes = _shapes(metadata)
    return item_bytes * prod(shard)


def block_bound(metadata: Mapping[str, Any]) -> int:
    """Return the largest size of one shard's object of an array: incompressible inner chunks and an index."""
    shard, inner, item_bytes = _shapes(metadata)
    chunks = prod(shard) // prod(inner)
    return chunks * (zstd_bound(item_bytes * prod(inner)) + INDEX_BYTES) + CHECKSUM_BYTES


def zstd_bound(size_bytes: int) -> int:
    """Return ZSTD_compressBound of zstd.h plus the frame's checksum."""
    small = max(0, (128 << 10) - size_bytes) >> 11
    return size_bytes + (size_bytes >> 8) + small + CHECKSUM_BYTES


def _shapes(metadata: Mapping[str, Any]) -> tuple[list[int], list[int], int]:
    """Return the shapes of a shard and of its inner chunks, and the bytes of a value."""
    (sharding,) = (codec for codec in metadata["codecs"] if codec["name"] == "sharding_indexed")
    shard = metadata["chunk_grid"]["configuration"]["chunk_shape"]
    return shard, sharding["configuration"]["chunk_shape"], np.dtype(metadata["data_type"]).itemsize
