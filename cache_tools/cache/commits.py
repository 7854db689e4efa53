"""Commit records: the proof that a shard is complete, written last.

A record covers one node (the thumbprints, or one expert) of one shard. It names every object with its hash and
carries the node's fingerprint, status counts and the worst storage error; no time, host or rate, so that the
records of two equal builds are equal. Without its record a shard does not exist, whatever files lie there.
"""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field

from mmkd.cache_tools.cache.arrays import Objects
from mmkd.cache_tools.cache.fingerprints import canonical_json
from mmkd.cache_tools.cache.sealed import damaged, open_seal, seal
from mmkd.cache_tools.layout import (
    COMMITS,
    SCHEMA,
    Shard,
    Status,
    commit_key,
    group_key,
    own_keys,
    require_safe_keys,
)
from mmkd.cache_tools.storage.store import MissingObjectError, Store
from mmkd.data_manifests.errors import VerificationError
from mmkd.data_manifests.typed_json import STRICT, typed

REPAIR = "run `mmkd-cache verify --repair` and then the build again, which computes that shard again"


@dataclass(frozen=True)
class Unusable:
    """A clip that an expert has no logits for, in every view of the shard or in some."""

    __pydantic_config__ = STRICT
    row: int
    """Row within the split."""
    clip_id: str
    """The clip's id."""
    status: int
    """The worst `Status` over the views."""
    reason: str
    """Why, without paths, times or hosts."""

    def __post_init__(self) -> None:
        """Raise ValueError for a row or a status that there is not."""
        Status(self.status)
        if self.row < 0:
            raise ValueError(f"row {self.row} is negative")


@dataclass(frozen=True)
class CommitRecord:
    """What a commit record says."""

    __pydantic_config__ = STRICT
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
    """Head -> largest KL divergence (nats, T from 1 to 10) of the stored from the computed logits."""
    schema: str = SCHEMA
    """Schema of the cache."""

    def __post_init__(self) -> None:
        """Raise ValueError for an object's key that is none."""
        require_safe_keys(self.objects)

    def to_bytes(self) -> bytes:
        """Return the record's one JSON text, closed by the hash of all that it says."""
        return (canonical_json(seal(asdict(self))) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> "CommitRecord":
        """Parse a record; raise VerificationError naming `where` when it is damaged."""
        try:
            record = typed(cls, open_seal(data))
        except ValueError as error:
            raise damaged(where, error, advice=REPAIR) from error
        if record.schema != SCHEMA:
            raise VerificationError(f"{where} is of schema {record.schema!r}, this version reads {SCHEMA!r}")
        return record


def hash_objects(objects: Objects) -> dict[str, str]:
    """Return object key -> SHA-256 of its bytes."""
    return {key: hashlib.sha256(data).hexdigest() for key, data in sorted(objects.items())}


def publish(store: Store, shard: Shard, record: CommitRecord, objects: Objects) -> None:
    """Write the objects, then the record that makes them count; raise StorageError when the disk is full."""
    if hash_objects(objects) != dict(record.objects):
        raise ValueError(f"the record of {shard.name} does not describe the objects to publish")
    for key, data in objects.items():
        store.write(group_key(key), data)
    store.write(commit_key(shard, record.node, record.fingerprint), record.to_bytes())


def read_commit(store: Store, shard: Shard, node: str, fingerprint: str) -> CommitRecord | None:
    """Return the commit record of a node of a shard, or None when it was not completed."""
    key = commit_key(shard, node, fingerprint)
    try:
        record = CommitRecord.from_bytes(store.read(key), store.locate(key))
    except MissingObjectError:
        return None
    if (record.shard, record.node, record.fingerprint) != (shard.name, node, fingerprint):
        raise VerificationError(
            f"{store.locate(key)} is the record of {record.node} of {record.shard} (fingerprint "
            f"{record.fingerprint[:16]}); {REPAIR}"
        )
    return record


def drop_all(store: Store, nodes: Collection[str] | None = None) -> None:
    """Remove all commit records, or those of some nodes, of whatever fingerprint."""
    for key in own_keys(store.list(COMMITS), COMMITS):
        if nodes is None or key.split("/")[2] in nodes:
            store.delete(key)


def read_verified(store: Store, key: str, sha256: str) -> bytes:
    """Return the bytes of an object; raise VerificationError unless they have the recorded hash."""
    try:
        data = store.read(key)
    except MissingObjectError:
        raise VerificationError(f"{store.locate(key)} is missing; {REPAIR}") from None
    if hashlib.sha256(data).hexdigest() != sha256:
        raise VerificationError(f"{store.locate(key)} is damaged (its hash differs); {REPAIR}")
    return data
