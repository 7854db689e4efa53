"""How far the build of a cache is, at any time, from listings and the journal alone."""

import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmkd.cache_tools.cache.init_record import read_init
from mmkd.cache_tools.layout import GROUP, ROOT
from mmkd.cache_tools.process.progress import duration
from mmkd.cache_tools.storage.open import open_store
from mmkd.cache_tools.tasks.claims import claimed_shards
from mmkd.cache_tools.tasks.heartbeat import live_tasks
from mmkd.cache_tools.tasks.journal import read_journal
from mmkd.data_manifests.counted import counted

RATE_ENTRIES = 20
"""Latest shards of each running task from which its rate is taken."""


@dataclass(frozen=True)
class BuildStatus:
    """State of a build."""

    finished: bool
    """Whether readers may open the cache."""
    shards: int
    """Shards of the cache."""
    done: int
    """Shards with all their commit records."""
    rows: int
    """Clips of all splits, once for each block of views."""
    rows_left: int
    """Those of the shards that are not done."""
    missing: dict[str, int] = field(default_factory=dict)
    """Node (thumbprint or expert) -> shards that lack its record."""
    running: dict[str, str] = field(default_factory=dict)
    """Shard -> task at work on it."""
    abandoned: tuple[str, ...] = ()
    """Shards claimed by tasks that are gone: the next task takes them over."""
    failed: dict[str, str] = field(default_factory=dict)
    """Shard -> the latest error, while it is not done."""
    tasks: int = 0
    """Tasks at work."""
    rows_per_second: float = 0.0
    """Of the tasks at work together, over their latest shards."""
    seconds_left: float | None = None
    """At that rate; None while nothing runs."""
    bytes: int = 0
    """Size of the Zarr group."""

    def lines(self) -> list[str]:
        """Return the status for people."""
        state = "finished" if self.finished else "complete, not finalized" if not self.rows_left else "not finished"
        lines = [
            f"{state}: {self.done} of {counted(self.shards, 'shard')} done, "
            f"{self.rows - self.rows_left} of {counted(self.rows, 'row')}; "
            f"{self.bytes / 2**20:.1f} MiB"
        ]
        lines += [f"missing   {node}: {counted(count, 'shard')}" for node, count in self.missing.items()]
        if self.tasks:
            left = "" if self.seconds_left is None else f", {duration(self.seconds_left)} left"
            lines.append(
                f"running   {counted(self.tasks, 'task')}, {counted(len(self.running), 'shard')} in work, "
                f"{self.rows_per_second:.1f} rows/s{left}"
            )
        if self.abandoned:
            lines.append(
                f"abandoned {counted(len(self.abandoned), 'shard')}, by tasks that are gone; the "
                f"next task computes them"
            )
        lines += [f"failed    {shard}: {error}" for shard, error in self.failed.items()]
        return lines


def read_build_status(location: Path | str) -> BuildStatus:
    """Return the state of a cache; raise InputError when there is none."""
    store = open_store(location)
    init = read_init(store)
    shards = [shard for layout in init.splits for shard in layout.shards()]
    missing = init.missing(store)
    undone = {shard.name for shard, _ in missing}
    live = live_tasks(store)
    claims = {shard: task for shard, task in claimed_shards(store).items() if shard in undone}
    rate, errors = summarise(read_journal(store), live)
    rows_left = sum(len(shard.rows) for shard in shards if shard.name in undone)
    return BuildStatus(
        finished=store.exists(ROOT),
        shards=len(shards),
        done=len(shards) - len(undone),
        rows=sum(len(shard.rows) for shard in shards),
        rows_left=rows_left,
        missing=dict(Counter(node for _, node in missing)),
        running={shard: task for shard, task in claims.items() if task in live},
        abandoned=tuple(shard for shard, task in claims.items() if task not in live),
        failed={shard: error for shard, error in errors.items() if shard in undone},
        tasks=len(live),
        rows_per_second=round(rate, 3),
        seconds_left=rows_left / rate if rate else None,
        bytes=sum(stored.size_bytes for stored in store.list(GROUP).values()),
    )


def summarise(entries: list[dict[str, Any]], live: set[str]) -> tuple[float, dict[str, str]]:
    """Return rows/s of the live tasks, and shard -> its latest error, from the journal's entries."""
    errors: dict[str, str] = {}
    rate = 0.0
    for entry in entries:
        if "error" in entry:
            errors[str(entry["shard"])] = str(entry["error"])
    for task in live:
        latest = [entry for entry in entries if entry.get("task") == task and "rows" in entry][-RATE_ENTRIES:]
        seconds = sum(float(entry.get("seconds", 0)) for entry in latest)
        if seconds > 0 and latest[-1]["unix_seconds"] > time.time() - 3600:
            rate += sum(int(entry["rows"]) for entry in latest) / seconds
    return rate, errors
