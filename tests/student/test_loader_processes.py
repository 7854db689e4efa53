"""Loader processes: the same bytes as threads give, one clear error for each fault, nothing left behind."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mmkd.data_manifests.errors import InputError, VideoError
from mmkd.student.data import reading as reading_module
from mmkd.student.data.batches import Schedule
from mmkd.student.data.reading import Reading, own_cores, read_batches, usual_processes
from tests.helpers import loader_run
from tests.helpers.moving_bars import MovingBars
from tests.helpers.places import ROOT
from tests.helpers.processes import session
from tests.helpers.stored_clips import rgb_views, write_videos


def read(dataset, steps, **options):
    return list(read_batches(dataset, steps, Reading(**options), views=len(steps)))


def assert_same(batches, wanted):
    for batch, other in zip(batches, wanted, strict=True):
        np.testing.assert_array_equal(batch.rows, other.rows)
        np.testing.assert_array_equal(batch.views, other.views)
        assert batch.inputs.keys() == other.inputs.keys()
        for name, value in batch.inputs.items():
            assert value.dtype == other.inputs[name].dtype
            np.testing.assert_array_equal(value, other.inputs[name])


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    return folder, write_videos(folder)


@pytest.mark.parametrize("stored", [True, False])
def test_batches_are_the_same_bytes_whoever_reads_them(videos, stored):
    folder, clips = videos
    steps = list(Schedule(8, 3 if stored else None, 4, 1, 2).steps(3, 14))
    wanted = read(rgb_views(folder, clips, stored=stored), steps, processes=0, threads=1)
    assert wanted[0].inputs["rgb"].shape == (4, 6, 24, 24, 3)
    assert len({batch.inputs["rgb"].numpy().tobytes() for batch in wanted}) > 8  # not all alike
    memory = rgb_views(folder, clips, stored=stored, memory_bytes=2**30)
    assert_same(read(memory, steps, processes=0, threads=3, ahead=1), wanted)
    for processes, ahead in ((1, 1), (3, 5)):
        data = rgb_views(folder, clips, stored=stored)
        assert_same(read(data, steps, processes=processes, ahead=ahead), wanted)


class Unreadable(MovingBars):
    def item(self, row, view):
        if (row, view) == (5, 2):
            raise VideoError("truncated")
        return super().item(row, view)


class Buggy(MovingBars):
    def item(self, row, view):
        raise KeyError("a bug")


def test_an_unreadable_clip_is_the_same_error_in_a_process_as_in_a_thread():
    steps = list(Schedule(8, 3, 4, 0).steps(0, 12))
    for processes in (0, 2):
        with pytest.raises(InputError) as refusal:
            read(Unreadable(8, views=3), steps, processes=processes)
        assert str(refusal.value) == "clip 'bar-5', view 2: truncated; leave it out, or replace its video"
    assert multiprocessing.active_children() == []


def test_a_bug_in_a_process_keeps_its_traceback():
    with pytest.raises(KeyError, match="in item"):
        read(Buggy(8), list(Schedule(8, None, 4, 0).steps(0, 2)), processes=1)


def test_clips_that_cannot_be_sent_are_refused_with_what_to_set():
    bars = MovingBars(8)
    bars.source = lambda: None
    with pytest.raises(InputError, match=r"cannot be sent to processes .*train\.loader_processes=0"):
        read(bars, list(Schedule(8, None, 4, 0).steps(0, 2)), processes=1)


def test_reading_that_is_given_up_leaves_no_process():
    batches = read_batches(MovingBars(64), Schedule(64, None, 4, 0).steps(0, 99), Reading(processes=2), views=1)
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    batches.close()
    assert multiprocessing.active_children() == []


def test_processes_are_usual_where_they_save_time(monkeypatch, videos):
    folder, clips = videos
    decoded_again, kept = (
        rgb_views(folder, clips, stored=True),
        rgb_views(folder, clips, stored=True, memory_bytes=2**30),
    )
    monkeypatch.setattr(reading_module, "own_cores", lambda: 8)
    assert usual_processes(decoded_again, 2048) == 7
    assert usual_processes(decoded_again, 2047) == 0  # over before they have started
    assert usual_processes(kept, 10**6) == 0  # nothing to decode
    assert usual_processes(MovingBars(8), 10**6) == 0  # nobody knows what reading costs
    monkeypatch.setattr(reading_module, "own_cores", lambda: 64)
    assert usual_processes(decoded_again, 10**6) == 16
    monkeypatch.setattr(reading_module, "own_cores", lambda: 3)
    assert usual_processes(decoded_again, 10**6) == 0


def test_cores_are_shared_with_the_siblings_that_torchrun_started(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    assert own_cores() == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert own_cores() == 4


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What loader_run says, until it was killed at work; and what of its session stayed behind."""
    folder, lines = tmp_path_factory.mktemp("runs"), {}
    with subprocess.Popen(
        [sys.executable, ROOT / "tests/helpers/loader_run.py", folder],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as program:
        for line in program.stdout:
            found = json.loads(line)
            lines[found.pop("what", "killed")] = found
            if "at_work" in found:
                lines["session"] = session(program.pid)
                program.kill()
        lines["stderr"] = program.stderr.read()
    until = time.monotonic() + 120
    while session(program.pid) and time.monotonic() < until:
        time.sleep(0.05)
    lines["left"] = session(program.pid)
    lines["code"] = program.returncode
    return lines


on_linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")


@on_linux
def test_a_run_read_by_processes_ends_with_the_same_bits_as_by_threads(told):
    assert told["processes"] == {"same": True}


@on_linux
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_to_the_whole_group_stops_cleanly_and_the_run_goes_on_to_the_same_bits(told, name):
    found, kept = told[name], loader_run.AT_STEP
    assert (found["code"], found["loaders"], found["same"]) == (75, [], True)
    assert found["error"].startswith(f"stopped by {name}: {kept} of 15 steps are kept")
    assert found["checkpoint"] == f"checkpoint-{kept:09}"
    assert found["files"] <= 0


@on_linux
def test_a_killed_loader_is_one_error_that_says_what_to_do_and_the_run_goes_on_to_the_same_bits(told):
    found = told["loader killed"]
    assert (found["code"], found["loaders"], found["same"]) == (74, [], True)
    assert found["error"].startswith("a loader process died (SIGKILL) when clips 'bar-")
    assert "run the same command again to go on" in found["error"]
    assert found["checkpoint"] == "checkpoint-000000005"  # of the last epoch's end
    assert found["files"] <= 0


@on_linux
def test_loaders_print_no_traceback_when_the_group_gets_a_signal_or_one_is_killed(told):
    assert "Traceback" not in told["stderr"]
    lines = [line for line in told["stderr"].splitlines() if line and "resource_tracker" not in line]
    assert lines == ["stopping after the work in hand; press Ctrl-C again to abort at once"]


@on_linux
def test_nothing_outlives_a_training_process_that_is_killed(told):
    assert told["code"] == -signal.SIGKILL
    assert len(told["killed"]["at_work"]) == 2
    assert len(told["session"]) >= 4  # it, the server, two loaders, and multiprocessing's tracker
    assert told["left"] == []
