"""Commit records: the proof that a shard is complete, written last.

A record covers one node (the thumbprints, or one expert) of one shard. It names every object with its hash and
carries the node's fingerprint, status counts and the worst storage error; no time, host or rate, so that the
records of two equal builds are equal. Without its record a shard does not exist, whatever files lie there.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mmkd.cache_tools.arrays import Objects
from mmkd.cache_tools.atomic import write_atomically
from mmkd.cache_tools.fingerprints import canonical_json, fingerprint
from mmkd.cache_tools.layout import SCHEMA, CachePaths, Shard
from mmkd.data_manifests.errors import StorageError, VerificationError


@dataclass(frozen=True)
class Unusable:
    """A clip that an expert has no logits for, in every view of the shard or in some."""

    row: int
    """Row within the split."""
    clip_id: str
    """The clip's id."""
    status: int
    """The worst `Status` over the views."""
    reason: str
    """Why, without paths, times or hosts."""


@dataclass(frozen=True)
class CommitRecord:
    """What a commit record says."""

    shard: str
    """Name of the shard."""
    node: str
    """`thumbprint` or the expert's name."""
    fingerprint: str
    """Fingerprint of the node that computed it."""
    objects: Mapping[str, str]
    """Object key -> SHA-256 of its bytes."""
    unusable: tuple[Unusable, ...] = ()
    """Rows without a usable result."""
    worst_kl: Mapping[str, float] = field(default_factory=dict)
    """Head -> largest KL divergence (nats, T = 1) of the stored from the computed logits."""
    schema: str = SCHEMA
    """Schema of the cache."""

    def to_bytes(self) -> bytes:
        """Return the record's one JSON text, closed by the hash of all that it says."""
        fields = asdict(self)
        return (canonical_json(fields | {"seal": fingerprint(fields)}) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> "CommitRecord":
        """Parse a record; raise VerificationError naming `where` when it is damaged."""
        try:
            value: dict[str, Any] = json.loads(data)
            if value.pop("seal") != fingerprint(value):
                raise ValueError("its hash differs")
            if value["schema"] != SCHEMA:
                raise VerificationError(f"{where} is of schema {value['schema']!r}, this version reads {SCHEMA!r}")
            value["unusable"] = tuple(Unusable(**item) for item in value["unusable"])
            return cls(**value)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise VerificationError(f"{where} is damaged ({error}); run `mmkd-cache build` again") from error


def hash_objects(objects: Objects) -> dict[str, str]:
    """Return object key -> SHA-256 of its bytes."""
    return {key: hashlib.sha256(data).hexdigest() for key, data in sorted(objects.items())}


def publish(paths: CachePaths, shard: Shard, record: CommitRecord, objects: Objects) -> None:
    """Write the objects, then the record that makes them count; raise StorageError when the disk is full."""
    if hash_objects(objects) != dict(record.objects):
        raise ValueError(f"the record of {shard.name} does not describe the objects to publish")
    for key, data in objects.items():
        write_atomically(paths.group / key, data)
    write_atomically(paths.commit(shard, record.node), record.to_bytes())


def read_commit(paths: CachePaths, shard: Shard, node: str) -> CommitRecord | None:
    """Return the commit record of a node of a shard, or None when it was not completed."""
    path = paths.commit(shard, node)
    try:
        record = CommitRecord.from_bytes(path.read_bytes(), str(path))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error
    if (record.shard, record.node) != (shard.name, node):
        raise VerificationError(
            f"{path} is the record of {record.node} of {record.shard}; run `mmkd-cache build` again"
        )
    return record


def read_verified(root: Path, key: str, sha256: str) -> bytes:
    """Return the bytes of an object; raise VerificationError unless they have the recorded hash."""
    path = root / key
    if ".." in path.parts or root not in path.parents:
        raise VerificationError(f"{root}: an object named {key!r} lies outside of it")
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise VerificationError(
            f"{path} is missing; run `mmkd-cache build` again, which computes that shard anew"
        ) from error
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise VerificationError(
            f"{path} is damaged (its hash differs); run `mmkd-cache build` again, which computes that shard anew"
        )
    return data
