"""Processes of this machine, by /proc: whose children they are, their memory, open files and CPU time."""

import contextlib
import os
import time
from pathlib import Path

PROC = Path("/proc")


def table() -> dict[int, list[str]]:
    """Process id -> the fields of /proc/PID/stat from the state on (proc(5) numbers that one 3)."""
    found = {}
    for entry in PROC.iterdir():
        with contextlib.suppress(OSError, ValueError, IndexError):
            found[int(entry.name)] = (entry / "stat").read_text().rpartition(")")[2].split()
    return found


def session(number: int) -> list[int]:
    """The living processes of a session."""
    return [pid for pid, fields in table().items() if int(fields[3]) == number and fields[0] != "Z"]


def descendants(pid: int) -> list[int]:
    """The processes that began in one, and in those."""
    parents: dict[int, list[int]] = {}
    for child, fields in table().items():
        parents.setdefault(int(fields[1]), []).append(child)
    found = [pid]
    for one in found:
        found += parents.get(one, [])
    return found[1:]


def cpu_seconds() -> float:
    """The CPU time so far of this process and its descendants."""
    known, ticks = table(), os.sysconf("SC_CLK_TCK")
    children = (known[pid] for pid in descendants(os.getpid()) if pid in known)
    return time.process_time() + sum(int(fields[11]) + int(fields[12]) for fields in children) / ticks


def memory_kib(pid: int | str = "self") -> dict[str, int]:
    """Resident memory of a process now, and its peak, in KiB; OSError where it is gone."""
    lines = (line.split() for line in (PROC / str(pid) / "status").read_text().splitlines())
    found = {parts[0]: int(parts[1]) for parts in lines if parts[0] in ("VmRSS:", "VmHWM:")}
    return {"now": found["VmRSS:"], "peak": found["VmHWM:"]}


def open_files(pid: int | str = "self") -> int:
    """How many file descriptors a process has."""
    return len(list((PROC / str(pid) / "fd").iterdir()))
