"""Exclusive claims on shards: of several tasks one computes a shard, and a dead task's claim can be taken over.

The claims on a shard are numbered, `claims/<split>/<shard>/<generation>.json`, and the highest number holds. A
claim of a dead task is taken over by burying it (from then on it can write nothing) and creating the next number,
which exactly one task can; no claim is ever deleted to take over, so a slow task cannot remove a fast one's.
"""

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmkd.cache_tools.layout import CLAIMS, Shard, own_keys
from mmkd.cache_tools.storage.store import MissingObjectError, Store
from mmkd.cache_tools.tasks.heartbeat import OtherTasks, Task

log = logging.getLogger("mmkd")
WAIT_SECONDS = 0.2
SAY_SECONDS = 5.0
"""Seconds of waiting after which it is said."""
CACHE = f"{CLAIMS}/init"
"""Folder of the claims on the cache as a whole."""


class Claims:
    """The claims of one task."""

    def __init__(self, task: Task, others: OtherTasks) -> None:
        """Claim in the name of `task`."""
        self._task, self._others = task, others
        self._store: Store = task.store

    def take(self, shard: Shard) -> bool:
        """Claim a shard; return False when a task at work holds it."""
        return self._take(claim_folder(shard))

    def holds(self, shard: Shard) -> bool:
        """Return whether the claim on a shard is (still) this task's."""
        newest = self._newest(claim_folder(shard))
        return newest is not None and newest[1] == self._task.id

    def release(self, shard: Shard) -> None:
        """Give up this task's claim on a shard, and the dead ones below it."""
        self._release(claim_folder(shard))

    def holds_cache(self) -> bool:
        """Return whether the claim on the cache as a whole is (still) this task's."""
        newest = self._newest(CACHE)
        return newest is not None and newest[1] == self._task.id

    def clear(self) -> None:
        """Remove every claim on a shard, when all shards are done; the cache as a whole must be claimed."""
        for folder, numbers in claims_in(self._store, CLAIMS).items():
            for number in numbers if folder != CACHE else ():
                self._store.delete(claim_key(folder, number))

    @contextmanager
    def whole_cache(self) -> Iterator[None]:
        """Claim the cache as a whole, waiting for it: for a block as short as starting or changing it."""
        waited = 0.0
        while not self._take(CACHE):
            time.sleep(WAIT_SECONDS)
            waited += WAIT_SECONDS
            if waited >= SAY_SECONDS:
                log.info("%s: waiting for another task that works on the whole cache", self._store.locate())
                waited = -float("inf")  # once
        try:
            yield
        finally:
            self._release(CACHE)

    def _take(self, folder: str) -> bool:
        newest = self._newest(folder)
        if newest is None:
            return self._create(folder, 0)
        generation, owner = newest
        if owner == self._task.id:
            return True
        if self._others.alive(owner):
            return False
        # Buried first: the next claim must not stand beside a writer that may still wake up.
        self._others.bury(owner)
        return self._create(folder, generation + 1)

    def _create(self, folder: str, generation: int) -> bool:
        return self._store.create(claim_key(folder, generation), json.dumps({"task": self._task.id}).encode())

    def _newest(self, folder: str) -> tuple[int, str] | None:
        numbers = claims_in(self._store, folder).get(folder)
        return (numbers[-1], owner_of(self._store, folder, numbers[-1])) if numbers else None

    def _release(self, folder: str) -> None:
        numbers = claims_in(self._store, folder).get(folder, [])
        if numbers and owner_of(self._store, folder, numbers[-1]) == self._task.id:
            for number in numbers:  # the holding one last
                self._store.delete(claim_key(folder, number))


def claim_folder(shard: Shard) -> str:
    """Return the folder of the claims on a shard."""
    return f"{CLAIMS}/{shard.name}"


def claim_key(folder: str, generation: int) -> str:
    """Return the key of a claim."""
    return f"{folder}/{generation}.json"


def claims_in(store: Store, prefix: str) -> dict[str, list[int]]:
    """Return folder of claims -> their numbers in order, of all below `prefix`; other objects are passed over."""
    found: dict[str, list[int]] = {}
    for key in own_keys(store.list(prefix), CLAIMS):
        folder, _, name = key.rpartition("/")
        found.setdefault(folder, []).append(int(Path(name).stem))  # as text 10 is less than 9
    return {folder: sorted(numbers) for folder, numbers in found.items()}


def owner_of(store: Store, folder: str, generation: int) -> str:
    """Return the id of the task that made a claim; empty if it is gone meanwhile, or says nothing sensible."""
    try:
        owner = json.loads(store.read(claim_key(folder, generation)))["task"]
    except (MissingObjectError, ValueError, KeyError, TypeError):
        return ""
    return owner if isinstance(owner, str) else ""


def claimed_shards(store: Store) -> dict[str, str]:
    """Return shard name -> id of the task that holds it, dead or alive."""
    claims = claims_in(store, CLAIMS)
    owners = {folder: owner_of(store, folder, claims[folder][-1]) for folder in claims if folder != CACHE}
    return {folder.removeprefix(f"{CLAIMS}/"): owner for folder, owner in owners.items() if owner}
