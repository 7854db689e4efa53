"""The journal: hosts, times and rates of a build, one file for each task and some hundred shards.

Nothing that is computed ever depends on it; `mmkd-cache status` reads it.
"""

import json
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from mmkd.cache_tools.layout import JOURNAL, own_keys
from mmkd.cache_tools.storage.store import MissingObjectError, Store
from mmkd.data_manifests.typed_json import PART, typed

PART_ENTRIES = 256
"""Entries of one file: it is written again with each of them, since an object store cannot append."""


@dataclass(frozen=True)
class _Entry:
    """Those fields of an entry that `mmkd-cache status` reads."""

    __pydantic_config__ = PART
    task: str
    unix_seconds: float
    shard: str
    rows: int = 0
    seconds: float = 0.0
    error: str = ""


class Journal:
    """The entries of one task."""

    def __init__(self, store: Store, task_id: str) -> None:
        """Write to `store` in the name of a task."""
        self._store, self._task_id = store, task_id
        self._part = 0
        self._lines: list[str] = []

    def add(self, **values: Any) -> None:
        """Add an entry (JSON values) with this task, host and the time."""
        entry = values | {
            "task": self._task_id,
            "host": socket.gethostname(),
            "unix_seconds": round(time.time(), 3),
        }
        self._lines.append(json.dumps(entry, sort_keys=True) + "\n")
        self._store.write(f"{JOURNAL}/{self._task_id}-{self._part}.jsonl", "".join(self._lines).encode())
        if len(self._lines) == PART_ENTRIES:
            self._part += 1
            self._lines = []


def read_journal(store: Store) -> list[dict[str, Any]]:
    """Return all entries in the order of their times; lines that are none of ours are left out."""
    entries: list[dict[str, Any]] = []
    for key in own_keys(store.list(JOURNAL), JOURNAL):
        try:
            lines = store.read(key).splitlines()
        except MissingObjectError:
            continue
        for line in lines:
            with suppress(ValueError, RecursionError):
                entry = json.loads(line)
                typed(_Entry, entry)
                entries.append(entry)
    return sorted(entries, key=lambda entry: float(entry["unix_seconds"]))
