"""`train --tensorboard`: what TensorBoard reads back is what steps.csv, metrics.jsonl and the evaluation say."""

import json
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mmkd.data_manifests.errors import InterruptedByUserError
from mmkd.student.looking.event_files import EventFiles
from mmkd.student.networks.networks import build_network
from mmkd.student.recipes.train import TrainRecipe
from mmkd.student.training.loop import fit
from mmkd.student.training.step_log import read_intervals
from tests.helpers.in_process import call, call_ok, refused
from tests.helpers.moving_bars import Interrupting, MovingBars
from tests.helpers.places import unpack_before

RECIPE = TrainRecipe(
    network="small3d", epochs=2, batch_size=4, learning_rate=1e-3, loader_threads=1, loader_processes=0, log_steps=2
)
TRAIN = ("mmkd-student", "train", "-c", "student.yaml", "--cache", "cache", "--node-copies", "copies")


def scalars(folder):
    """Tag -> [(step, value)], as TensorBoard shows them."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def train(run, events, data=None, held_out=(0.25, 0.5, 0.75)):
    found = iter([{"direction": {"clips": 4.0, "top1": top1, "nll": 1 / 3}} for top1 in held_out])
    network = build_network(RECIPE, heads={"direction": 4}, modality="rgb")
    data = MovingBars(18) if data is None else data
    fit(
        network, data, RECIPE, run_dir=run, validate=lambda _: next(found), watch=EventFiles(events), progress=False
    )


def test_tensorboard_shows_every_interval_and_every_epoch(tmp_path):
    train(tmp_path / "run", tmp_path / "events")
    found, rows = scalars(tmp_path / "events"), read_intervals(tmp_path / "run" / "steps.csv")
    assert len(rows) == 6
    for name in ("loss", "gradient_norm", "learning_rate", "clips_per_second"):
        expected = [(row.last_step, pytest.approx(getattr(row, name), rel=1e-6)) for row in rows]
        assert found.pop(f"train/{name}") == expected, "as float32"
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert found.pop("epoch/loss") == [(line["steps"], pytest.approx(line["loss"], rel=1e-6)) for line in metrics]
    assert found.pop("held_out/direction/top1") == [(5, 0.25), (10, 0.5)]
    assert found.pop("held_out/direction/nll") == [(5, pytest.approx(1 / 3)), (10, pytest.approx(1 / 3))]
    assert not found


def test_a_run_that_goes_on_shows_each_step_once(tmp_path):
    with pytest.raises(InterruptedByUserError):
        train(tmp_path / "run", tmp_path / "events", Interrupting(18, at=27))
    assert len(list((tmp_path / "events").iterdir())) == 1
    # As if steps that no checkpoint has were done before the stop, too.
    extra = EventFiles(tmp_path / "events")
    with extra.over(8, 10):
        extra._add({"train/loss": 99.0}, 9)
    assert scalars(tmp_path / "events")["train/loss"][-1] == (9, 99.0)
    train(tmp_path / "run", tmp_path / "events")
    rows = read_intervals(tmp_path / "run" / "steps.csv")
    assert len(list((tmp_path / "events").iterdir())) == 3
    expected = [(row.last_step, pytest.approx(row.loss, rel=1e-6)) for row in rows]
    assert scalars(tmp_path / "events")["train/loss"] == expected


def test_the_command_adds_the_evaluation_and_changes_no_bit_of_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(unpack_before(tmp_path))
    call_ok(*TRAIN, "-o", "watched", "--tensorboard", "events/watched")
    call_ok(*TRAIN, "-o", "plain")
    assert (tmp_path / "watched" / "model.safetensors").read_bytes() == (
        tmp_path / "plain" / "model.safetensors"
    ).read_bytes()
    found = scalars("events/watched")
    steps = read_intervals(tmp_path / "watched" / "steps.csv")[-1].last_step
    metrics = json.loads((tmp_path / "watched" / "evaluation.json").read_text())["metrics"]["standard"]["action"]
    for name in ("top1", "top5", "mean_class", "ece", "nll", "teacher_agreement"):
        assert found[f"evaluation/standard/action/{name}"] == [(steps, pytest.approx(metrics[name], rel=1e-6))]


def test_an_expert_may_be_looked_at_like_a_student(tmp_path, monkeypatch):
    monkeypatch.chdir(unpack_before(tmp_path))
    teach = ("mmkd-cache", "teach", "rgb", "-c", "teacher.yaml", "--set", "experts.rgb.train.epochs=7")
    done = call(*teach, "-o", "new", "--tensorboard", "events", "--profile", 1)
    assert done.code == 0, done.err
    assert "1 step, " in done.err
    training = tmp_path / "new" / "training"
    rows = read_intervals(training / "steps.csv")
    assert scalars("events")["train/loss"] == [(row.last_step, pytest.approx(row.loss, rel=1e-6)) for row in rows]
    assert json.loads((training / "trace.json").read_text())["traceEvents"]


def test_without_the_package_nothing_is_begun(tmp_path, monkeypatch):
    monkeypatch.chdir(unpack_before(tmp_path))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert "pip install 'mmkd[tensorboard]'" in refused(*TRAIN, "-o", "none", "--tensorboard", "events")
    assert not (tmp_path / "none").exists()
    assert not (tmp_path / "events").exists()
