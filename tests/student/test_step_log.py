"""steps.csv and the progress line: what a run's steps did, without a gap, whatever stopped it."""

import csv
import io
import json
import re

import numpy as np
import pytest
import torch

from mmkd.cache_tools.process import progress
from mmkd.data_manifests.errors import InterruptedByUserError
from mmkd.student.networks.networks import build_network
from mmkd.student.recipes.train import TrainRecipe
from mmkd.student.training.checkpoint import checkpoints
from mmkd.student.training.loop import fit
from mmkd.student.training.step_log import Interval, StepLog, intervals_csv, read_intervals
from mmkd.student.training.watch import Watch
from tests.helpers.moving_bars import Interrupting, MovingBars

RECIPE = TrainRecipe(
    network="small3d", epochs=2, batch_size=4, learning_rate=1e-3, loader_threads=1, loader_processes=0, log_steps=2
)
"""Of 18 clips: five steps an epoch, of 4 or 3 clips."""


class Listener(Watch):
    """Keeps what it is told."""

    def __init__(self):
        self.intervals, self.epochs = [], []

    def interval_done(self, interval):
        self.intervals.append(interval)

    def epoch_done(self, metrics):
        self.epochs.append(metrics)


def train(folder, data=None, recipe=RECIPE, **options):
    network = build_network(recipe, heads={"direction": 4}, modality="rgb")
    options = {"progress": False} | options
    fit(network, MovingBars(18) if data is None else data, recipe, run_dir=folder, **options)
    return network


def rows_of(folder):
    return list(csv.DictReader(io.StringIO((folder / "steps.csv").read_text())))


def test_rows_follow_each_other_and_their_means_are_those_of_the_epochs(tmp_path):
    heard = Listener()
    train(tmp_path, watch=heard)
    rows = rows_of(tmp_path)
    assert [(int(row["first_step"]), int(row["last_step"]), int(row["epoch"])) for row in rows] == [
        (1, 2, 1), (3, 4, 1), (5, 5, 1), (6, 6, 2), (7, 8, 2), (9, 10, 2),
    ]  # fmt: skip
    assert read_intervals(tmp_path / "steps.csv") == heard.intervals, "every digit"
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [values.to_json() for values in heard.epochs] == metrics
    clips = {1: 8, 3: 7, 5: 3, 6: 4, 7: 8, 9: 6}
    for epoch, found in enumerate(metrics, 1):
        own = [row for row in heard.intervals if row.epoch == epoch]
        assert sum(clips[row.first_step] for row in own) == 18
        assert sum(row.loss * clips[row.first_step] for row in own) / 18 == pytest.approx(found["loss"], rel=1e-12)
        assert own[-1].learning_rate == found["learning_rate"]
        assert all(row.clips_per_second > 0 and 0 < row.gradient_norm < 100 for row in own)


class Brightness(torch.nn.Module):
    """Says what it does by the mean colour alone: no drop-out, no augmentation."""

    def __init__(self):
        super().__init__()
        self.direction = torch.nn.Linear(3, 4)
        torch.nn.init.constant_(self.direction.weight, 0.1)

    def forward(self, inputs):
        return {"direction": self.direction(inputs["rgb"].float().mean((1, 2, 3)))}


def test_one_step_s_row_is_its_loss_and_the_norm_of_its_gradient():
    heard, network, data = Listener(), Brightness(), MovingBars(18, views=1)
    weights = network.direction.weight.detach().clone(), network.direction.bias.detach().clone()
    recipe = RECIPE.model_copy(update={"log_steps": 1, "epochs": 1, "batch_size": 18, "clip_norm": 1e-3})
    fit(network, data, recipe, watch=heard, progress=False)
    colours = np.stack([data.item(row, 0)["rgb"].mean((0, 1, 2)) for row in range(18)])
    logits = colours @ weights[0].double().numpy().T + weights[1].double().numpy()
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    wrong = (p - np.eye(4)[data.classes]) / 18  # the gradient of the cross-entropy in the logits
    norm = np.sqrt(((wrong.T @ colours) ** 2).sum() + (wrong.sum(0) ** 2).sum())
    assert heard.intervals[0].loss == pytest.approx(-np.log(p[np.arange(18), data.classes]).mean(), rel=1e-5)
    assert heard.intervals[0].gradient_norm == pytest.approx(norm, rel=1e-4), "before clipping"


@pytest.mark.parametrize("at", [9, 27])
def test_a_stopped_run_goes_on_without_a_gap_and_without_steps_twice(tmp_path, at):
    with pytest.raises(InterruptedByUserError):
        train(tmp_path, Interrupting(18, at=at))
    done = int(rows_of(tmp_path)[-1]["last_step"])
    assert 0 < done < 10
    train(tmp_path)
    rows = read_intervals(tmp_path / "steps.csv")
    assert [row.first_step for row in rows] == [1, *(row.last_step + 1 for row in rows[:-1])]
    assert rows[-1].last_step == 10
    assert done in [row.last_step for row in rows], "a row ends at the checkpoint"


def test_rows_of_steps_that_are_done_again_are_left_out(tmp_path):
    train(tmp_path)
    before = rows_of(tmp_path)
    newest = checkpoints(tmp_path)[0]
    assert newest.name.endswith("10")
    for path in newest.iterdir():
        path.write_bytes(b"damaged")
    train(tmp_path)
    again = rows_of(tmp_path)
    for row in (*before, *again):
        row.pop("clips_per_second")
    assert again == before, "the same steps, with the same numbers"


def test_a_damaged_file_of_rows_is_said_and_stops_nothing(tmp_path, caplog):
    with pytest.raises(InterruptedByUserError):
        train(tmp_path, Interrupting(18, at=27))
    (tmp_path / "steps.csv").write_text("first_step,last_step\n1,x\n")
    train(tmp_path)
    assert "steps.csv is damaged" in caplog.text
    assert read_intervals(tmp_path / "steps.csv")[-1].last_step == 10


def test_rows_come_back_from_their_text_with_every_digit(tmp_path):
    rows = [Interval(1, 50, 1, 1 / 3, None, 1e-5 / 3, 12.5), Interval(51, 60, 1, 0.1, 2 / 3, 1e-4, 1.0)]
    (tmp_path / "steps.csv").write_text(intervals_csv(rows))
    assert read_intervals(tmp_path / "steps.csv") == rows
    assert read_intervals(tmp_path / "none.csv") == []


def test_without_a_step_there_is_no_row():
    heard = []
    log = StepLog(5, heard.append)
    log.end_interval()
    log.write()
    assert heard == []


def test_the_interval_changes_no_bit_of_the_run_nor_whether_it_may_be_resumed(tmp_path):
    with pytest.raises(InterruptedByUserError):
        train(tmp_path, Interrupting(18, at=27))
    resumed = train(tmp_path, recipe=RECIPE.model_copy(update={"log_steps": 1})).state_dict()
    plain = train(None).state_dict()
    assert all(torch.equal(value, resumed[name]) for name, value in plain.items())


def test_the_progress_line_tells_rate_time_left_loss_and_held_out_accuracy(monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINE_INTERVAL_SECONDS", 0.0)
    heard = Listener()
    found = iter([{"direction": {"clips": 4.0, "top1": top1, "nll": 1.0}} for top1 in (0.25, 0.5)])
    recipe = RECIPE.model_copy(update={"log_steps": 1})
    train(None, recipe=recipe, validate=lambda _: next(found), progress=True, watch=heard)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "training: 0/36 clips"
    number = r"\d+\.\d+"
    pattern = rf"^training: 22/36 clips, {number}/s, .+ left, loss {number}, held-out direction 25\.0 %$"
    assert any(re.match(pattern, line) for line in lines), lines
    losses = [f"loss {row.loss:.4f}" for row in heard.intervals]
    assert [re.search(r"loss [\d.]+", line)[0] for line in lines[2:11]] == losses[:9], "a step late"
    assert "held-out" not in lines[4], "no epoch is finished yet"
