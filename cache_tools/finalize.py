"""Finishing a cache: every commit record in one index, and one root record over it, from which readers start."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from mmkd.cache_tools.claims import Claims
from mmkd.cache_tools.commits import CommitRecord, read_commit
from mmkd.cache_tools.fingerprints import canonical_json, fingerprint
from mmkd.cache_tools.layout import (
    COMMITS,
    INDEX,
    INIT,
    ROOT,
    SCHEMA,
    THUMBPRINT,
    Shard,
    SplitLayout,
    commit_key,
)
from mmkd.cache_tools.store import MissingObjectError, Store
from mmkd.cache_tools.tasks import Others, Task, new_task_id
from mmkd.data_manifests.errors import InputError, StorageError, VerificationError

NAMED_HOLES = 5


def seal(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields with the hash that closes them."""
    return {**fields, "seal": fingerprint(fields)}


def unsealed(data: bytes, where: str) -> dict[str, Any]:
    """Parse a sealed JSON object; raise VerificationError when it is damaged."""
    try:
        value: dict[str, Any] = json.loads(data)
        if value.pop("seal") != fingerprint(value):
            raise ValueError("its hash differs")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise VerificationError(f"{where} is damaged ({error}); delete it and run the build again") from error
    return value


def read_init(store: Store) -> dict[str, Any]:
    """Return init.json; raise InputError when there is none or it has another schema."""
    try:
        data = store.read(INIT)
    except MissingObjectError:
        raise InputError(f"{store.locate()} is not a cache; make one with `mmkd-cache build`") from None
    check_schema(data, store.locate())
    return unsealed(data, store.locate(INIT))


def check_schema(data: bytes, where: str) -> None:
    """Raise InputError for the init or root record of another schema; a damaged one passes, for its seal tells."""
    try:
        value = json.loads(data)
        schema = value["schema"]
        damaged = "seal" in value and value.pop("seal") != fingerprint(value)
    except (ValueError, KeyError, TypeError):
        return
    if schema != SCHEMA and not damaged:
        raise InputError(
            f"{where} has schema {schema!r}; this version reads {SCHEMA!r}: read it with the mmkd that wrote it, "
            "or build anew"
        )


def node_fingerprints(init: Mapping[str, Any]) -> dict[str, str]:
    """Return node (thumbprint or expert) -> fingerprint of a cache, from its init record."""
    base = fingerprint(init["base"])
    experts = {name: expert_fingerprint(base, fields) for name, fields in init["experts"].items()}
    return {THUMBPRINT: base} | experts


def expert_fingerprint(base: str, fields: Mapping[str, Any]) -> str:
    """Return the fingerprint of an expert's node: its own fields over the base's fingerprint."""
    return fingerprint({"base": base, "expert": dict(fields)})


def split_layouts(init: Mapping[str, Any]) -> dict[str, SplitLayout]:
    """Return split -> its rows, views and blocks."""
    return {item["name"]: SplitLayout(**item) for item in init["splits"]}


def wanted_nodes(init: Mapping[str, Any]) -> Iterator[tuple[Shard, str, str]]:
    """Yield (shard, node, fingerprint) of everything that the finished cache holds, in a fixed order."""
    nodes = node_fingerprints(init)
    for layout in split_layouts(init).values():
        for shard in layout.shards():
            for node, node_fingerprint in nodes.items():
                yield shard, node, node_fingerprint


def missing_nodes(store: Store, init: Mapping[str, Any]) -> list[tuple[Shard, str]]:
    """Return what has no commit record yet; one listing, however large the cache is."""
    there = store.list(COMMITS)
    return [
        (shard, node)
        for shard, node, node_fingerprint in wanted_nodes(init)
        if commit_key(shard, node, node_fingerprint) not in there
    ]


def finalize(store: Store) -> None:
    """Finish a cache as a task of its own; see `finish`."""
    read_init(store)  # what is no cache is refused before anything is written
    with Task(store, new_task_id()) as own:
        finish(store, Claims(own, others := Others(own)), others)
    store.tidy()


def finish(store: Store, claims: Claims, others: Others) -> None:
    """Write index and root, whose bytes depend on the records alone, and remove what is of no use any more.

    Nothing starts or changes the cache meanwhile. Raises VerificationError, naming the holes, while a shard lacks
    a record, and StorageError when this task slept and another one went on in its place.
    """
    with claims:
        init = read_init(store)
        refuse_holes(store, init)
        wanted = list(wanted_nodes(init))
        index = b"".join(_record(store, *node).to_bytes() for node in wanted)
        store.write(INDEX, index)
        hashes = {INIT: _sha256(store.read(INIT)), INDEX: _sha256(index)}
        if not claims.holds_cache():
            raise StorageError(f"{store.locate()}: another task went on while this one slept; run it again")
        store.write(ROOT, (canonical_json(seal({"schema": SCHEMA, "objects": hashes})) + "\n").encode())
        for key in store.list(COMMITS).keys() - {commit_key(*node) for node in wanted}:
            store.delete(key)  # of an expert that was replaced
        claims.clear()
        others.sweep()


def refuse_holes(store: Store, init: Mapping[str, Any]) -> None:
    """Raise VerificationError, naming what is missing, while a shard lacks a record."""
    missing = missing_nodes(store, init)
    if missing:
        names = ", ".join(f"{node} of {shard.name}" for shard, node in missing[:NAMED_HOLES])
        more = f" and {len(missing) - NAMED_HOLES} more" if len(missing) > NAMED_HOLES else ""
        raise VerificationError(
            f"{store.locate()} is not complete: it lacks {names}{more}; run `mmkd-cache build` again"
        )


def _record(store: Store, shard: Shard, node: str, node_fingerprint: str) -> CommitRecord:
    record = read_commit(store, shard, node, node_fingerprint)
    if record is None:
        raise VerificationError(f"{store.locate()}: the record of {node} of {shard.name} has just vanished")
    return record


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
