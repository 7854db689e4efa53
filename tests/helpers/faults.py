"""Faults for the children of `fork_server.py`: a step at which to die, to stop or to meet an error.

Each change of a store is a row of numbered steps, named by what was just done to which key:

    opened KEY      nothing written yet             half KEY        half of the temporary file is written
    written KEY     the temporary file is synced    placed KEY      it has its name, the folder is not synced
    synced KEY      it is durable                   deleting KEY, deleted KEY
    decoded         a clip is ready for the experts

Faults are JSON: `trace` (a file that gets a line for each step), `acts` (a list of {"at": number} or {"match":
regular expression, "nth": 1}, each with "do": kill, stop, eio or enospc), `ordinary_user`, `file_size`, `source`
(see `faulty_source.py`).
"""

import ctypes
import errno
import os
import re
import resource
import signal
import threading
from collections import Counter

from mmkd.cache_tools.frames import clip_set as data
from mmkd.cache_tools.storage import local_store
from mmkd.cache_tools.storage.local_store import LocalStore
from mmkd.pipeline.build import build

TASK = re.compile(r"[0-9a-f]{12}-\d+-\d+-[0-9a-f]{8}")


class Steps:
    """Counts the steps of the main thread and acts at some of them."""

    def __init__(self, trace: str | None, acts: list[dict]) -> None:
        self.count, self.seen = 0, Counter()
        self.trace = os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if trace else None
        self.acts = acts
        self.place = threading.local()

    def reach(self, phase: str, key: str = "") -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        name = f"{phase} {TASK.sub('TASK', key)}".strip()
        self.count += 1
        if self.trace is not None:
            os.write(self.trace, f"{name}\n".encode())
        for number, act in enumerate(self.acts):
            if "match" in act and re.fullmatch(act["match"], name):
                self.seen[number] += 1
            if act.get("at") == self.count or (self.seen[number] == act.get("nth", 1) and "match" in act):
                self.seen[number] += 1  # once
                perform(act["do"])


def perform(action: str) -> None:
    """Die, stop until somebody says go on, or meet an error of the system."""
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        code = {"eio": errno.EIO, "enospc": errno.ENOSPC}[action]
        raise OSError(code, os.strerror(code))


def install(wanted: dict) -> None:
    """Install the faults in this process."""
    if "source" in wanted:
        from tests.helpers.faulty_source import FaultySource

        data.open_data_frames = lambda *data_set: FaultySource(*data_set, **wanted["source"])
    if "file_size" in wanted:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (wanted["file_size"],) * 2)
    install_steps(Steps(wanted.get("trace"), wanted.get("acts", [])))
    if wanted.get("ordinary_user") and os.getuid() == 0:
        obey_modes()


def obey_modes() -> None:
    """Give up root's right to read and write whatever the modes of files say (capset(2)).

    An ordinary user's id would do the same, but he may not enter the folders of root's Python.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    header, values = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc.capget(header, values)
    values[0] &= ~0b110  # effective: CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    values[1] &= ~0b110
    if libc.capset(header, values):
        raise OSError(ctypes.get_errno(), "capset")


def install_steps(steps: Steps) -> None:
    """Make the local store report its steps."""
    place, write_synced, sync, delete = (
        LocalStore._place,
        local_store.write_synced,
        local_store.sync_directory,
        LocalStore.delete,
    )
    prepare = build.prepare_clip

    def placing(self, key, content, move):
        steps.place.key = key
        place(self, key, content, move)

    def writing(path, content):
        steps.reach("opened", steps.place.key)
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])
        steps.reach("half", steps.place.key)
        write_synced(path, content)
        steps.reach("written", steps.place.key)

    def syncing(path):
        steps.reach("placed", steps.place.key)
        sync(path)
        steps.reach("synced", steps.place.key)

    def deleting(self, key):
        steps.reach("deleting", key)
        delete(self, key)
        steps.reach("deleted", key)

    def preparing(job):
        clip = prepare(job)
        steps.reach("decoded")
        return clip

    LocalStore._place, LocalStore.delete = placing, deleting
    local_store.write_synced, local_store.sync_directory = writing, syncing
    if not steps.acts and steps.trace is None:
        return  # a worker process imports the function by its name
    build.prepare_clip = preparing
