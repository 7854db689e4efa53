"""The script that `submit` writes, run by bash with stand-ins for Slurm: what asks to be run again, what not."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from mmkd.cache_tools.cluster.recipe import ClusterRecipe
from mmkd.cache_tools.cluster.script import Job, render

BUILD = """#!/bin/bash
# as a build does: a signal stops it after what is under way, with exit code 75
trap 'sleep 0.1; exit 75' USR1 TERM
[ "$1 $2" = "build -c" ] && touch started
[ "$END" ] && exit "$END"
while :; do sleep 0.02; done
"""
SCONTROL = """#!/bin/bash
if [ "$1" = -o ]; then echo "JobId=17 JobState=$STATE Requeue=1"; else echo "$@" >> asked; fi
"""
JOB = Job("mmkd-build", about="A build.", command="mmkd-cache build -c 'a recipe.yaml'", tasks=8)


@pytest.fixture
def start(tmp_path):
    """Start the script in a folder whose name a shell would take apart."""
    folder = tmp_path / "a folder; it's odd"
    folder.mkdir()
    script = render(JOB, ClusterRecipe(setup="export A=1\ntest $A = 1 || exit 9"), folder=folder)
    for name, text in {"job": script, "mmkd-cache": BUILD, "scontrol": SCONTROL}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)

    def started(end: str = "", state: str = "RUNNING", **variables: str) -> subprocess.Popen:
        environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "END": end, "STATE": state}
        job = subprocess.Popen([folder / "job"], env=environment | {"SLURM_JOB_ID": "17"} | variables)
        deadline = time.monotonic() + 60
        while not (folder / "started").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)  # until the script waits
        return job

    return started


def asked(folder: Path) -> str:
    files = list(folder.glob("*/asked"))
    return files[0].read_text() if files else ""


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=["limit", "preempted"])
def test_what_is_stopped_while_slurm_takes_it_for_running_asks_to_be_run_again(start, tmp_path, number):
    job = start()
    job.send_signal(number)
    assert job.wait(60) == 75
    assert asked(tmp_path) == "requeue 17\n"


@pytest.mark.parametrize("state", ["CANCELLED", "TIMEOUT"])
def test_what_is_cancelled_or_out_of_time_stays_so(start, tmp_path, state):
    job = start(state=state)
    job.send_signal(signal.SIGTERM)
    assert job.wait(60) == 75
    assert asked(tmp_path) == ""


def test_a_task_of_an_array_names_itself_since_the_last_one_has_the_whole_array_s_number(start, tmp_path):
    job = start(SLURM_ARRAY_JOB_ID="17", SLURM_ARRAY_TASK_ID="3")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(60) == 75
    assert asked(tmp_path) == "requeue 17_3\n"


@pytest.mark.parametrize("end", ["0", "2", "3", "74"])
def test_a_build_that_ends_by_itself_is_not_run_again_and_its_exit_code_stays(start, tmp_path, end):
    job = start(end)
    assert job.wait(60) == int(end)
    assert asked(tmp_path) == ""


def test_a_node_without_the_program_is_named_with_what_to_do(tmp_path):
    script = render(JOB, ClusterRecipe(), folder=tmp_path)
    done = subprocess.run(
        ["/bin/bash", "-c", script], capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"}, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: mmkd-cache is not found on ")
    assert done.stderr.endswith("; say in the recipe's cluster.setup how it is\n")
    assert done.stderr.count("\n") == 1
