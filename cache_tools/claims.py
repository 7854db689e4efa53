"""Exclusive claims on shards: of several tasks one computes a shard, and a dead task's claim can be taken over.

The claims on a shard are numbered, `claims/<split>/<shard>/<generation>.json`, and the highest number holds. A
claim of a dead task is taken over by creating the next number, which exactly one task can; nothing is ever deleted
to take over, so a slow task cannot remove a fast one's claim. A task that was taken for dead and wakes up finds a
higher number before it publishes; should it be asleep just then, it publishes the same bytes.
"""

import json
import time
from pathlib import Path

from mmkd.cache_tools.layout import CLAIMS, Shard
from mmkd.cache_tools.store import MissingObjectError, Store
from mmkd.cache_tools.tasks import Others, Task

WAIT_SECONDS = 0.2
CACHE = f"{CLAIMS}/init"
"""Folder of the claims on the cache as a whole."""


class Claims:
    """The claims of one task."""

    def __init__(self, task: Task, others: Others) -> None:
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
        for key in self._store.list(CLAIMS):
            if not key.startswith(f"{CACHE}/"):
                self._store.delete(key)

    def __enter__(self) -> "Claims":
        """Claim the cache as a whole, waiting for it: only for the short time of starting or changing it."""
        while not self._take(CACHE):
            time.sleep(WAIT_SECONDS)
        return self

    def __exit__(self, *_: object) -> None:
        """Give the cache as a whole free."""
        self._release(CACHE)

    def _take(self, folder: str) -> bool:
        newest = self._newest(folder)
        if newest is None:
            return self._create(folder, 0)
        generation, owner = newest
        if owner == self._task.id:
            return True
        return not self._others.alive(owner) and self._create(folder, generation + 1)

    def _create(self, folder: str, generation: int) -> bool:
        return self._store.create(f"{folder}/{generation}.json", json.dumps({"task": self._task.id}).encode())

    def _newest(self, folder: str) -> tuple[int, str] | None:
        generation = max((int(Path(key).stem) for key in self._store.list(folder)), default=None)
        if generation is None:
            return None
        try:
            return generation, json.loads(self._store.read(f"{folder}/{generation}.json"))["task"]
        except (MissingObjectError, ValueError):  # released meanwhile, or half written where there are no links
            return generation, ""

    def _release(self, folder: str) -> None:
        newest = self._newest(folder)
        if newest is not None and newest[1] == self._task.id:
            for generation in range(newest[0] + 1):  # the holding one last
                self._store.delete(f"{folder}/{generation}.json")


def claim_folder(shard: Shard) -> str:
    """Return the folder of the claims on a shard."""
    return f"{CLAIMS}/{shard.name}"


def claimed_shards(store: Store) -> dict[str, str]:
    """Return shard name -> id of the task that holds it, dead or alive."""
    newest: dict[str, int] = {}
    for key in store.list(CLAIMS):
        folder, _, file = key.removeprefix(f"{CLAIMS}/").rpartition("/")
        newest[folder] = max(newest.get(folder, 0), int(Path(file).stem))
    found = {}
    for folder, generation in newest.items():
        if f"{CLAIMS}/{folder}" != CACHE:
            try:
                found[folder] = str(json.loads(store.read(f"{CLAIMS}/{folder}/{generation}.json"))["task"])
            except (MissingObjectError, ValueError):
                continue
    return found
