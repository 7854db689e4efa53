"""Builds that fall asleep at a step, are taken for dead, and wake up (children of `forked.py`)."""

import os
import time
from pathlib import Path

from tests.helpers.forked import Child


def stop_at(pattern: str) -> dict:
    """Faults of a child that stops itself at this step."""
    return {"acts": [{"match": pattern, "do": "stop"}]}


def take_for_dead(out: Path, child: Child) -> None:
    """Let a task's last sign of life be an hour old, as if it slept."""
    (sign,) = (path for path in (out / "tasks").iterdir() if path.name.split("-")[1] == str(child.pid))
    hour_ago = time.time() - 3600
    os.utime(sign, (hour_ago, hour_ago))


def told_that_it_slept(child: Child) -> None:
    """Wait for its end, which must be the line for those that others buried."""
    ended = child.wait()
    assert ended.code == 74, ended.err
    assert ended.err.endswith(": another task went on while this one slept; run it again\n"), ended.err
    assert "Traceback" not in ended.err
