"""The README's script for Slurm, run with stand-ins: only the signal before the time limit asks to be run again."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.helpers.places import ROOT

README = (ROOT / "cache_tools" / "README.md").read_text()
BUILD = """#!/bin/bash
# as a build does: a signal stops it after what is under way, with exit code 75
trap 'sleep 0.1; exit 75' USR1 TERM
touch started
[ "$END" ] && exit "$END"
while :; do sleep 0.02; done
"""
SCONTROL = '#!/bin/bash\necho "$@" >> asked\n'


@pytest.fixture
def start(tmp_path):
    (script,) = re.findall(r"```bash\n(#!/bin/bash\n#SBATCH.*?)```", README, re.DOTALL)
    for name, text in {"job": script, "mmkd-cache": BUILD, "scontrol": SCONTROL}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def started(end: str = "") -> subprocess.Popen:
        environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "END": end, "SLURM_JOB_ID": "17"}
        job = subprocess.Popen([tmp_path / "job"], cwd=tmp_path, env=environment | {"SLURM_ARRAY_TASK_ID": "3"})
        deadline = time.monotonic() + 60
        while not (tmp_path / "started").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)  # until the script waits
        return job

    return started


def asked(folder: Path) -> str:
    return (folder / "asked").read_text() if (folder / "asked").exists() else ""


@pytest.mark.parametrize(
    ("number", "asks"), [(signal.SIGUSR1, "requeue 17\n"), (signal.SIGTERM, "")], ids=["limit", "scancel"]
)
def test_only_the_signal_before_the_limit_asks_to_be_run_again(start, tmp_path, number, asks):
    job = start()
    job.send_signal(number)
    assert job.wait(60) == 75
    assert asked(tmp_path) == asks


@pytest.mark.parametrize("end", ["0", "2", "3", "74", "75"])
def test_a_build_that_ends_by_itself_is_not_run_again_and_its_exit_code_stays(start, tmp_path, end):
    job = start(end)
    assert job.wait(60) == int(end)
    assert asked(tmp_path) == ""
