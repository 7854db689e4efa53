"""The cluster section of a recipe, and the lines that it becomes."""

import re

import pytest
from pydantic import ValidationError

from mmkd.cache_tools.cluster.recipe import ClusterRecipe
from mmkd.cache_tools.cluster.script import Job, render
from mmkd.pipeline.recipe import TeacherRecipe
from mmkd.student.recipes.student import StudentRecipe


def options_of(script: str) -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", script, re.MULTILINE))


TIMES = {"30": 1800, "90:30": 5430, "12:01:02": 43_262, "2-12": 216_000, "2-12:30": 217_800, "1-00:00:05": 86_405}


@pytest.mark.parametrize(("time", "seconds"), TIMES.items())
def test_every_form_of_a_time_that_slurm_knows_is_taken_where_it_leaves_room_to_stop(time, seconds):
    assert ClusterRecipe(time=time, stop_seconds=min(seconds // 2, 65535)).time == time
    if seconds < 2 * 65535:
        with pytest.raises(ValidationError, match="told to stop before it has done much"):
            ClusterRecipe(time=time, stop_seconds=seconds // 2 + 1)


@pytest.mark.parametrize(
    "values",
    [
        {"time": "12h"},
        {"time": "1:2:3:4"},
        {"memory": "64"},
        {"memory": "64 GB"},
        {"partition": "gpu\n#SBATCH --account=x"},
        {"partition": "a b"},
        {"account": "$(id)"},
        {"sbatch": ["constraint=a100"]},
        {"sbatch": ["--constraint=a100\nrm -r x"]},
        {"sbatch": ["--array=0-3"]},
        {"sbatch": ["-a 0-3"]},
        {"sbatch": ["-N2"]},
        {"sbatch": ["--no-requeue"]},
        {"gpus": 2, "processes": 3},
        {"stop_seconds": 5},
        {"nodes": 0},
        {"queue": "x"},
    ],
)
def test_what_slurm_would_not_take_or_the_script_depends_on_is_refused(values):
    with pytest.raises(ValidationError):
        ClusterRecipe(**values)


def test_each_setting_becomes_its_line_and_what_is_not_set_none():
    cluster = ClusterRecipe(
        partition="a,b", account="me", time="12:00:00", memory="64G", cpus=9, sbatch=("--exclude=n[1-3]", "-C a100")
    )
    script = render(Job("j", about="A job.", command="true", tasks=8), cluster, folder="/tmp", after=("7", "9"))
    found = options_of(script)
    assert found == {
        "job-name": "j",
        "partition": "a,b",
        "account": "me",
        "time": "12:00:00",
        "nodes": "1",
        "ntasks-per-node": "1",
        "gpus-per-node": "1",
        "cpus-per-task": "9",
        "mem": "64G",
        "array": "0-7",
        "output": "%x-%A_%a.log",
        "open-mode": "append",
        "signal": "B:USR1@120",
        "dependency": "afterok:7:9",
        "kill-on-invalid-dep": "yes",
        "requeue": "",
        "exclude": "n[1-3]",
    }
    assert script.splitlines()[:2] == ["#!/bin/bash", "# A job."]
    assert "#SBATCH -C a100\n" in script
    bare = options_of(render(Job("j", about="A job.", command="true"), ClusterRecipe(gpus=0), folder="/tmp"))
    assert set(bare) == {"job-name", "nodes", "ntasks-per-node", "output", "open-mode", "signal", "requeue"}


@pytest.mark.parametrize(
    ("nodes", "gpus", "processes", "tasks_per_node", "srun"),
    [
        (1, 1, None, "1", False),
        (1, 8, None, "8", True),
        (2, 1, None, "1", True),
        (2, 0, 2, "2", True),
        (1, 0, 1, "1", False),
    ],
)
def test_a_training_has_a_process_for_each_gpu_of_each_node(nodes, gpus, processes, tasks_per_node, srun):
    cluster = ClusterRecipe(nodes=nodes, gpus=gpus, processes=processes, cpus=4)
    script = render(Job("j", about="A job.", command="true", trains=True), cluster, folder="/tmp")
    found = options_of(script)
    assert (found["nodes"], found["ntasks-per-node"]) == (str(nodes), tasks_per_node)
    assert found.get("gpus-per-node") == (str(gpus) if gpus else None)
    assert ("\nsrun --kill-on-bad-exit=0 --cpus-per-task=4 true &\n" in script) == srun
    assert ("\ntrue &\n" in script) != srun


def test_both_recipes_have_the_section_and_a_run_of_before_keeps_what_is_written_of_it():
    data = {"manifest": "m", "videos": "v"}
    for model in (TeacherRecipe, StudentRecipe):
        assert model(data=data, cluster={"partition": "gpu"}).cluster.partition == "gpu"
    assert "cluster" not in StudentRecipe(data=data).model_dump(mode="json")
