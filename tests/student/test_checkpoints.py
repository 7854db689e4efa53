"""Checkpoints as people share them: all of their containers are read, and nothing in any file runs."""

import argparse
import builtins
import collections
import copy
import enum
import functools
import importlib
import io
import operator
import os
import pickle
import random
import resource
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mmkd.data_manifests.errors import InputError
from mmkd.student.checkpoints.checkpoint_file import read_checkpoint, read_state
from mmkd.student.checkpoints.names import bare_name, bare_state

STATE = {"conv.weight": torch.arange(6.0).reshape(2, 3), "conv.bias": torch.ones(2)}
OTHER = {name: value + 1 for name, value in STATE.items()}
LEGACY = {"_use_new_zipfile_serialization": False}


class History:
    """As mmengine's HistoryBuffer: arrays, numbers of NumPy, and its own methods, which pickle as getattr."""

    def __init__(self):
        self.history, self.count = np.arange(3.0), np.int64(3)
        self.statistics = {"mean": self.mean}

    def mean(self):
        return self.history.mean()


class Settings(dict):
    """As yacs's CfgNode: a dict of its own class, with a state."""

    def __init__(self, **items):
        super().__init__(items)
        self.frozen = True


class Stage(enum.Enum):
    TRAIN = 1


class Steps(list):
    pass


def read(tmp_path, value, key=None, **options):
    torch.save(value, tmp_path / "w.pth", **options)
    return read_checkpoint(tmp_path / "w.pth", key)


def refusal(tmp_path, value, key=None, **options):
    with pytest.raises(InputError, match=r"w\.pth") as caught:
        read(tmp_path, value, key, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


CONTAINERS = {
    "bare": ("", lambda: STATE),
    "among": ("", lambda: {**STATE, "args": argparse.Namespace(lr=0.1), "epoch": 3}),
    "torchvision": ("model", lambda: {"model": STATE, "args": argparse.Namespace(lr=0.1), "epoch": 3}),
    "timm": ("state_dict", lambda: {"state_dict": STATE, "args": argparse.Namespace(), "arch": "x", "version": 2}),
    "lightning": ("state_dict", lambda: {"state_dict": collections.OrderedDict(STATE), "hparams": Settings(lr=1)}),
    "slowfast": ("model_state", lambda: {"model_state": STATE, "optimizer_state": {}, "cfg": "TRAIN: true"}),
    "mmengine": (
        "state_dict",
        lambda: {"state_dict": STATE, "message_hub": {"log_scalars": {"loss": History()}, "time": np.float64(2.5)}},
    ),
    "deepspeed": ("module", lambda: {"module": STATE, "dp_world_size": 8, "args": argparse.Namespace()}),
    "vjepa": ("classifiers[0]", lambda: {"classifiers": [STATE, OTHER], "epoch": 5, "opt": [{"state": {}}]}),
    "nested": ("model.state_dict", lambda: {"model": {"state_dict": STATE}, "stage": Stage.TRAIN}),
    "counter": ("state_dict", lambda: {"state_dict": STATE, "epoch": torch.tensor(3)}),
    "list": ("model", lambda: {"model": STATE, "steps": Steps([1, 2]), "by": {Stage.TRAIN: 1}}),
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_every_container_in_circulation_is_read(tmp_path, container):
    key, make = CONTAINERS[container]
    found = read(tmp_path, make())
    assert found.key == key
    assert_equal(found.state, STATE)


def test_safetensors_and_the_form_of_before_torch_1_6_are_read(tmp_path):
    assert_equal(read(tmp_path, {"model_state": STATE, "epoch": 1}, **LEGACY).state, STATE)
    save_file(STATE, tmp_path / "w.safetensors")
    assert_equal(read_state(tmp_path / "w.safetensors"), STATE)
    message = refusal(tmp_path, {"model": STATE, "args": argparse.Namespace()}, **LEGACY)
    assert "it holds more than tensors (argparse.Namespace)" in message


def test_plain_weights_are_taken_and_averaged_ones_by_name(tmp_path):
    averaged = {f"module.{name}": value for name, value in OTHER.items()} | {"n_averaged": torch.tensor(7)}
    both = {"model_ema": averaged, "model": STATE, "args": argparse.Namespace()}
    plain = read(tmp_path, both)
    assert (plain.key, plain.others) == ("model", ("model_ema",))
    assert_equal(plain.state, STATE)
    named = read(tmp_path, both, "model_ema")
    own = bare_state(named.state, tmp_path)
    assert_equal({name: named.state[in_file] for name, in_file in own.items()}, OTHER)
    assert read(tmp_path, {"state_dict_ema": STATE}).key == "state_dict_ema"  # the only one
    assert "have nothing at 'ema'; they have 'model_ema', 'model'" in refusal(tmp_path, both, "ema")
    assert "are in several places; say which: 'student', 'teacher'" in refusal(
        tmp_path, {"student": STATE, "teacher": OTHER}
    )


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("module._orig_mod.backbone.layers.0.weight", "layers.0.weight"),
        ("model.base_model.conv1.weight", "base_model.conv1.weight"),
        ("layers.3._orig_mod.conv.weight", "layers.3.conv.weight"),
        ("cls_head.fc_cls.weight", "cls_head.fc_cls.weight"),
    ],
)
def test_wrappers_before_a_name_are_dropped(name, own):
    assert bare_name(name) == own


# ---- files that attack


class Calls:
    """Pickles as a call of any function."""

    def __init__(self, function, *arguments, state=None):
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.call


class Alive:
    """Touches the file MARK whenever any of its code runs."""

    def __new__(cls, *_):
        touch()
        return super().__new__(cls)

    def __setstate__(self, state):
        touch()

    def __getattr__(self, name):
        touch()
        raise AttributeError(name)


class AliveDict(dict):
    def __setitem__(self, key, value):
        touch()


class AliveList(list):
    def append(self, item):
        touch()

    def extend(self, items):
        touch()


def touch():
    Path(os.environ["MARK"]).touch()


@pytest.fixture
def mark(tmp_path, monkeypatch):
    """A file that is there once any code of a checkpoint has run."""
    monkeypatch.setenv("MARK", str(tmp_path / "mark"))
    return tmp_path / "mark"


def test_the_mark_shows_what_unpickling_would_run(tmp_path, mark):
    pickle.loads(pickle.dumps(Calls(os.system, "touch $MARK"), protocol=2))
    assert mark.exists()
    for live in (Calls(touch), Calls(Alive, "x", state={"a": 1})):
        mark.unlink()
        pickle.loads(pickle.dumps(live, protocol=2))
        assert mark.exists()


COMMAND = "touch $MARK"
REFUSED = {
    "system": lambda: Calls(os.system, COMMAND),
    "popen": lambda: Calls(subprocess.Popen, COMMAND),
    "eval": lambda: Calls(eval, "open(__import__('os').environ['MARK'], 'w')"),
    "exec": lambda: Calls(exec, "open(__import__('os').environ['MARK'], 'w')"),
    "import": lambda: Calls(importlib.import_module, "antigravity"),
    "open": lambda: Calls(builtins.open, "mark", "w"),
    "partial": lambda: functools.partial(os.system, COMMAND),
    "inside a stand-in's state": lambda: Calls(argparse.Namespace, state={"x": Calls(os.system, COMMAND)}),
    "as a stand-in's argument": lambda: Calls(argparse.Namespace, Calls(os.system, COMMAND)),
    "getattr": lambda: Calls(getattr, Calls(importlib.import_module, "os"), "system"),
    "unpickled": lambda: Calls(pickle.loads, pickle.dumps(Calls(os.system, COMMAND))),
}


@pytest.mark.parametrize("attack", REFUSED)
def test_a_file_that_names_what_only_an_attack_needs_is_refused_and_nothing_runs(tmp_path, mark, attack):
    value = {"model": STATE, "args": REFUSED[attack]()}
    assert "which no checkpoint needs" in refusal(tmp_path, value)
    old = refusal(tmp_path, value, **LEGACY)  # a class of its own may come first, and is refused there, too
    assert "which no checkpoint needs" in old or "holds more than tensors" in old
    assert not mark.exists()


INERT = {
    "constructor": lambda: Calls(Alive, "x"),
    "state": lambda: Calls(Alive, "x", state={"a": 1}),
    "function": lambda: Calls(touch),
    "partial": lambda: functools.partial(touch),
    "method": lambda: Calls(getattr, Calls(Alive, "x"), "name"),
    "caller": lambda: Calls(operator.methodcaller, "touch"),
    "dict": lambda: AliveDict(a=1),
    "list": lambda: AliveList([1, 2]),
    "torch.load": lambda: Calls(torch.load, "other.pth"),
    "torch.hub": lambda: Calls(torch.hub.load, "a/b", "c"),
    "state of a torch class": lambda: Calls(collections.OrderedDict, state={"items": Calls(touch), "get": 1}),
}


@pytest.mark.parametrize("kind", INERT)
def test_everything_else_in_a_file_is_inert(tmp_path, mark, kind):
    torch.save({"model": STATE, "extra": INERT[kind]()}, tmp_path / "w.pth")
    mark.unlink(missing_ok=True)  # making the file ran some of it here
    assert_equal(read_state(tmp_path / "w.pth"), STATE)
    assert not mark.exists()


def test_attributes_and_hooks_that_a_file_gives_to_torchs_own_objects_are_not_used(tmp_path, mark):
    shadowed = Calls(collections.OrderedDict, list(STATE.items()), state=dict.fromkeys(("items", "keys", "get"), 1))
    assert_equal(read(tmp_path, {"state_dict": shadowed}).state, STATE)
    hooked = torch.nn.Parameter(STATE["conv.weight"].clone())
    hooked.mean = Calls(touch)  # an attribute of the tensor, which torch.save keeps
    found = read(tmp_path, {"w": hooked}).state["w"]
    assert type(found) is torch.Tensor
    assert found.mean().item() == STATE["conv.weight"].mean().item()
    assert not mark.exists()


def test_a_pickle_of_another_protocol_is_refused(tmp_path):
    assert "cannot read the weights" in refusal(tmp_path, {"a": STATE, "x": Calls(print, "x")}, pickle_protocol=4)


# ---- files that fill the memory, and damaged ones


def rewritten(path, change, compression=zipfile.ZIP_STORED):
    """Write a torch file again with its entries changed: (name, bytes) -> bytes."""
    with zipfile.ZipFile(path) as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries:
            archive.writestr(name, change(name, data))


def test_a_small_file_that_would_become_a_large_one_is_refused_before_it_does(tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"a": torch.zeros(1 << 20)}, path)
    rewritten(path, lambda name, data: data, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 20_000
    with pytest.raises(InputError, match=r"w\.pth: its [\d,]+ bytes would become 4,\d{3},\d{3}, and torch"):
        read_state(path)


def test_an_archive_whose_entries_share_bytes_is_refused(tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"a": torch.zeros(1 << 10)}, path)
    with zipfile.ZipFile(path, "a") as archive:
        entry = next(entry for entry in archive.infolist() if entry.filename.endswith("data/0"))
        for number in range(1, 9):  # the directory names the same bytes again and again
            again = copy.copy(entry)
            again.filename = entry.filename[:-1] + str(number)
            archive.filelist.append(again)
        archive._didModify = True
    with pytest.raises(InputError, match=r"would become"):
        read_state(path)


@pytest.mark.parametrize("options", [{}, LEGACY])
def test_a_pickle_that_asks_for_memory_is_refused_before_it_gets_any(tmp_path, options):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    message = refusal(tmp_path, {"model": STATE, "x": Calls(bytearray, 1 << 31)}, **options)
    assert "it calls builtins.bytearray" in message
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # in KiB


def test_a_compiled_program_is_refused_without_advice_to_run_it(tmp_path):
    torch.save(STATE, tmp_path / "w.pt")
    with zipfile.ZipFile(tmp_path / "w.pt", "a") as archive:
        archive.writestr("w/constants.pkl", pickle.dumps(()))  # by which torch knows one
    with pytest.raises(InputError, match=r"w\.pt: it is a TorchScript program, not weights"):
        read_state(tmp_path / "w.pt")


def test_a_storage_that_says_more_than_its_entry_holds_is_refused(tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"a": torch.zeros(4)}, path)
    rewritten(path, lambda name, data: data.replace(b"K\x04tq", b"J\x00\x00\x00\x70tq", 1))
    with pytest.raises(InputError, match="does not match expected size"):
        read_state(path)


def test_a_tensor_expanded_from_one_number_is_no_parameter(tmp_path):
    assert "are not a dict of tensors" in refusal(tmp_path, {"a": torch.zeros(1).expand(10**6, 10**6)})


def test_a_damaged_file_is_read_or_refused_by_name(tmp_path):
    buffer = io.BytesIO()
    torch.save({"model": STATE, "args": argparse.Namespace(lr=0.1)}, buffer)
    whole, path, draw = buffer.getvalue(), tmp_path / "w.pth", random.Random(0)
    refused = 0
    for number in range(300):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(data[: len(data) if number % 2 else draw.randrange(len(data))])
        try:
            read_state(path)
        except InputError as error:
            refused += 1
            assert str(path) in str(error)  # noqa: PT017  either is right
            assert "\n" not in str(error)  # noqa: PT017
    assert refused > 150  # every one that was cut, at least
