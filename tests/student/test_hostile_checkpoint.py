"""A checkpoint whose hashes are right and whose content is not: one line, and nothing is trained from it."""

import hashlib
import io
import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load, save

from mmkd.cache_tools.cache.sealed import open_seal, seal
from mmkd.data_manifests.errors import FingerprintError, StorageError, VerificationError
from mmkd.student.networks.networks import headed_network
from mmkd.student.recipes.loop import LoopRecipe
from mmkd.student.training.checkpoint import Position, latest_checkpoint, load_checkpoint, save_checkpoint
from mmkd.student.training.epoch_metrics import EpochMetrics
from mmkd.student.training.optimiser import make_optimizer

RECIPE = LoopRecipe(learning_rate=1e-3)


IDENTITY = {"cache": "one"}


def fresh():
    network = headed_network("small3d", heads={"direction": 4}, channels=3)
    return network, make_optimizer(network, RECIPE)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("finished")
    network, optimizer = fresh()
    network(torch.ones(2, 3, 4, 16, 16))["direction"].sum().backward()
    optimizer.step()
    metrics = [EpochMetrics(epoch=0, steps=1, loss=1.0, learning_rate=1e-3, clips_per_second=2.0)]
    save_checkpoint(run_dir, network, optimizer, position=Position(1), identity=IDENTITY, metrics=metrics)
    return run_dir


@pytest.fixture
def checkpoint(finished, tmp_path):
    return latest_checkpoint(shutil.copytree(finished, tmp_path / "run"))


def reseal(checkpoint, **changes):
    """Write the state again, with the hashes that the files have now and these fields changed."""
    names = ("network.safetensors", "optimizer.pt")
    state = open_seal((checkpoint / "state.json").read_bytes())
    state["sha256"] = {name: hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() for name in names}
    (checkpoint / "state.json").write_text(json.dumps(seal({**state, **changes})))


def refusal(checkpoint, error=VerificationError):
    with pytest.raises(error) as caught:
        load_checkpoint(checkpoint, *fresh(), identity=IDENTITY)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_torch(path, value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    path.write_bytes(buffer.getvalue())


@pytest.mark.parametrize(
    "changes",
    [
        {"position": {"step": "1"}},
        {"position": {"step": 1, "clips": -4}},
        {"position": {"step": 1, "loss_sum": "0"}},
        {"position": {"step": 2}},
        {"position": [1]},
        {"identity": []},
        {"identity": None},
        {"metrics": [{"epoch": 0}]},
        {"metrics": [None]},
        {"metrics": {}},
        {"schema": 1},
        {"other": 1},
    ],
)
def test_a_state_with_other_fields_is_refused(checkpoint, changes):
    reseal(checkpoint, **changes)
    assert str(checkpoint) in (said := refusal(checkpoint))
    assert "to start over" in said


def test_a_state_of_other_hashes_or_of_another_run_is_refused(checkpoint):
    state = open_seal((checkpoint / "state.json").read_bytes())
    reseal(checkpoint, identity={})
    assert "only now" in refusal(checkpoint, FingerprintError)
    (checkpoint / "state.json").write_text(json.dumps(seal({**state, "sha256": {}})))
    assert "is not what was written" in refusal(checkpoint)


def without_head(state):
    return {name: value for name, value in state.items() if "heads" not in name}


@pytest.mark.parametrize(
    "change",
    [
        lambda data: b"",
        lambda data: b"\xff" * 40,
        lambda data: save(without_head(load(data))),
        lambda data: save({**load(data), "more": torch.zeros(1)}),
        lambda data: save({name: value[None] for name, value in load(data).items()}),
    ],
)
def test_a_network_that_is_not_the_runs_is_refused(checkpoint, change):
    path = checkpoint / "network.safetensors"
    path.write_bytes(change(path.read_bytes()))
    reseal(checkpoint)
    assert "does not fit the run" in refusal(checkpoint)


def moments(change):
    def changed(state):
        for values in state["state"].values():
            change(values)
        return state

    return changed


@pytest.mark.parametrize(
    "change",
    [
        lambda state: {},
        lambda state: [state],
        lambda state: {**state, "param_groups": []},
        lambda state: {**state, "state": {"a": {}}},
        lambda state: {**state, "state": dict.fromkeys(state["state"], 1)},
        moments(lambda values: values.pop("step")),
        moments(lambda values: values.update(exp_avg=values["exp_avg"][None])),
        moments(lambda values: values.update(exp_avg=1.0)),
        moments(lambda values: values.update(exp_avg_sq=values["exp_avg_sq"].to_sparse())),
        moments(lambda values: values.update(more=torch.zeros(1))),
    ],
)
def test_a_state_of_another_optimiser_is_refused(checkpoint, change):
    path = checkpoint / "optimizer.pt"
    write_torch(path, change(torch.load(path, weights_only=True)))
    reseal(checkpoint)
    assert "does not fit the run" in refusal(checkpoint)


class Command:
    def __reduce__(self):
        return os.system, ("touch ran",)


def test_an_optimisers_file_cannot_run_code(checkpoint, monkeypatch):
    monkeypatch.chdir(checkpoint.parent)
    for data in (pickle.dumps(Command(), protocol=2), b"text", b""):
        (checkpoint / "optimizer.pt").write_bytes(data)
        reseal(checkpoint)
        assert "does not fit the run" in refusal(checkpoint)
    write_torch(checkpoint / "optimizer.pt", Command())
    reseal(checkpoint)
    assert "does not fit the run" in refusal(checkpoint)
    assert not (checkpoint.parent / "ran").exists()


def test_rates_and_rules_are_the_recipes_whatever_the_optimisers_file_says(checkpoint):
    path = checkpoint / "optimizer.pt"
    state = torch.load(path, weights_only=True)
    for group in state["param_groups"]:
        group.update(lr="fast", betas=None, weight_decay=1e9, fused="?")
    write_torch(path, state)
    reseal(checkpoint)
    network, optimizer = fresh()
    load_checkpoint(checkpoint, network, optimizer, identity=IDENTITY)
    assert [group["lr"] for group in optimizer.param_groups] == [RECIPE.learning_rate] * 2
    assert [group["weight_decay"] for group in optimizer.param_groups] == [RECIPE.weight_decay, 0.0]
    network(torch.ones(2, 3, 4, 16, 16))["direction"].sum().backward()
    optimizer.step()


@pytest.mark.parametrize("name", ["state.json", "network.safetensors", "optimizer.pt"])
def test_a_pipe_or_a_device_in_place_of_a_checkpoints_file_is_refused_at_once(checkpoint, name):
    (checkpoint / name).unlink()
    os.mkfifo(checkpoint / name)
    assert "it is a named pipe, not a regular file" in refusal(checkpoint, StorageError)
    (checkpoint / name).unlink()
    (checkpoint / name).symlink_to("/dev/zero")
    assert "it is a device" in refusal(checkpoint, StorageError)
