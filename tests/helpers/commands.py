"""Running the commands as a user would, each in a process of its own."""

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

NODE = tempfile.mkdtemp(prefix="mmkd-tests-")
"""Stands for the machine's own disk: copies of targets go there, not into the user's folder."""
atexit.register(shutil.rmtree, NODE, ignore_errors=True)
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("MMKD_")}
ENVIRONMENT["SLURM_TMPDIR"] = NODE


@dataclass(frozen=True)
class Result:
    """What a command did."""

    code: int
    out: str
    err: str


def run_command(*arguments: object, timeout_seconds: float = 250) -> Result:
    """Run `mmkd-cache ...` or `mmkd-student ...` as a user would, in a process of its own."""
    program = Path(sys.executable).with_name(str(arguments[0]))
    done = subprocess.run(
        [program, *map(str, arguments[1:])],
        capture_output=True,
        text=True,
        timeout=timeout_seconds,
        env=ENVIRONMENT,
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def run_ok(*arguments: object) -> str:
    """Run a command that must succeed; return its stdout."""
    result = run_command(*arguments)
    assert result.code == 0, result.err[-2000:]
    return result.out
