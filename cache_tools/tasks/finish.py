"""Finishing a cache: every commit record in one index, and one root record over it, from which readers start."""

import hashlib

from mmkd.cache_tools.cache.commits import CommitRecord, read_commit
from mmkd.cache_tools.cache.init_record import CacheInit, read_init
from mmkd.cache_tools.cache.root_record import RootRecord
from mmkd.cache_tools.layout import COMMITS, INDEX, INIT, ROOT, Shard, commit_key, own_keys
from mmkd.cache_tools.storage.store import Store, TakenOverError
from mmkd.cache_tools.tasks.claims import Claims
from mmkd.cache_tools.tasks.heartbeat import OtherTasks, Task, new_task_id
from mmkd.data_manifests.errors import VerificationError

NAMED_HOLES = 5


class IncompleteError(VerificationError):
    """Shards of the cache have no record yet."""


def finalize_cache(store: Store) -> None:
    """Finish a cache as a task of its own; see `finish`."""
    read_init(store)  # what is not a cache is refused before anything is written
    with Task(store, new_task_id()) as own:
        others = OtherTasks(own)
        finish(store, Claims(own, others), others)
    store.tidy()


def finish(store: Store, claims: Claims, others: OtherTasks) -> None:
    """Write index and root, whose bytes depend on the records alone, and remove what is of no use any more.

    Nothing starts or changes the cache meanwhile. Raises IncompleteError, naming the holes, while a shard lacks
    a record, and StorageError when this task slept and another one went on in its place.
    """
    with claims.whole_cache():
        finish_claimed(store, claims, others)


def finish_claimed(store: Store, claims: Claims, others: OtherTasks) -> None:
    """Finish a cache that is claimed as a whole; see `finish`."""
    others.sweep()  # first: what a dead task has begun must not come after
    init = read_init(store)
    refuse_holes(store, init)
    wanted = list(init.wanted())
    index = b"".join(_record(store, *node).to_bytes() for node in wanted)
    store.write(INDEX, index)
    hashes = {INIT: _sha256(store.read(INIT)), INDEX: _sha256(index)}
    # Asked last: the root makes the cache finished, and who slept until here may not say so any more.
    if not claims.holds_cache():
        raise TakenOverError(store.locate())
    store.write(ROOT, RootRecord(hashes).to_bytes())
    nodes = init.fingerprints()
    for key in set(own_keys(store.list(COMMITS), COMMITS)) - {commit_key(*node) for node in wanted}:
        if key.split("/")[2] in nodes:  # of an expert that was replaced; one that is not known may come back
            store.delete(key)
    claims.clear()


def refuse_holes(store: Store, init: CacheInit) -> None:
    """Raise IncompleteError, naming what is missing, while a shard lacks a record."""
    missing = init.missing(store)
    if missing:
        names = ", ".join(f"{node} of {shard.name}" for shard, node in missing[:NAMED_HOLES])
        more = f" and {len(missing) - NAMED_HOLES} more" if len(missing) > NAMED_HOLES else ""
        raise IncompleteError(
            f"{store.locate()} is not complete: it lacks {names}{more}; run `mmkd-cache build` again"
        )


def _record(store: Store, shard: Shard, node: str, node_fingerprint: str) -> CommitRecord:
    record = read_commit(store, shard, node, node_fingerprint)
    if record is None:
        raise VerificationError(f"{store.locate()}: the record of {node} of {shard.name} has just vanished")
    return record


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
