"""Finishing a cache: every commit record in one index, and one root record over it, from which readers start."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from mmkd.cache_tools.commits import CommitRecord, read_commit
from mmkd.cache_tools.fingerprints import canonical_json, fingerprint
from mmkd.cache_tools.layout import (
    CLAIMS,
    COMMITS,
    INDEX,
    INIT,
    ROOT,
    SCHEMA,
    TASKS,
    THUMBPRINT,
    Shard,
    SplitLayout,
    commit_key,
)
from mmkd.cache_tools.store import MissingObjectError, Store
from mmkd.cache_tools.tasks import live_tasks
from mmkd.data_manifests.errors import InputError, VerificationError

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
        schema = json.loads(data)["schema"]
    except (ValueError, KeyError, TypeError):
        return
    if schema != SCHEMA:
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
    """Write index and root; the bytes depend on the records alone, so two tasks may do it at once.

    Raises VerificationError, naming the holes, while a shard lacks a record.
    """
    init = read_init(store)
    missing = missing_nodes(store, init)
    if missing:
        names = ", ".join(f"{node} of {shard.name}" for shard, node in missing[:NAMED_HOLES])
        more = f" and {len(missing) - NAMED_HOLES} more" if len(missing) > NAMED_HOLES else ""
        raise VerificationError(
            f"{store.locate()} is not complete: it lacks {names}{more}; run `mmkd-cache build` again"
        )
    records = [_record(store, shard, node, value) for shard, node, value in wanted_nodes(init)]
    index = b"".join(record.to_bytes() for record in records)
    store.write(INDEX, index)
    hashes = {INIT: _sha256(store.read(INIT)), INDEX: _sha256(index)}
    store.write(ROOT, (canonical_json(seal({"schema": SCHEMA, "objects": hashes})) + "\n").encode())
    if not live_tasks(store):
        clear_traces(store)


def clear_traces(store: Store) -> None:
    """Remove the claims and signs of life of tasks that are gone; call when none is at work."""
    for key in [*store.list(CLAIMS), *store.list(TASKS)]:
        store.delete(key)
    for writer in store.writers():
        store.sweep(writer)
    store.tidy()


def _record(store: Store, shard: Shard, node: str, node_fingerprint: str) -> CommitRecord:
    record = read_commit(store, shard, node, node_fingerprint)
    if record is None:
        raise VerificationError(f"{store.locate()}: the record of {node} of {shard.name} has just vanished")
    return record


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
