"""One run in two real processes, by gloo: the same as in one, stopped, killed, and continued by another number."""

import json
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmkd.data_manifests.errors import EXIT_INTERRUPTED
from mmkd.pipeline.experts.expert import read_card
from mmkd.student.training.checkpoint import checkpoints
from tests.helpers.commands import ENVIRONMENT
from tests.helpers.in_process import call_ok
from tests.helpers.several import finish, start, work

MIXUP = {"mixup_alpha": 1.0}


def trained(out, *, count, options=None):
    """The weights and the report of a run that ends well."""
    if count == 1:
        out.mkdir(exist_ok=True)
        work(out, options or {})
    else:
        codes, said = finish(start(out, count=count, options=options))
        assert codes == [0] * count, said
    return torch.load(out / "weights.pt", weights_only=True), json.loads((out / "report.json").read_text())


def assert_nearly_equal(one, other):
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("alone") / "run", count=1)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("two") / "run", count=2)


def test_two_processes_are_one_with_the_same_batch(alone, two):
    """Rows without targets or labels lie unevenly in the shares, whose sizes are 4 and 3 and more."""
    assert_nearly_equal(alone[0], two[0])
    assert two[1]["loss"] == pytest.approx(alone[1]["loss"], rel=1e-6)


def test_each_share_may_be_computed_in_parts_and_validated_by_the_first(tmp_path, alone):
    options = {"recipe": {"accumulate": 2}, "validate": True}
    found = trained(tmp_path / "run", count=2, options=options)
    first_epoch = trained(tmp_path / "one", count=1, options={"validate": True})
    assert_nearly_equal(first_epoch[0], found[0])  # of equal epochs the first is the best one


def test_a_signal_to_one_stops_all_at_the_same_step_and_the_run_continues(tmp_path, alone, two):
    """By two processes to the same bits, and by one with the same batch."""
    out = tmp_path / "run"
    codes, said = finish(start(out, count=2, options={"at": {"1": 15}}))
    assert codes == [EXIT_INTERRUPTED] * 2, said
    assert "steps are kept; run the same command again" in said[1]
    assert "another process of this run was asked to" in said[0]
    step = int(checkpoints(out)[0].name[-9:])
    assert 0 < step < 12
    copy = shutil.copytree(out, tmp_path / "copy")
    found = trained(out, count=2)
    assert found[1]["resumed_at"] == step
    assert all(torch.equal(value, two[0][name]) for name, value in found[0].items())
    found = trained(copy, count=1)
    assert found[1]["resumed_at"] == step
    assert_nearly_equal(alone[0], found[0])


def test_a_killed_process_ends_the_other_and_the_run_continues(tmp_path, two):
    out = tmp_path / "run"
    codes, said = finish(start(out, count=2, options={"at": {"1": 30}, "signal": signal.SIGKILL}))
    assert codes == [EXIT_INTERRUPTED, -signal.SIGKILL]
    assert "another process of this run has ended" in said[0]
    assert "Traceback" not in said[0]
    found = trained(out, count=2)
    assert found[1]["resumed_at"] > 0
    assert all(torch.equal(value, two[0][name]) for name, value in found[0].items())


def test_more_processes_than_clips_of_a_step_are_refused_in_all_of_them(tmp_path):
    codes, said = finish(start(tmp_path / "run", count=2, options={"recipe": {"batch_size": 1}}))
    assert codes == [2, 2]
    assert "2 processes cannot share a step of 1 clip:" in said[0]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_fault_of_one_ends_it_with_its_own_word_and_the_others_with_theirs(tmp_path, rank):
    codes, said = finish(start(tmp_path / "run", count=2, options={"fault": rank}))
    assert codes[rank] == 2
    assert "broken; leave it out, or replace its video" in said[rank]
    assert codes[1 - rank] == EXIT_INTERRUPTED
    assert said[1 - rank].splitlines()[-1].startswith("error: another process of this run has ended;")


def test_a_network_with_a_part_that_is_not_used_is_refused_by_name(tmp_path):
    codes, said = finish(start(tmp_path / "run", count=2, options={"unused": True}))
    assert codes == [2, 2]
    assert "this one's extra.weight, extra.bias had no part in the loss:" in said[0]


def test_shares_of_one_clip_cannot_be_mixed(tmp_path):
    codes, said = finish(start(tmp_path / "run", count=2, options={"recipe": {"batch_size": 3, "mix": MIXUP}}))
    assert codes == [2, 2]
    assert "computed by 2 processes in 1 part, views of one clip alone are in each:" in said[0]


def by_torchrun(program, *arguments):
    """Run a command of ours in two processes; return what it printed and what it said."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    command = [*launch, Path(sys.executable).with_name(program), *arguments]
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env=ENVIRONMENT, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, done.stderr


def test_torchrun_trains_one_student_and_evaluates_it_to_the_bits_of_one_process(tiny, tmp_path):
    """The command itself: one folder, one writer, one result on stdout; evaluation without a clip twice."""
    run = tmp_path / "run"
    options = ["--set", "train.epochs=1", "--set", "train.batch_size=8", "--set", "train.warmup_epochs=0"]
    options += ["--set", "train.held_out=0.25"]
    stdout, stderr = by_torchrun("mmkd-student", "train", *tiny.stage_two, *options, "-o", run, "--json")
    assert json.loads(stdout)["steps"] == 2
    assert stderr.count("training: 11/11 clips") == 1
    assert json.loads((run / "metrics.jsonl").read_text())["held_out"]["action"]["clips"] == 3
    assert not list(run.glob(".mmkd-lock*"))
    by_two = {path.name: path.read_bytes() for path in run.glob("evaluation*")}
    assert set(json.loads(by_two["evaluation.json"])["metrics"]) == {"standard", "compositional"}
    evaluate = ("evaluate", run, "--cache", tiny.root / "cache", *tiny.data)
    for again in (partial(call_ok, "mmkd-student"), partial(by_torchrun, "mmkd-student")):
        for name in by_two:
            (run / name).unlink()
        again(*evaluate)
        assert {path.name: path.read_bytes() for path in run.glob("evaluation*")} == by_two


def test_torchrun_teaches_one_expert(tiny, tmp_path):
    out = tmp_path / "flow"
    stdout, stderr = by_torchrun("mmkd-cache", "teach", "flow", *tiny.stage_one, "-o", out, "--json")
    assert json.loads(stdout)["trained"] is True
    assert sum(line.startswith("flow: 12/12 clips") for line in stderr.splitlines()) == 1
    one, two = (read_card(folder) for folder in (tiny.root / "experts" / "flow", out))
    assert two.training["held_out"]["action"]["clips"] == one.training["held_out"]["action"]["clips"]
    assert {name: value for name, value in vars(two).items() if name not in ("training", "weights_sha256")} == {
        name: value for name, value in vars(one).items() if name not in ("training", "weights_sha256")
    }
    own = load_file(out / "weights.safetensors")
    assert all(value.isfinite().all() for value in own.values())
    stdout, _ = by_torchrun("mmkd-cache", "teach", "flow", *tiny.stage_one, "-o", out, "--json")
    assert json.loads(stdout)["trained"] is False
