"""One copy of the targets for all processes of a node: made once, checked when opened, never torn or stale."""

import json
import os
import pwd
import signal
import subprocess
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from mmkd.data_manifests.errors import InputError, StorageError, VerificationError
from mmkd.student.teacher import node_copy
from mmkd.student.teacher.copy_file import BLOCK_BYTES, ArrayPlan
from mmkd.student.teacher.node_copy import KEPT, default_copies_folder, open_or_make

KEY = {"cache": "seal", "weights": {"verb": {"rgb": 0.25}}}


def contents():
    """Two arrays of which neither ends at a checksum's border, the first over two checksums."""
    random = np.random.default_rng(0)
    return {
        "logits": random.standard_normal((300, 3, 1501)).astype(np.float32),
        "valid": random.random((300, 3)) < 0.9,
    }


def plans(arrays, rows=77):
    return [
        ArrayPlan(name, value.shape, value.dtype.name, in_blocks(value, rows)) for name, value in arrays.items()
    ]


def in_blocks(value, rows):
    return (value[at : at + rows] for at in range(0, len(value), rows))


def never():
    raise AssertionError("a sound copy was there")
    yield  # so that it is raised when the first plan is asked for


def only_copy(directory):
    (path,) = directory.iterdir()
    return path


@pytest.fixture
def small():
    return {"a": np.arange(12, dtype=np.int32).reshape(4, 3)}


# ---- contents


def test_arrays_come_back_bit_for_bit_and_are_made_once(tmp_path):
    made = contents()
    for wanted in (plans(made), never()):
        found = open_or_make(tmp_path / "new" / "folder", KEY, wanted)
        assert set(found) == set(made)
        for name, value in made.items():
            assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
            np.testing.assert_array_equal(found[name], value)
    assert made["logits"].nbytes > BLOCK_BYTES
    only_copy(tmp_path / "new" / "folder")  # no lock, nothing half done


@pytest.mark.parametrize(
    "blocks",
    [
        [np.zeros((2, 3))],
        [np.zeros((4, 3)), np.zeros((1, 3))],
        [np.zeros((4, 3), np.float32)],
        [np.zeros((4, 2)), np.zeros((4, 1))],
        [],
    ],
)
def test_blocks_that_are_not_what_was_planned_leave_nothing(tmp_path, blocks):
    with pytest.raises(ValueError, match=r"^a: "):
        open_or_make(tmp_path, KEY, [ArrayPlan("a", (4, 3), "float64", blocks)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("shape", "dtype"), [((0, 3), "float32"), ((), "float32"), ((2,), "object")])
def test_what_cannot_be_mapped_is_refused(tmp_path, shape, dtype):
    with pytest.raises(ValueError, match="cannot be mapped"):
        open_or_make(tmp_path, KEY, [ArrayPlan("a", shape, dtype, [])])


def test_maps_cannot_be_written(tmp_path, small):
    found = open_or_make(tmp_path, KEY, plans(small))
    with pytest.raises(ValueError, match="read-only"):
        found["a"][0, 0] = 5
    assert isinstance(found["a"], np.memmap)


def test_making_a_copy_needs_memory_for_its_blocks_alone(tmp_path):
    rows, block = 4096, np.ones((64, 8, 200), np.float32)
    plan = ArrayPlan("a", (rows, 8, 200), "float32", (block + at for at in range(rows // 64)))
    tracemalloc.start()
    try:
        found = open_or_make(tmp_path, KEY, [plan])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found["a"].nbytes > 25_000_000
    assert peak < 2 * BLOCK_BYTES + 4 * block.nbytes
    assert found["a"][::64, 0, 0].tolist() == list(range(1, 65))


# ---- keys


def test_another_key_has_a_copy_of_its_own(tmp_path, small):
    open_or_make(tmp_path, KEY, plans(small))
    changed = KEY | {"weights": {"verb": {"rgb": 0.250000001}}}
    other = open_or_make(tmp_path, changed, plans({"a": small["a"] + 1}))
    assert other["a"][0, 0] == 1
    assert open_or_make(tmp_path, KEY, never())["a"][0, 0] == 0


def test_the_copy_of_another_key_in_the_place_of_ours_is_not_served(tmp_path, small, caplog):
    open_or_make(tmp_path, {"cache": "stale"}, plans({"a": small["a"] + 1}))
    stale = only_copy(tmp_path)
    open_or_make(tmp_path, KEY, plans(small))
    (ours,) = set(tmp_path.iterdir()) - {stale}
    stale.replace(ours)
    found = open_or_make(tmp_path, KEY, plans(small))
    np.testing.assert_array_equal(found["a"], small["a"])
    assert "of another key" in caplog.text


# ---- damage


def damages(size):
    """Name -> what becomes of the file's bytes: flips all over it, cuts at and around every border."""
    flips = sorted({0, 5, 47, 48, 4096, size // 2, *range(size - 300, size, 7), size - 1})
    cuts = [0, 1, 55, 56, 4096, size // 2, size - 57, size - 56, size - 1]
    return {
        **{f"flip {at}": lambda data, at=at: data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :] for at in flips},
        **{f"cut {at}": lambda data, at=at: data[:at] for at in cuts},
        "longer": lambda data: data + b"\0",
        "longer before its footer": lambda data: data.replace(b'{"arrays"', b'\0{"arrays"'),
        "zeroed page": lambda data: bytes(4096) + data[4096:],
        "one byte out": lambda data: data[:100] + data[101:],
    }


def test_every_damage_is_noticed_and_the_copy_made_again(tmp_path, caplog):
    small = {"a": np.arange(1, 4001, dtype=np.int32).reshape(40, 100)}
    open_or_make(tmp_path, KEY, plans(small))
    path = only_copy(tmp_path)
    sound = path.read_bytes()
    for name, damage in damages(len(sound)).items():
        path.write_bytes(damage(sound))
        caplog.clear()
        found = open_or_make(tmp_path, KEY, plans(small))
        np.testing.assert_array_equal(found["a"], small["a"], err_msg=name)
        assert path.read_bytes() == sound, name
        (line,) = caplog.messages
        assert str(path) in line, name
        assert "is damaged" in line, name
        assert "made again" in line, name


def test_a_disk_that_does_not_keep_what_is_written_is_named(tmp_path, small, monkeypatch):
    write = node_copy.write_arrays

    def write_badly(file, key, arrays):
        write(file, key, arrays)
        os.pwrite(file.fileno(), b"\xff", 3)

    monkeypatch.setattr(node_copy, "write_arrays", write_badly)
    with pytest.raises(StorageError, match=r"written just now and is damaged .*--node-copies"):
        open_or_make(tmp_path, KEY, plans(small))


def test_what_making_raises_comes_through_and_leaves_nothing(tmp_path, small):
    def blocks():
        yield small["a"][:1]
        raise VerificationError("the cache is damaged")

    with pytest.raises(VerificationError, match="the cache is damaged"):
        open_or_make(tmp_path, KEY, [ArrayPlan("a", (4, 3), "int32", blocks())])
    assert not list(tmp_path.iterdir())
    open_or_make(tmp_path, KEY, plans(small))


# ---- several processes

PROCESS = """
import json, logging, os, sys, time
from pathlib import Path
import numpy as np
from mmkd.student.teacher.copy_file import ArrayPlan
from mmkd.student.teacher.node_copy import open_or_make

folder, seconds = Path(sys.argv[1]), float(sys.argv[2])
logging.basicConfig(level="INFO", format="%(message)s", stream=sys.stderr)

def blocks():
    for row in range(20):
        time.sleep(seconds / 20)
        yield np.full((1, 50_000), row, np.int64)
        if row == 10:
            (folder / f"half-{os.getpid()}").touch()

def make():
    (folder / f"made-{os.getpid()}").touch()
    yield ArrayPlan("a", (20, 50_000), "int64", blocks())

print("ready", flush=True)
sys.stdin.readline()
found = open_or_make(folder / "copies", {"test": 1}, make())["a"]
whole = bool((np.asarray(found) == np.arange(20)[:, None]).all())
print(json.dumps([whole, found.shape]), flush=True)
sys.stdin.readline()
"""


def start(folder, count, seconds):
    """Start processes and let them all go at once."""
    arguments = [sys.executable, "-c", PROCESS, folder, str(seconds)]
    pipe = subprocess.PIPE
    processes = [subprocess.Popen(arguments, stdin=pipe, stdout=pipe, stderr=pipe, text=True) for _ in range(count)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        say(process)
    return processes


def say(process):
    process.stdin.write("go on\n")
    process.stdin.flush()


def finish(processes):
    """Return each process's stderr; all must have seen the whole array."""
    for process in processes:
        assert json.loads(process.stdout.readline()) == [True, [20, 50_000]]
    texts = []
    for process in processes:
        _, text = process.communicate("go on\n", timeout=60)
        assert process.returncode == 0, text
        texts.append(text)
    return texts


def wait_for(folder, pattern):
    for _ in range(2000):
        if found := list(folder.glob(pattern)):
            return found
        time.sleep(0.01)
    raise AssertionError(f"no {pattern}")


def test_of_many_processes_one_makes_the_copy_and_all_read_it(tmp_path):
    texts = finish(start(tmp_path, 5, seconds=0.6))
    assert len(list(tmp_path.glob("made-*"))) == 1
    assert sorted(text.count("waiting for another process") for text in texts) == [0, 1, 1, 1, 1]
    only_copy(tmp_path / "copies")


def test_a_maker_killed_midway_is_replaced_by_one_that_waits(tmp_path):
    processes = start(tmp_path, 4, seconds=0.6)
    (half,) = wait_for(tmp_path, "half-*")
    (victim,) = [process for process in processes if str(process.pid) == half.name.removeprefix("half-")]
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    processes.remove(victim)
    finish(processes)
    assert len(list(tmp_path.glob("made-*"))) == 2
    only_copy(tmp_path / "copies")  # what the dead one left is gone too


def test_a_copy_finished_just_before_the_claim_is_not_made_again(tmp_path, small, monkeypatch):
    def late(path):
        monkeypatch.undo()
        open_or_make(tmp_path, KEY, plans(small))
        return node_copy.claim(path)

    monkeypatch.setattr(node_copy, "claim", late)
    np.testing.assert_array_equal(open_or_make(tmp_path, KEY, never())["a"], small["a"])


def test_a_claim_on_a_file_that_its_last_holder_deleted_is_none(tmp_path, monkeypatch):
    path, flock = tmp_path / "lock", node_copy.fcntl.flock

    def late(descriptor, operation):
        path.unlink()
        monkeypatch.undo()
        flock(descriptor, operation)

    monkeypatch.setattr(node_copy.fcntl, "flock", late)
    with node_copy.claim(path) as first, node_copy.claim(path) as second, node_copy.claim(path) as third:
        assert (first, second, third) == (False, True, False)
    assert not path.exists()


LIMITED = """
import resource, sys
from pathlib import Path
import numpy as np
from mmkd.student.teacher.copy_file import ArrayPlan
from mmkd.student.teacher.node_copy import open_or_make
from mmkd.data_manifests.errors import StorageError
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
block = np.ones((10, 1000))
try:
    open_or_make(Path(sys.argv[1]), {"test": 2}, [ArrayPlan("a", (50, 1000), "float64", [block] * 5)])
except StorageError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def test_a_full_disk_is_one_line_that_names_folder_and_option_and_leaves_nothing(tmp_path):
    arguments = [sys.executable, "-c", LIMITED, tmp_path]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 74, done.stderr
    assert str(tmp_path) in done.stdout
    assert "; name another folder with --node-copies" in done.stdout
    assert done.stdout.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_place_of_the_folder_is_a_storage_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"cannot keep a copy.*--node-copies"):
        open_or_make(tmp_path / "file", KEY, never())


def test_a_file_system_without_locks_is_a_storage_error(tmp_path, small, monkeypatch):
    def refuse(file, operation):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(node_copy.fcntl, "flock", refuse)
    with pytest.raises(StorageError, match=r"Function not implemented; name another folder with --node-copies"):
        open_or_make(tmp_path, KEY, plans(small))


# ---- what stays


def test_old_copies_go_when_a_new_one_is_made_but_none_that_is_in_use(tmp_path, small):
    foreign = [tmp_path / name for name in ("notes.txt", "x.node-copy", f"{'0' * 31}.node-copy", ".other.tmp")]
    for path in foreign:
        path.touch()
    leftover = tmp_path / f".mmkd-{'a' * 16}.tmp"
    leftover.touch()
    used = open_or_make(tmp_path, {"number": 0}, plans(small))["a"][1:]
    names = {}
    for number in range(KEPT + 3):
        before = set(tmp_path.iterdir())
        open_or_make(tmp_path, {"number": number}, plans(small))
        names[number] = next(iter(set(tmp_path.iterdir()) - before), None)
        for path in tmp_path.iterdir():  # as if an hour went by
            os.utime(path, (path.stat().st_atime - 3600, path.stat().st_mtime - 3600))
    assert not leftover.exists()
    assert all(path.exists() for path in foreign)
    assert [number for number, path in names.items() if path and path.exists()] == list(range(3, KEPT + 3))
    open_or_make(tmp_path, {"number": 0}, never())
    del used
    open_or_make(tmp_path, {"number": 3}, never())  # used again: not the oldest any more
    open_or_make(tmp_path, {"number": 100}, plans(small))
    open_or_make(tmp_path, {"number": 3}, never())
    assert not names[4].exists()


def test_a_copy_in_use_may_be_deleted_by_hand(tmp_path, small):
    found = open_or_make(tmp_path, KEY, plans(small))
    only_copy(tmp_path).unlink()
    np.testing.assert_array_equal(found["a"], small["a"])
    assert open_or_make(tmp_path, KEY, plans({"a": small["a"] + 1}))["a"][0, 0] == 1


# ---- the folder


def test_the_default_folder_is_the_nodes_own(tmp_path):
    own = f"mmkd-{os.getuid()}"
    folders = {"SLURM_TMPDIR": "/job", "TMPDIR": str(tmp_path), "XDG_CACHE_HOME": "/cache"}
    assert default_copies_folder(folders) == Path("/job") / own
    del folders["SLURM_TMPDIR"]
    assert default_copies_folder(folders) == tmp_path / own
    assert default_copies_folder(folders | {"TMPDIR": ""}) == Path("/cache/mmkd")
    assert default_copies_folder({}) == Path.home() / ".cache" / "mmkd"


def test_a_user_without_an_entry_and_without_home_has_a_folder_in_the_temporary_one(monkeypatch):
    def unknown(number):
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)  # as the system says of a container's user id
    assert default_copies_folder({}) == Path(tempfile.gettempdir()) / f"mmkd-{os.getuid()}"


def test_somebody_elses_folder_in_a_shared_temporary_one_is_refused(tmp_path, monkeypatch):
    (tmp_path / f"mmkd-{os.getuid()}").mkdir()
    assert default_copies_folder({"TMPDIR": str(tmp_path)}).is_dir()
    own = os.getuid()
    monkeypatch.setattr(node_copy.os, "getuid", lambda: own + 1)
    (tmp_path / f"mmkd-{own + 1}").mkdir()
    with pytest.raises(InputError, match="belongs to another user; name a folder with --node-copies"):
        default_copies_folder({"TMPDIR": str(tmp_path)})
