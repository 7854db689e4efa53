"""On a real Slurm of two nodes: arrays, jobs that are killed, stopped or preempted, chains, several processes."""

import json
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmkd.cache_tools.cluster.recipe import ClusterRecipe
from mmkd.cache_tools.cluster.script import Job, render
from tests.helpers.commands import ENVIRONMENT
from tests.helpers.forked import Forked, contents
from tests.helpers.in_process import call_ok, refused
from tests.helpers.slurm import Slurm, needs_slurm, slurm

pytestmark = needs_slurm
PROGRAMS = Path(sys.executable).parent
CLUSTER = ("--gpus", 0, "--cpus", 1, "--time", 10)
STOPPABLE = """#!/bin/bash
# as a build does: a signal stops it with exit code 75, and when it runs again it ends well
trap 'echo stopped >> began; exit 75' USR1 TERM
echo "$SLURM_ARRAY_TASK_ID.$SLURM_RESTART_COUNT" >> began
[ "$SLURM_RESTART_COUNT" ] && exit 0
[[ " $* " = *" $SLURM_ARRAY_TASK_ID "* ]] || exit 0
while :; do sleep 0.05; done
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Slurm]:
    with slurm() as started:
        yield started


@pytest.fixture
def submit(cluster, tmp_path, monkeypatch):
    """Submit by our own commands, from an own folder; return the jobs by name."""
    monkeypatch.setitem(ENVIRONMENT, "SLURM_CONF", cluster.environment["SLURM_CONF"])
    monkeypatch.setitem(ENVIRONMENT, "PATH", f"{PROGRAMS}:{cluster.environment['PATH']}")
    monkeypatch.setitem(ENVIRONMENT, "OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)

    def submitted(program: str, *arguments: object) -> dict[str, str]:
        return json.loads(call_ok(program, "submit", *arguments, *CLUSTER, "--json"))["jobs"]

    return submitted


@pytest.fixture
def stoppable(cluster, tmp_path):
    """Submit an array of four as `submit` does, of which tasks of some numbers go on until they are stopped."""
    (tmp_path / "stoppable").write_text(STOPPABLE)
    (tmp_path / "stoppable").chmod(0o755)

    def submitted(*numbers: int) -> str:
        job = Job("stoppable", about="A stand-in.", command=f"./stoppable {' '.join(map(str, numbers))}", tasks=4)
        script = render(job, ClusterRecipe(gpus=0), folder=tmp_path).replace("command -v", "true")
        (tmp_path / "job.sh").write_text(script)
        found = cluster.run("sbatch", "--parsable", tmp_path / "job.sh", cwd=tmp_path).strip()
        began = tmp_path / "began"
        own = {f"{number}." for number in numbers}
        cluster.wait_until(lambda: began.exists() and own <= set(began.read_text().split()), "the tasks")
        return found

    return submitted


def logs(folder: Path) -> str:
    return "\n".join(f"{path.name}: {path.read_text()[-1500:]}" for path in sorted(folder.glob("*.log")))


def restarts(cluster: Slurm, number: str) -> list[str]:
    return [cluster.job(f"{number}_{task}")["Restarts"] for task in range(4)]


def test_teach_build_and_verify_in_a_chain_make_the_bytes_of_one_process(
    cluster: Slurm, submit, quick: Forked, tmp_path
):
    """An expert is taught by one job, an array builds with it in the next, and a third one verifies."""
    (tmp_path / "short.yaml").write_text(
        json.dumps({"experts": {"rgb": {"train": {"epochs": 1, "batch_size": 8, "warmup_epochs": 0}}}})
    )
    options = [*quick.options()[: quick.options().index("--expert")], "-c", "short.yaml"]
    taught = submit("mmkd-cache", "teach", "rgb", *options, "-o", "experts")["mmkd-teach"]
    build = (*options, "--expert", "experts/rgb")
    jobs = submit("mmkd-cache", "build", *build, "-o", "cache", "--tasks", 2, "--after", taught)
    for job, before in (("mmkd-build", taught), ("mmkd-verify", jobs["mmkd-build"])):
        assert f"afterok:{before}" in cluster.run("scontrol", "-o", "show", "job", jobs[job])
    cluster.wait(taught, *jobs.values())
    call_ok("mmkd-cache", "build", *build, "-o", "alone")
    assert contents(tmp_path / "cache") == contents(tmp_path / "alone"), logs(tmp_path)
    assert [cluster.job(f"{jobs['mmkd-build']}_{task}")["ExitCode"] for task in (0, 1)] == ["0:0", "0:0"]
    (log,) = tmp_path.glob("mmkd-verify-*.log")
    assert "; 0 damaged" in log.read_text(), log.read_text()


def test_a_killed_task_that_is_queued_again_builds_to_the_same_bytes(cluster: Slurm, submit, quick, tmp_path):
    jobs = submit("mmkd-cache", "build", *quick.options(), "-o", "cache", "--tasks", 1, "--no-verify")
    task = f"{jobs['mmkd-build']}_0"
    cluster.wait_until(lambda: list((tmp_path / "cache").glob("tasks/*.json")), "a sign of life")
    (sign,) = (tmp_path / "cache").glob("tasks/*.json")
    os.kill(json.loads(sign.read_bytes())["pid"], signal.SIGKILL)  # as for want of memory
    cluster.wait(task, states=("FAILED",))
    assert not (tmp_path / "cache" / "root.json").exists(), "killed too late to mean anything"
    cluster.run("scontrol", "requeue", task)
    cluster.wait(task)
    assert contents(tmp_path / "cache") == contents(quick.cache), logs(tmp_path)


def test_tasks_that_are_told_to_stop_are_run_again_and_no_others(cluster: Slurm, stoppable, tmp_path):
    """The array's last task has the number of the whole array: by that number all tasks would run again."""
    array = stoppable(0, 3)
    cluster.wait(f"{array}_1", f"{array}_2")
    for number in (0, 3):
        cluster.run("scancel", "--signal=USR1", "--batch", f"{array}_{number}")
        cluster.wait_until(lambda number=number: restarts(cluster, array)[number] == "1", "the second start")
    cluster.wait(f"{array}_0", f"{array}_3")
    assert restarts(cluster, array) == ["1", "0", "0", "1"]
    began = ["0.", "0.1", "1.", "2.", "3.", "3.1", "stopped", "stopped"]
    assert sorted((tmp_path / "began").read_text().split()) == began


def test_cancelled_and_killed_tasks_stay_so_until_they_are_queued_again(cluster: Slurm, stoppable):
    array = stoppable(2, 3)
    tasks = [f"{array}_2", f"{array}_3"]
    cluster.run("scancel", tasks[0])
    cluster.run("scancel", "--signal=KILL", "--full", tasks[1])
    cluster.wait(*tasks, states=("CANCELLED",))
    cluster.wait_until(lambda: all(cluster.job(task).get("EndTime") != "Unknown" for task in tasks), "their end")
    assert [cluster.states(task) for task in tasks] == [["CANCELLED"]] * 2
    assert restarts(cluster, array) == ["0"] * 4
    for task in tasks:
        cluster.run("scontrol", "requeue", task)
    cluster.wait(*tasks)
    assert restarts(cluster, array) == ["0", "0", "1", "1"]


def test_a_preempted_task_stops_at_a_clean_point_and_is_run_again(cluster: Slurm, stoppable, tmp_path):
    array = stoppable(3)
    script = tmp_path / "first.sh"
    script.write_text("#!/bin/bash\nsleep 0.5\n")
    first = cluster.run("sbatch", "--parsable", "-p", "high", "-N", 2, "--exclusive", script, cwd=tmp_path).strip()
    cluster.wait_until(lambda: restarts(cluster, array)[3] == "1", "preemption")
    cluster.wait(first, f"{array}_3")
    assert restarts(cluster, array) == ["0", "0", "0", "1"]
    assert "stopped" in (tmp_path / "began").read_text().split()


def test_what_slurm_refuses_is_told_in_its_own_words_and_nothing_is_left(cluster: Slurm, submit, quick, tmp_path):
    before = cluster.run("squeue", "-h", "-t", "all")
    build = ("mmkd-cache", "submit", "build", *quick.options(), "-o", "cache", "--tasks", 2, *CLUSTER)
    said = refused(*build, "--partition", "nowhere")
    assert "Slurm refused it: invalid partition specified: nowhere; " in said
    assert cluster.run("squeue", "-h", "-t", "all") == before
    assert not list(tmp_path.iterdir())


def test_a_student_on_two_nodes_is_stopped_and_continues_to_the_bits_of_torchrun_under_srun(
    cluster: Slurm, submit, quick, tmp_path
):
    recipe = {"network": "small3d", "batch_size": 8, "epochs": 10, "warmup_epochs": 0, "loader_threads": 1}
    address = {"setup": "export MASTER_ADDR=127.0.0.1"}  # both nodes are this machine, by names that no host has
    (tmp_path / "student.yaml").write_text(json.dumps({"train": recipe, "cluster": address}))
    words = ["-c", "student.yaml", "--manifest", quick.root / "manifest.jsonl", "--videos", quick.root / "videos"]
    words += ["--workers", 0, "--cache", quick.cache, "--device", "cpu"]
    job = submit("mmkd-student", *words, "-o", "ours", "--nodes", 2, "--processes", 1)["mmkd-train"]
    metrics = tmp_path / "ours" / "metrics.jsonl"
    cluster.wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") > 0, "an epoch")
    cluster.run("scancel", "--signal=USR1", "--batch", job)
    cluster.wait_until(lambda: cluster.job(job)["Restarts"] == "1", "the second start")
    assert metrics.read_text().count("\n") < 10, "stopped too late to mean anything"
    cluster.wait(job)
    launch = f"{sys.executable} -m torch.distributed.run --nnodes=2 --nproc-per-node=1 --rdzv-backend=c10d"
    launch += " --rdzv-id=$SLURM_JOB_ID --rdzv-endpoint=127.0.0.1:$((20000 + SLURM_JOB_ID)) --no-python"
    line = f"srun {launch} mmkd-student train {shlex.join(map(str, words))} -o theirs"
    programs = f"export PATH={PROGRAMS}:$PATH OMP_NUM_THREADS=1"
    (tmp_path / "theirs.sh").write_text(f"#!/bin/bash\n#SBATCH -N 2 --ntasks-per-node=1\n{programs}\n{line}\n")
    cluster.wait(cluster.run("sbatch", "--parsable", "-o", "theirs.log", "theirs.sh", cwd=tmp_path).strip())
    ours, theirs = (tmp_path / name / "model.safetensors" for name in ("ours", "theirs"))
    assert ours.read_bytes() == theirs.read_bytes()
