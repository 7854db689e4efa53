"""Workers that die, hang, raise or tear their pipe take their item, never the job; and none is left behind."""

import os
import pickle
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmkd.cache_tools.process import pool_worker
from mmkd.cache_tools.process.pool import LOOK_AHEAD, run_tasks
from mmkd.data_manifests.errors import StorageError, VideoError

# The items are expressions and the function is `eval`: workers can import it, and never import this module.
KILL = "__import__('os').kill(__import__('os').getpid(), {})"
HANG = "__import__('time').sleep(600)"
VIDEO_ERROR = "exec('from mmkd.data_manifests.errors import VideoError; raise VideoError(\"no frame\")')"
TEAR = (
    'exec(\'import os, re, signal; fd = re.search(r"serve.(\\\\d+)", open("/proc/self/cmdline").read())[1];'
    'os.write(int(fd), (1000).to_bytes(4, "big") + b"half a message"); os.kill(os.getpid(), 9)\')'
)


def workers_of(parent: int) -> list[int]:
    """Return the process ids of the pool workers among a process's children."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status = (folder / "stat").read_text().rpartition(")")[2].split()
            command = (folder / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(status[1]) == parent and b"process.pool_worker" in command:
            found.append(int(folder.name))
    return found


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.fixture(autouse=True)
def _no_worker_is_left():
    yield
    assert not workers_of(os.getpid())


def plain(results) -> list:
    """Return the values in order, errors as their text, having checked the positions."""
    values = []
    for position, (index, value) in enumerate(results):
        assert index == position
        values.append(f"error: {value}" if isinstance(value, VideoError) else value)
    return values


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_come_in_the_order_of_the_items(workers):
    items = [f"(__import__('time').sleep({0.2 if i == 0 else 0.0}), {i})[1]" for i in range(20)]
    assert plain(run_tasks(eval, items, workers=workers)) == list(range(20))


@pytest.mark.parametrize("workers", [0, 2])
def test_no_item_gives_no_result(workers):
    assert plain(run_tasks(eval, [], workers=workers)) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_a_video_error_is_its_items_value(workers):
    assert plain(run_tasks(eval, ["1", VIDEO_ERROR, "3"], workers=workers)) == [1, "error: no frame", 3]


@pytest.mark.parametrize("workers", [0, 2])
def test_another_exception_is_raised(workers):
    results = run_tasks(eval, ["1", "1 / 0", "3"], workers=workers)
    assert next(results) == (0, 1)
    with pytest.raises(ZeroDivisionError) as caught:
        next(results)
    if workers:
        assert "raised in a worker process" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    "death", [KILL.format(9), KILL.format(int(signal.SIGSEGV)), "__import__('os').abort()", TEAR, "exit(3)"]
)
def test_a_worker_that_dies_takes_one_item(death):
    items = ["0", death, *map(str, range(2, 12))]
    expected = [0, "error: decoder died", *range(2, 12)]
    assert plain(run_tasks(eval, items, workers=2, timeout_seconds=60)) == expected


def test_a_worker_that_hangs_takes_one_item():
    began = time.monotonic()
    results = run_tasks(eval, ["0", HANG, "2", "3"], workers=2, timeout_seconds=0.5)
    assert plain(results) == [0, "error: took longer than 0.5 s", 2, 3]
    assert 1.0 <= time.monotonic() - began < 20


def test_all_workers_may_die_at_once():
    items = [KILL.format(9)] * 4 + ["4"]
    assert plain(run_tasks(eval, items, workers=4)) == ["error: decoder died"] * 4 + [4]


@pytest.mark.parametrize("fault", [KILL.format(9), HANG])
def test_an_item_is_tried_again_once_in_a_fresh_worker(tmp_path, fault):
    log = tmp_path / "processes"
    note = f"print(__import__('os').getpid(), file=open({str(log)!r}, 'a'))"
    items = ["'warm'", f"({note}, {fault} if len(open({str(log)!r}).readlines()) < 2 else 'second')[1]"]
    assert plain(run_tasks(eval, items, workers=1, timeout_seconds=2)) == ["warm", "second"]
    assert len(set(log.read_text().split())) == 2


def logged(log: Path, fault: str) -> str:
    """An item that notes that it was tried, then meets the fault."""
    return f"(print('x', file=open({str(log)!r}, 'a')), {fault})[1]"


@pytest.mark.parametrize(("fault", "tries"), [(KILL.format(9), 3), (KILL.format(11), 3), (HANG, 2)])
def test_an_item_that_takes_its_workers_while_others_go_well_is_to_blame(tmp_path, fault, tries):
    results = run_tasks(eval, ["'well'", logged(tmp_path / "log", fault)], workers=1, timeout_seconds=1)
    assert plain(results) == ["well", f"error: {'took longer than 1 s' if fault == HANG else 'decoder died'}"]
    assert (tmp_path / "log").read_text().split() == ["x"] * tries


@pytest.mark.parametrize(("fault", "advice"), [(KILL.format(9), "out of memory"), (HANG, "is the disk")])
def test_where_nothing_goes_well_the_machine_is_to_blame(tmp_path, fault, advice):
    """The same item went well, as those before a mount is lost or memory fills."""
    item = f"1 if not __import__('os').path.exists({str(tmp_path / 'lost')!r}) else {fault}"
    results = run_tasks(eval, iter_losing([item] * 9, tmp_path / "lost"), workers=1, timeout_seconds=1)
    values = [value for _, value in results]
    assert values[0] == 1
    assert isinstance(values[-1], StorageError)
    assert advice in str(values[-1])
    assert "and so did others" in str(values[-1])
    assert not any(isinstance(value, VideoError) for value in values)


def iter_losing(items: list[str], lost: Path):
    for number, item in enumerate(items):
        if number == len(items) - 1:
            lost.touch()
        yield item


@pytest.mark.parametrize("fault", [KILL.format(9), HANG])
def test_where_nothing_is_known_to_go_well_a_canary_tells(fault):
    (alone,) = [value for _, value in run_tasks(eval, [fault], workers=1, timeout_seconds=1)]
    assert isinstance(alone, StorageError)
    (judged,) = plain(run_tasks(eval, [fault], workers=1, timeout_seconds=1, canaries=["1"]))
    assert judged.startswith("error: ")


def test_nothing_else_is_at_work_when_an_item_is_tried_for_the_last_time(tmp_path):
    at_work, log = tmp_path / "at work", tmp_path / "log"
    mark = f"__import__('pathlib').Path({str(at_work)!r})"
    other = f"({mark}.touch(), __import__('time').sleep(0.3), {mark}.unlink(missing_ok=True), 'other')[3]"
    seen = f"open({str(log)!r}, 'a').write('busy ' if {mark}.exists() else 'quiet ')"
    results = run_tasks(eval, [f"({seen}, {KILL.format(9)})", *[other] * 5], workers=2)
    assert plain(results) == ["error: decoder died", *["other"] * 5]
    assert log.read_text().split()[-1] == "quiet"


def test_running_out_of_memory_twice_is_the_machines_fault():
    item = "exec('raise MemoryError')"
    for workers in (0, 1):
        (value,) = [value for _, value in run_tasks(eval, [item], workers=workers)]
        assert isinstance(value, StorageError)
        assert "out of memory" in str(value)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_known_is_its_own_value_and_starts_no_worker(workers):
    known = VideoError("not found")
    results = run_tasks(eval, [known] * 1000, workers=workers)
    assert next(results) == (0, known)
    assert not workers_of(os.getpid())
    assert [value for _, value in results] == [known] * 999


def test_known_items_between_the_others_leave_no_worker_without_work(tmp_path):
    """Each of two items waits until the other one has begun, with a hundred known ones between them."""
    meet = (
        "(lambda own, other: (own.touch(),"
        " [__import__('time').sleep(0.02) for _ in range(500) if not other.exists()], other.exists())[2]"
        ")(*map(__import__('pathlib').Path, {}))"
    )
    names = [str(tmp_path / name) for name in "ab"]
    items = [meet.format(names), *[VideoError("not found")] * 100, meet.format(names[::-1])]
    values = [value for _, value in run_tasks(eval, items, workers=2)]
    assert (values[0], values[-1]) == (True, True)


def test_items_are_taken_with_a_bounded_look_ahead():
    taken = []

    def items():
        for i in range(50):
            taken.append(i)
            yield str(i)

    results = run_tasks(eval, items(), workers=2)
    for i in range(10):
        assert next(results) == (i, i)
        assert len(taken) <= i + LOOK_AHEAD * 2
    results.close()


def test_an_error_in_the_items_is_raised_and_the_workers_end():
    def items():
        yield "1"
        raise KeyError("items")

    with pytest.raises(KeyError, match="items"):
        list(run_tasks(eval, items(), workers=2))


def test_closing_early_ends_workers_in_the_middle_of_their_work():
    results = run_tasks(eval, ["0", HANG, HANG, "3"], workers=2)
    assert next(results) == (0, 0)
    assert wait_until(lambda: len(workers_of(os.getpid())) == 2)
    began = time.monotonic()
    results.close()
    assert time.monotonic() - began < 5
    assert not workers_of(os.getpid())


def test_nothing_is_started_before_the_first_result_is_asked_for():
    results = run_tasks(eval, ["1"], workers=2)
    assert not workers_of(os.getpid())
    results.close()


def test_workers_have_one_thread_and_do_not_import_the_main_module(capfd):
    modules = "sorted({'torch', 'numpy', 'pytest'} & set(__import__('sys').modules))"
    items = ["__import__('os').environ['OMP_NUM_THREADS']", modules, "print('from a worker')"]
    assert plain(run_tasks(eval, items, workers=1)) == ["1", [], None]
    out, err = capfd.readouterr()
    assert (out, err) == ("", "from a worker\n")


def test_a_result_that_cannot_be_sent_is_raised():
    with pytest.raises((AttributeError, TypeError, pickle.PicklingError), match="pickle"):
        list(run_tasks(eval, ["lambda: 0"], workers=1))


def test_an_exception_that_cannot_be_sent_is_raised_as_text():
    bad = "exec('class E(Exception):\\n def __init__(self, a, b): pass\\nraise E(1, 2)')"
    with pytest.raises(RuntimeError, match="raised in a worker process"):
        list(run_tasks(eval, [bad], workers=1))


ARRAYS = (
    "(lambda np: {'a': np.arange(50_001, dtype='u1')[::-1], 'b': np.arange(90_000.0).reshape(300, 300).T,"
    " 'c': np.zeros((0, 3)), 'd': np.arange(7, dtype='i2')[::2], 'e': 'text'})(__import__('numpy'))"
)


@pytest.mark.parametrize("memory", ["enough", "too little", "none"])
def test_large_arrays_arrive_whole_and_are_the_callers_own(memory):
    """As files in memory, or through the pipe where the system gives none: the same values, types and layout."""
    lack = {
        "enough": "None",
        "too little": "exec('import os; os.memfd_create = lambda name: os.open(\"/dev/full\", os.O_WRONLY)')",
        "none": "exec('import os; del os.memfd_create')",
    }
    expected = eval(ARRAYS)
    _, *results = plain(run_tasks(eval, [lack[memory], ARRAYS, ARRAYS, "0"], workers=1))
    assert results.pop() == 0
    for value in results:
        assert value.pop("e") == "text"
        for name, array in value.items():
            np.testing.assert_array_equal(array, expected[name])
            assert array.dtype == expected[name].dtype
            assert array.flags.writeable
            assert array.ctypes.data % array.itemsize == 0
    results[0]["b"][:] = -1  # nobody else's
    np.testing.assert_array_equal(results[1]["b"], expected["b"])


def test_no_file_stays_open_for_what_arrived():
    def open_results() -> list[str]:
        found = []
        for file in Path("/proc/self/fd").iterdir():
            with suppress(FileNotFoundError):  # that of the listing itself
                found.append(str(file.readlink()))
        return [name for name in found if "mmkd-result" in name]

    kept = list(run_tasks(eval, [ARRAYS] * 20, workers=1))
    assert len(kept) == 20
    assert not open_results()


def test_a_worker_that_dies_before_it_hands_over_its_memory_takes_one_item():
    death = TEAR.replace('(1000).to_bytes(4, "big") + b"half a message"', "MESSAGE").replace(
        "import os, re, signal;",
        'import os, pickle, re; data = pickle.dumps((b"", [70000]));MESSAGE = len(data).to_bytes(4, "big") + data;',
    )
    assert plain(run_tasks(eval, ["0", death, "2"], workers=1)) == [0, "error: decoder died", 2]


def test_a_function_of_the_main_module_is_refused_with_advice(monkeypatch):
    def function(item):
        return item

    monkeypatch.setattr(function, "__module__", "__main__")
    with pytest.raises(ValueError, match="define it in a module"):
        run_tasks(function, [1], workers=1)
    assert plain(run_tasks(function, [1], workers=0)) == [1]
    with pytest.raises(ValueError, match="0 or more"):
        run_tasks(function, [1], workers=-1)


def test_workers_that_cannot_start_stop_the_job(monkeypatch):
    monkeypatch.setattr(pool_worker.sys, "executable", "/bin/false")
    with pytest.raises(StorageError, match="cannot be started"):
        list(run_tasks(eval, ["1", "2"], workers=2))


PARENT = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored
from mmkd.cache_tools.process.pool import run_tasks
for index, value in run_tasks(eval, ["'ready'", {HANG!r}, {HANG!r}], workers=2, timeout_seconds=300):
    print(value, flush=True)
"""


def start_parent() -> tuple[subprocess.Popen, list[int]]:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert parent.stdout.readline() == "ready\n"
    assert wait_until(lambda: len(workers_of(parent.pid)) == 2)
    return parent, workers_of(parent.pid)


def test_ctrl_c_ends_the_job_once_and_leaves_no_process():
    """A terminal sends the signal to the whole group; workers must not print tracebacks of their own."""
    parent, workers = start_parent()
    os.killpg(parent.pid, signal.SIGINT)
    _, errors = parent.communicate(timeout=20)
    assert parent.returncode == -signal.SIGINT
    assert errors.count("KeyboardInterrupt") == 1
    assert errors.count("Traceback") == 1
    assert not any(alive(worker) for worker in workers)


def test_idle_workers_end_when_the_parent_is_killed():
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT.replace(repr(HANG), "'1'") + "\n    sys.stdin.read()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with parent:
        assert parent.stdout.readline() == "ready\n"
        assert wait_until(lambda: len(workers_of(parent.pid)) == 2)
        workers = workers_of(parent.pid)
        parent.kill()
    assert wait_until(lambda: not any(alive(worker) for worker in workers))


@settings(deadline=None, max_examples=5)
@given(
    faults=st.lists(st.sampled_from(["ok", "ok", "ok", "kill", "video error"]), max_size=12),
    workers=st.integers(1, 3),
)
def test_each_item_gets_its_own_outcome_whatever_the_others_do(faults, workers):
    codes = {"kill": KILL.format(9), "video error": VIDEO_ERROR}
    texts = {"kill": "error: decoder died", "video error": "error: no frame"}
    items = [codes.get(fault, str(i)) for i, fault in enumerate(faults)]
    expected = [texts.get(fault, i) for i, fault in enumerate(faults)]
    assert plain(run_tasks(eval, ["0", *items], workers=workers)) == [0, *expected]
