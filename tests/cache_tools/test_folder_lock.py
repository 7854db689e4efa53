"""One writer for a folder: a second one is refused by name, a dead one is followed, a sleeper stops."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from mmkd.cache_tools.tasks.folder_lock import folder_lock, lock_files
from mmkd.data_manifests.errors import InputError, StorageError

HOLD = """
import sys, time
from pathlib import Path
from mmkd.cache_tools.tasks.folder_lock import folder_lock
with folder_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@contextlib.contextmanager
def holder(folder):
    """Another process that holds `folder` until it is killed."""
    with subprocess.Popen([sys.executable, "-c", HOLD, folder], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def elsewhere(folder, generation=0):
    """A lock file as a process of another machine writes it."""
    card = {"id": "0123456789ab-7-123-89abcdef", "host": "node7", "pid": 7, "since": "2026-01-01 12:00:00 UTC"}
    path = folder / f".mmkd-lock-{generation:06d}.json"
    path.write_text(json.dumps(card))
    return path


def test_a_folder_is_held_for_the_block_and_free_again_after_it(tmp_path):
    with folder_lock(tmp_path) as lock:
        assert len(lock_files(tmp_path)) == 1
        lock.check()
        with pytest.raises(InputError, match=f"{tmp_path} is in use by process {os.getpid()} on host .*, since 2"):
            folder_lock(tmp_path).__enter__()
    assert list(tmp_path.iterdir()) == []
    with folder_lock(tmp_path):
        pass


def test_another_process_is_named_and_followed_once_it_was_killed(tmp_path):
    with holder(tmp_path) as process:
        with pytest.raises(InputError, match=f"in use by process {process.pid} on host"):
            folder_lock(tmp_path).__enter__()
        process.send_signal(signal.SIGKILL)
        process.wait()
        with folder_lock(tmp_path) as lock:
            lock.check()
    assert list(tmp_path.iterdir()) == []


def test_of_several_that_follow_a_dead_holder_one_gets_the_folder(tmp_path):
    with holder(tmp_path) as process:
        process.kill()
        process.wait()
    results, together, over = [], threading.Barrier(6), threading.Event()

    def follow():
        together.wait()
        try:
            with folder_lock(tmp_path):
                results.append("held")
                over.wait(20)
        except InputError:
            results.append("refused")

    threads = [threading.Thread(target=follow) for _ in range(6)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 20
    while len(results) < 6 and time.monotonic() < deadline:
        time.sleep(0.01)
    over.set()
    for thread in threads:
        thread.join()
    assert sorted(results) == ["held", *["refused"] * 5]
    assert list(tmp_path.iterdir()) == []


def test_a_holder_on_another_machine_is_refused_while_it_lives_and_followed_when_it_is_silent(tmp_path):
    path = elsewhere(tmp_path)
    beats = threading.Event()

    def beat():
        while not beats.wait(0.05):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(InputError, match="in use by process 7 on host node7, since 2026-01-01 12:00:00 UTC"):
            folder_lock(tmp_path, beat_seconds=0.05, stale_seconds=20).__enter__()
    finally:
        beats.set()
        thread.join()
    with folder_lock(tmp_path, beat_seconds=0.05, stale_seconds=0.3) as lock:
        lock.check()
    assert list(tmp_path.iterdir()) == []


def test_the_holder_gives_signs_of_life(tmp_path):
    with folder_lock(tmp_path, beat_seconds=0.02):
        (path,) = lock_files(tmp_path)
        os.utime(path, (0, 0))
        deadline = time.monotonic() + 20
        while path.stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert path.stat().st_mtime > 0


def test_a_sleeper_that_was_followed_stops_and_leaves_the_other_one_alone(tmp_path):
    with folder_lock(tmp_path) as lock:
        other = elsewhere(tmp_path, generation=1)
        with pytest.raises(InputError, match="taken over by process 7 on host node7"):
            lock.check()
    assert other.exists()


def test_a_holder_whose_file_was_tidied_away_holds_on(tmp_path):
    with folder_lock(tmp_path) as lock:
        lock_files(tmp_path)[0].unlink()
        lock.check()
        assert len(lock_files(tmp_path)) == 1


def test_a_torn_lock_file_is_followed_like_a_silent_holder(tmp_path):
    (tmp_path / ".mmkd-lock-000000.json").write_bytes(b'{"id": ')
    with folder_lock(tmp_path, beat_seconds=0.05, stale_seconds=0.2) as lock:
        lock.check()
    assert list(tmp_path.iterdir()) == []


def test_a_new_folder_in_which_nothing_was_made_is_removed_again(tmp_path):
    with folder_lock(tmp_path / "a" / "new"):
        pass
    assert not (tmp_path / "a" / "new").exists()
    with folder_lock(tmp_path / "kept"):
        (tmp_path / "kept" / "result").write_text("")
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["result"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot write .*file/run"):
        folder_lock(tmp_path / "file" / "run").__enter__()


def test_a_pipe_in_the_place_of_a_lock_file_is_an_error_and_no_wait(tmp_path):
    os.mkfifo(tmp_path / ".mmkd-lock-000000.json")
    with pytest.raises(StorageError, match="named pipe"):
        folder_lock(tmp_path).__enter__()
