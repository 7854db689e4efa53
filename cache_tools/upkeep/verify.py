"""Verifying a cache: every byte read against a checksum that was stored when it was written.

The chain runs from the root record over init.json and the index to every object; the commit records beside them
must be those of the index. What has no entry anywhere is a leftover. A cache whose build is not finished is
verified from its commit records.
"""

import hashlib
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from mmkd.cache_tools.cache.commits import CommitRecord, read_commit
from mmkd.cache_tools.cache.init_record import read_init
from mmkd.cache_tools.cache.root_record import RootRecord
from mmkd.cache_tools.layout import (
    CLAIMS,
    GROUP,
    INDEX,
    INIT,
    JOURNAL,
    ROOT,
    TASKS,
    TEMPORARY,
    Shard,
    commit_key,
    group_key,
    is_own_key,
    own_keys,
)
from mmkd.cache_tools.process.progress import Progress
from mmkd.cache_tools.storage.open import open_store
from mmkd.cache_tools.storage.store import MissingObjectError, Store
from mmkd.cache_tools.tasks.claims import Claims
from mmkd.cache_tools.tasks.heartbeat import OtherTasks, Task, live_tasks, new_task_id
from mmkd.data_manifests.counted import ARE, counted
from mmkd.data_manifests.errors import InputError, VerificationError

LISTED = 20


@dataclass
class VerifyReport:
    """What verifying found."""

    objects: int = 0
    """Objects read."""
    bytes: int = 0
    """Bytes read."""
    damaged: dict[str, str] = field(default_factory=dict)
    """Key -> what is wrong, with the rows and views that it holds."""
    leftovers: list[str] = field(default_factory=list)
    """Keys of this cache's kind that belong to nothing."""
    foreign: list[str] = field(default_factory=list)
    """Files in its folder that are not a cache's at all: they are let be."""
    incomplete: int = 0
    """Nodes of shards that have no commit record (yet)."""
    repaired: bool = False
    """Whether what is damaged or left over was removed."""
    shards: list[str] = field(default_factory=list)
    """Shards that the next build computes again, after a repair."""

    def lines(self, cache: Path | str) -> list[str]:
        """Return the report for people."""
        lines = [
            f"{cache}: {counted(self.objects, 'object')}, {self.bytes / 2**20:.1f} MiB read; "
            f"{len(self.damaged)} damaged"
        ]
        lines += [f"damaged   {key}: {what}" for key, what in list(self.damaged.items())[:LISTED]]
        if len(self.damaged) > LISTED:
            lines.append(f"... {len(self.damaged) - LISTED} more; --json lists all")
        if self.leftovers:
            fate = "removed" if self.repaired else "no reader sees them"
            lines.append(f"leftovers {len(self.leftovers)}, e.g. {self.leftovers[0]}: {fate}")
        if self.foreign:
            lines.append(
                f"foreign   {counted(len(self.foreign), 'file')}, e.g. {self.foreign[0]}: not the "
                f"cache's, left alone"
            )
        if self.incomplete:
            lines.append(f"not finished: {counted(self.incomplete, 'commit record', ARE)} still to come")
        if self.repaired and self.shards:
            lines.append(f"removed; run the build again to compute {', '.join(self.shards[:LISTED])} again")
        return lines

    def check(self, cache: Path | str) -> None:
        """Raise VerificationError when something is damaged and was not removed."""
        if self.damaged and not self.repaired:
            key, what = next(iter(self.damaged.items()))
            raise VerificationError(
                f"{cache}: {counted(len(self.damaged), 'object', ARE)} damaged, the first is "
                f"{key} ({what}); run `mmkd-cache "
                "verify --repair`, then the build again"
            )


def verify_cache(location: Path | str | Store, *, repair: bool = False) -> VerifyReport:
    """Read all of a cache; with `repair`, remove what is damaged, so that the next build computes it again.

    Raises InputError for what is not a cache, or is being built while it is to be repaired.
    """
    store = open_store(location) if isinstance(location, (Path, str)) else location
    if not repair:
        return check(store, live_tasks(store))
    with suppress(VerificationError):  # a damaged one can be repaired, but what is not a cache is refused at once
        read_init(store)
    with Task(store, new_task_id()) as own:
        others = OtherTasks(own)
        claims = Claims(own, others)
        with claims.whole_cache():
            # Asked with the claim in hand: a build that begins from here on waits for it.
            if others.living():
                raise InputError(f"{store.locate()} is being built; repair it when no task is at work")
            others.sweep()
            claims.clear()
            report = check(store, {own.id})
            if report.damaged or report.leftovers:
                remove(store, report)
    store.tidy()
    return report


def check(store: Store, living: set[str]) -> VerifyReport:
    """Read all of a cache, on which the tasks `living` are at work."""
    report = VerifyReport()
    expected = Verifier(store, report).run()
    there = store.list()
    report.foreign = sorted(key for key in there if not is_own_key(key))
    # The journal is for people and stays; signs of life and claims are left over when nobody is at work.
    traces = (f"{JOURNAL}/", f"{TASKS}/", f"{CLAIMS}/")
    known = (key for key in there if is_own_key(key) and not key.startswith(traces))
    report.leftovers = sorted(key for key in known if key not in expected)
    if not living:
        report.leftovers += [key for folder in (TASKS, CLAIMS) for key in own_keys(there, folder)]
        report.leftovers += [f"{TEMPORARY}/{writer}" for writer in sorted(store.writers())]
    return report


def remove(store: Store, report: VerifyReport) -> None:
    """Remove damaged objects, the records and roots that vouch for them, and leftovers; nobody else's files."""
    if report.damaged:
        for key in (ROOT, INDEX):  # from here on readers are told that the cache is not finished
            store.delete(key)
    for key in (*report.damaged, *report.leftovers):
        if is_own_key(key):
            store.delete(key)
    report.repaired = True


class Verifier:
    """One pass over a cache."""

    def __init__(self, store: Store, report: VerifyReport) -> None:
        """Note what is found in `report`."""
        self._store, self._report = store, report
        self._expected = {ROOT, INDEX, INIT}
        self._indexed: dict[tuple[str, str], bytes] = {}

    def run(self) -> set[str]:
        """Verify everything; return the keys that belong to the cache."""
        store, report = self._store, self._report
        self._roots()
        try:
            init = read_init(store)
        except VerificationError as error:
            report.damaged[INIT] = str(error)
            return set(store.list())  # nothing can be told of the rest
        report.incomplete = len(init.missing(store))
        with Progress("verifying", total=len(store.list(GROUP)), unit="object") as progress:
            for key, sha256 in init.objects.items():
                self._object(group_key(key), sha256, "written by init")
                progress.advance()
            for shard, node, node_fingerprint in init.wanted():
                progress.advance(self._node(shard, node, node_fingerprint))
        return self._expected

    def _roots(self) -> None:
        """Check root record, index and init against each other, where the cache is finished."""
        try:
            data = self._store.read(ROOT)
            root = RootRecord.from_bytes(data, self._store.locate(ROOT))
        except MissingObjectError:
            self._expected -= {ROOT, INDEX}
            return
        except VerificationError as error:
            self._report.damaged[ROOT] = str(error)
            return
        for key in (INIT, INDEX):
            self._object(key, root.objects[key], "of the whole cache")
        if INDEX not in self._report.damaged:
            for line in self._store.read(INDEX).splitlines(keepends=True):
                record = CommitRecord.from_bytes(line, self._store.locate(INDEX))
                self._indexed[record.shard, record.node] = line

    def _node(self, shard: Shard, node: str, node_fingerprint: str) -> int:
        key = commit_key(shard, node, node_fingerprint)
        what = f"{node}, {rows_and_views(shard)}"
        try:
            record = read_commit(self._store, shard, node, node_fingerprint)
            indexed = self._indexed.get((shard.name, node))
            if record is None and indexed is None:
                return 0
            self._expected.add(key)
            if record is None or (indexed is not None and record.to_bytes() != indexed):
                raise VerificationError("its commit record is missing or not that of the index")
        except VerificationError as error:
            self._expected.add(key)
            self._report.damaged[key] = f"commit record of {what}: {error}"
            self._report.shards.append(shard.name)
            return 0
        bad = [
            object_key
            for object_key, sha256 in record.objects.items()
            if not self._object(group_key(object_key), sha256, what)
        ]
        if bad:
            # The record must go, too: as long as it is there, a build takes the shard for done.
            self._report.damaged[key] = f"commit record of {what}: vouches for damaged objects"
            self._report.shards.append(shard.name)
        return len(record.objects)

    def _object(self, key: str, sha256: str, what: str) -> bool:
        self._expected.add(key)
        try:
            data = self._store.read(key)
        except MissingObjectError:
            self._report.damaged[key] = f"missing ({what})"
            return False
        except VerificationError as error:
            self._report.damaged[key] = f"{error} ({what})"
            return False
        self._report.objects += 1
        self._report.bytes += len(data)
        if hashlib.sha256(data).hexdigest() != sha256:
            self._report.damaged[key] = f"its hash differs ({what})"
            return False
        return True


def rows_and_views(shard: Shard) -> str:
    """Return a shard's rows and views, e.g. `train rows 128..255, views 0..7`."""
    return f"{shard.split.name} rows {shard.rows[0]}..{shard.rows[-1]}, views {shard.views[0]}..{shard.views[-1]}"
