"""`train --profile`: a trace that is valid, times that add up, and a run that keeps its bits."""

import json
import time

import numpy as np
import pytest
import torch

from mmkd.data_manifests.errors import InputError, InterruptedByUserError
from mmkd.student.looking.step_profile import StepProfile
from mmkd.student.looking.step_times import step_times, times_lines
from mmkd.student.networks.networks import build_network
from mmkd.student.recipes.train import TrainRecipe
from mmkd.student.training.loop import fit
from tests.helpers.in_process import call
from tests.helpers.moving_bars import Interrupting, MovingBars
from tests.helpers.places import unpack_before

RECIPE = TrainRecipe(
    network="small3d", epochs=3, batch_size=4, learning_rate=1e-3, loader_threads=2, loader_processes=0
)
READ_SECONDS, SLEEP_SECONDS = 0.02, 0.03


class SlowBars(MovingBars):
    """Every view takes a while to read."""

    def item(self, row, view):
        time.sleep(READ_SECONDS)
        return super().item(row, view)


class Sleeper(torch.nn.Module):
    """A network whose forward pass takes a known time."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, inputs):
        time.sleep(SLEEP_SECONDS)
        return self.network(inputs)


def train(data, profile=None, recipe=RECIPE, wrap=lambda network: network, run_dir=None):
    network = wrap(build_network(recipe, heads={"direction": 4}, modality="rgb"))
    watch = {} if profile is None else {"watch": profile}
    fit(network, data, recipe, progress=False, run_dir=run_dir, **watch)
    return network.state_dict()


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    path = tmp_path_factory.mktemp("profile") / "trace.json"
    weights = train(SlowBars(16), StepProfile(path, 4), wrap=Sleeper)
    return path, json.loads(path.read_text()), weights


def test_the_trace_is_a_chrome_trace_with_every_part_of_every_step(profiled):
    _, trace, _ = profiled
    complete = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    for event in complete:
        assert isinstance(event["name"], str)
        assert event["dur"] >= 0
        assert {"ts", "pid", "tid"} <= event.keys()
    names = [event["name"] for event in complete]
    assert sorted(name for name in names if name.startswith("ProfilerStep#")) == [
        f"ProfilerStep#{n}" for n in (5, 6, 7, 8)
    ], "after a warm-up of 5"
    parts = (
        "waiting for clips",
        "labels and targets",
        "forward",
        "backward",
        "optimiser",
        "waiting for the device",
    )
    assert {name: names.count(f"mmkd: {name}") for name in parts} == dict.fromkeys(parts, 4)
    assert "aten::convolution" in names
    assert names.count("mmkd: reading") > 0


def test_the_times_are_those_that_the_parts_took_and_add_up(profiled):
    times = step_times(profiled[1])
    own = {part.name: part.seconds for part in times.parts}
    assert times.steps == 4
    assert sum(own.values()) == pytest.approx(times.seconds)
    assert own["forward"] >= 4 * SLEEP_SECONDS
    assert min(own.values()) > 0
    assert own["the rest"] < times.seconds / 2
    assert own["optimiser"] + own["labels and targets"] < own["forward"]
    assert 1 <= times.reading_threads <= 2
    assert times.reading_seconds >= READ_SECONDS, "one clip at least"
    assert not times.on_device
    text = "\n".join(times_lines(times))
    assert text.startswith("4 steps, ")
    assert f"{1e3 * own['forward'] / 4:.2f} ms" in text
    assert "threads read clips for" in text.replace("1 thread ", "1 threads ")


def test_a_slow_reader_shows_as_waiting(tmp_path):
    recipe = RECIPE.model_copy(update={"loader_threads": 1, "prefetch_batches": 1})
    train(SlowBars(16), StepProfile(tmp_path / "trace.json", 3), recipe)
    own = {part.name: part.seconds for part in step_times(json.loads((tmp_path / "trace.json").read_text())).parts}
    assert max(own, key=own.get) == "waiting for clips"


def test_a_profiled_run_keeps_its_bits(profiled):
    plain = train(MovingBars(16), wrap=Sleeper)
    assert all(torch.equal(value, profiled[2][name]) for name, value in plain.items())


def test_parts_of_a_step_that_come_several_times_are_added(tmp_path):
    recipe = RECIPE.model_copy(update={"accumulate": 2})
    train(MovingBars(16), StepProfile(tmp_path / "trace.json", 2), recipe)
    names = [event["name"] for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]]
    assert (names.count("mmkd: forward"), names.count("mmkd: backward"), names.count("mmkd: optimiser")) == (
        4,
        4,
        2,
    )


def test_a_run_too_short_to_be_profiled_says_so_and_trains(tmp_path, caplog):
    train(MovingBars(4), StepProfile(tmp_path / "trace.json", 2))
    assert "nothing is profiled: 3 steps are left, and the first 5 are a warm-up" in caplog.text
    assert not (tmp_path / "trace.json").exists()


def test_where_fewer_steps_are_left_those_are_profiled(tmp_path, caplog):
    caplog.set_level("INFO")
    train(MovingBars(8), StepProfile(tmp_path / "trace.json", 50))
    assert "1 step, " in caplog.text
    assert step_times(json.loads((tmp_path / "trace.json").read_text())).steps == 1


def test_a_stop_while_profiling_keeps_the_run_and_a_trace_of_what_was_done(tmp_path):
    recipe = RECIPE.model_copy(update={"loader_threads": 1, "prefetch_batches": 1})
    data = Interrupting(16, at=4 * 8)
    with pytest.raises(InterruptedByUserError):
        train(data, StepProfile(tmp_path / "trace.json", 6), recipe, run_dir=tmp_path)
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert list(tmp_path.glob("checkpoint-*"))


def test_a_trace_is_not_written_where_the_folder_is_another_s(tmp_path):
    def gone():
        raise InputError("the folder is another's")

    with pytest.raises(InputError, match="another's"):
        train(MovingBars(16), StepProfile(tmp_path / "trace.json", 2, gone))
    assert not list(tmp_path.iterdir())


def test_a_kernel_belongs_to_the_part_that_launched_it_whenever_and_wherever_it_ran():
    def event(name, ts, dur, cat="user_annotation", tid=1, **args):
        return {"ph": "X", "name": name, "ts": ts, "dur": dur, "cat": cat, "tid": tid, "pid": 1, "args": args}

    trace = [
        event("ProfilerStep#5", 0, 100),
        event("ProfilerStep#6", 100, 100),
        event("mmkd: forward", 10, 20),
        event("mmkd: backward", 30, 40),
        event("mmkd: forward", 110, 30),
        event("mmkd: forward", -30, 20),  # of the warm-up
        event("mmkd: reading", 5, 60, tid=2),
        event("mmkd: reading", 5, 70, tid=3),
        event("launch", 15, 1, "cuda_runtime", correlation=1),
        event("launch", 35, 1, "cuda_driver", tid=9, correlation=2),  # autograd's thread
        event("launch", 80, 1, "cuda_runtime", correlation=3),
        event("launch", -20, 1, "cuda_runtime", correlation=4),
        event("kernel", 90, 300, "kernel", tid=7, correlation=1),  # runs later, also past the end
        event("kernel", 95, 17, "kernel", tid=7, correlation=2),
        event("copy", 99, 5, "gpu_memcpy", tid=8, correlation=3),
        event("kernel", 20, 999, "kernel", tid=7, correlation=4),
        event("mmkd: forward", 90, 300, "gpu_user_annotation", tid=7),
        {"ph": "M", "name": "process_name"},
    ]
    draw = np.random.default_rng(0)
    times = step_times({"traceEvents": [trace[place] for place in draw.permutation(len(trace))]})
    host = {part.name: 1e6 * part.seconds for part in times.parts}
    device = {part.name: 1e6 * part.device_seconds for part in times.parts}
    assert (times.steps, 1e6 * times.seconds) == (2, pytest.approx(200))
    assert {name: value for name, value in host.items() if value} == pytest.approx(
        {"forward": 50, "backward": 40, "the rest": 110}
    )
    assert {name: value for name, value in device.items() if value} == pytest.approx(
        {"forward": 300, "backward": 17, "the rest": 5}
    )
    assert (times.reading_threads, 1e6 * times.reading_seconds) == (2, pytest.approx(130))
    assert "device 0.15 ms" in "\n".join(times_lines(times))
    with pytest.raises(ValueError, match="no step"):
        step_times({"traceEvents": trace[2:]})


def test_the_command_writes_the_trace_beside_the_run_and_tells_the_times_on_stderr(tmp_path, monkeypatch):
    monkeypatch.chdir(unpack_before(tmp_path))
    train = ("mmkd-student", "train", "-c", "student.yaml", "--cache", "cache", "--node-copies", "copies")
    done = call(*train, "--set", "train.epochs=4", "-o", "profiled", "--profile", 2)
    assert done.code == 0, done.err
    assert "2 steps, " in done.err
    assert "waiting for clips" in done.err
    assert "profiled/trace.json: the trace" in done.err
    assert "waiting" not in done.out
    assert step_times(json.loads((tmp_path / "profiled" / "trace.json").read_text())).steps == 2
    assert "is not in the range" in call(*train, "-o", "none", "--profile", 0).err
