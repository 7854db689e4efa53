"""A task's place among several, from options or from a Slurm array, and signals wherever a command may be."""

import json
import os
import signal

import pytest

from mmkd.cache_tools.process.place import from_place, task_place
from mmkd.data_manifests.errors import InputError
from tests.helpers.commands import ENVIRONMENT
from tests.helpers.flow_videos import write_texture
from tests.helpers.in_process import call, call_ok, refused


def array(number, count, lowest=0, step=1):
    values = {"ID": number, "COUNT": count, "MIN": lowest, "STEP": step, "MAX": lowest + (count - 1) * step}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in values.items()}


@pytest.mark.parametrize(
    ("task", "tasks", "environ", "place"),
    [
        (None, None, {}, (0, 1)),
        (3, 16, {}, (3, 16)),
        (None, 16, {}, (0, 16)),
        (None, None, array(3, 16), (3, 16)),
        (None, None, array(1, 16, lowest=1), (0, 16)),  # --array=1-16
        (None, None, array(9, 4, lowest=3, step=2), (3, 4)),  # --array=3-9:2
        (None, None, array(17, 3, lowest=1), (1, 3)),  # --array=1,5,17: some place below 3
        (None, None, {"SLURM_ARRAY_TASK_ID": ""}, (0, 1)),
        (2, 5, array(3, 16), (2, 5)),  # what is typed holds
        (2, 5, {"SLURM_ARRAY_TASK_ID": "x"}, (2, 5)),
    ],
)
def test_a_task_finds_its_place_by_the_options_or_else_by_the_array(task, tasks, environ, place):
    assert task_place(task, tasks, environ) == place


@pytest.mark.parametrize(
    ("task", "tasks", "environ", "said"),
    [
        (3, None, {}, "--task 3 --of 1: tasks are counted from 0"),
        (16, 16, {}, "--task 16 --of 16: tasks are counted from 0"),
        (3, None, array(3, 16), "--task 3: give both --task and --of, or neither: this is task 3 of the 16"),
        (None, 8, array(3, 16), "--of 8: give both --task and --of, or neither"),
        (None, None, {"SLURM_ARRAY_TASK_ID": "3"}, "SLURM_ARRAY_TASK_COUNT is not set"),
        (None, None, array("x", 4), "SLURM_ARRAY_TASK_ID is 'x', no number"),
        (None, None, array(3, 16, lowest=4), "SLURM_ARRAY_TASK_MIN=4.*no task of a Slurm array has these"),
        (None, None, array(3, 0), "SLURM_ARRAY_TASK_COUNT=0"),
    ],
)
def test_what_contradicts_itself_is_refused_with_what_to_do(task, tasks, environ, said):
    with pytest.raises(InputError, match=said):
        task_place(task, tasks, environ)


def test_from_each_place_all_items_come_and_each_begins_elsewhere():
    items = list(range(10))
    lists = [from_place(items, (number, 4)) for number in range(4)]
    assert [found[0] for found in lists] == [0, 2, 5, 7]
    assert all(sorted(found) == items for found in lists)
    assert from_place([], (3, 4)) == []


def first_shard(quick, out, *options):
    call_ok("mmkd-cache", "build", *quick.options(), "-o", out, *options)
    (journal,) = (out / "journal").iterdir()
    return json.loads(journal.read_text().splitlines()[0])["shard"]


def test_a_build_in_an_array_begins_where_its_task_does(quick, tmp_path, monkeypatch):
    by_options = [first_shard(quick, tmp_path / str(task), "--task", task, "--of", 2) for task in (0, 1)]
    assert by_options[0] != by_options[1]
    for name, value in array(7, 2, lowest=5, step=2).items():
        monkeypatch.setitem(ENVIRONMENT, name, value)
    assert first_shard(quick, tmp_path / "array") == by_options[1]
    said = refused("mmkd-cache", "build", *quick.options(), "-o", tmp_path / "none", "--of", 2)
    assert "this is task 1 of the 2 of a Slurm array" in said
    assert not (tmp_path / "none").exists()


def test_flow_in_an_array_begins_where_its_task_does_and_writes_the_same_files(tmp_path, monkeypatch):
    for number in range(4):
        write_texture(tmp_path / "in" / f"v{number}.webm", 3, size=(48, 32), seed=number)
    options = (tmp_path / "in", "--device", "cpu", "--preset", "fast", "--workers", 0)
    call_ok("mmkd-cache", "flow", *options, "-o", tmp_path / "alone")
    for name, value in array(2, 4).items():
        monkeypatch.setitem(ENVIRONMENT, name, value)
    call_ok("mmkd-cache", "flow", *options, "-o", tmp_path / "task")
    marks = sorted((tmp_path / "task" / ".done").glob("v*"), key=lambda path: path.stat().st_mtime_ns)
    assert [path.name[:2] for path in marks] == ["v2", "v3", "v0", "v1"]
    alone, task = (
        {path.relative_to(folder): path.read_bytes() for path in folder.glob("v*/*")}
        for folder in (tmp_path / "alone", tmp_path / "task")
    )
    assert len(alone) == 16
    assert alone == task


LONG = {
    "build": ("mmkd-cache", "build", "--expert", "e", "-o"),
    "teach": ("mmkd-cache", "teach", "rgb", "-o"),
    "train": ("mmkd-student", "train", "--cache", "c", "-o"),
    "flow": ("mmkd-cache", "flow", "v", "-o"),
}
DATA = ("--manifest", "m", "--videos", "v")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
@pytest.mark.parametrize("name", LONG)
def test_a_signal_before_the_work_begins_ends_with_exit_75_and_nothing_written(tmp_path, monkeypatch, name, number):
    from mmkd.pipeline.flow_command import run
    from mmkd.student.training import devices

    for module in (devices, run):
        monkeypatch.setattr(module, "choose_device", lambda name: os.kill(os.getpid(), number))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("experts: {rgb: {modality: rgb}}\n" if name == "teach" else "{}\n")
    (tmp_path / "v").mkdir()
    write_texture(tmp_path / "v" / "v.webm", 2, size=(48, 32), seed=0)
    monkeypatch.chdir(tmp_path)
    before, there = signal.getsignal(number), sorted(tmp_path.rglob("*"))
    options = () if name == "flow" else ("-c", recipe, *DATA)
    result = call(*LONG[name], tmp_path / "out", *options)
    assert result.code == 75, result.err
    assert "stopped; run the same command again to go on" in result.err
    assert signal.getsignal(number) is before
    assert sorted(tmp_path.rglob("*")) == there
