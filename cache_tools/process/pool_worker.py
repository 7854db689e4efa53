"""One worker process of a pool, and both ends of its pipe.

A worker imports only what the function needs, never the caller's `__main__`, so that a script needs no guard and
its torch is not loaded again. Large arrays travel in files in memory.
"""

import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any, BinaryIO

from mmkd.cache_tools.process.streams import print_messages_only
from mmkd.data_manifests.errors import StorageError, VideoError

LARGE_BYTES = 2**16
"""Arrays that are smaller together go through the pipe."""
START_SECONDS = 120.0
"""How long a worker may take to import its function; slow network file systems need tens of seconds."""
NO_MEMORY = "out of memory? Free some, or use fewer --workers, and run again"
KILLS = {signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGBUS, signal.SIGXCPU}
"""Signals that come from outside: the kernel that lacks memory, a person, a file that shrank under its map."""
PARENTS_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
"""Those that end a job: the parent decides when, so a worker does not hear them."""
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OPENCV_FOR_THREADS_NUM")
ONE_THREAD = dict.fromkeys(_THREADS, "1")
"""Environment of processes that are many: each computes in one thread."""


class WorkerLostError(Exception):
    """The worker is dead or has been given up; the text is the reason for the clip's status."""

    def __init__(self, reason: str, *, by_time: bool = False, is_crash: bool = False) -> None:
        """Say why, and in which way."""
        super().__init__(reason)
        self.by_time = by_time
        """Whether it was given up, and did not die."""
        self.is_crash = is_crash
        """Whether it ended itself, by a fault of its own code: nobody killed it."""


class Worker:
    """One worker process and its pipe."""

    def __init__(self) -> None:
        """Start it; OSError when the machine cannot."""
        self._connection, theirs = Pipe()
        command = f"from mmkd.cache_tools.process.pool_worker import serve; serve({theirs.fileno()})"
        # Our copy of the worker's end is closed: else the pipe would never end when the worker dies.
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", command],  # -P: the current folder may hold a module of a known name
                stdin=subprocess.DEVNULL,
                stdout=2,  # what a decoder prints must not end up in a command's result
                pass_fds=(theirs.fileno(),),
                env=os.environ | ONE_THREAD,
            )

    def prepare(self, function: bytes) -> None:
        """Send the pickled function and wait until the worker has imported it."""
        self._send(pickle.dumps((sys.path, function)))
        self._receive(START_SECONDS)

    def call(self, item: object, timeout_seconds: float | None) -> object:
        """Return the function's result or its VideoError; raise WorkerLostError, or what else it raised."""
        self._send(pickle.dumps((item, timeout_seconds), protocol=5))
        return self._receive(timeout_seconds)

    def kill(self) -> None:
        """End the process; one that the kernel cannot end now (a dead network mount) is left behind."""
        self._process.kill()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(5)

    def close(self) -> None:
        """Close our end of the pipe."""
        self._connection.close()

    def _send(self, message: bytes) -> None:
        try:
            self._connection.send_bytes(message)
        except OSError as error:
            raise self._lost() from error

    def _receive(self, timeout_seconds: float | None) -> object:
        try:
            if not self._connection.poll(timeout_seconds):
                raise WorkerLostError(f"took longer than {timeout_seconds:g} s", by_time=True)
            message = _receive_message(self._connection)
        except (EOFError, OSError) as error:
            raise self._lost() from error
        failed, value = message
        if failed:
            raise value
        return value

    def _lost(self) -> WorkerLostError:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        # None after five seconds without an end: nobody knows, so it does not count as a crash.
        code = self._process.returncode
        return WorkerLostError("decoder died", is_crash=code is not None and -code not in KILLS)


def serve(file_descriptor: int) -> None:
    """Serve one parent until it closes the pipe (the entry point of a worker process)."""
    print_messages_only()
    for number in PARENTS_SIGNALS:  # the parent decides when the job ends
        signal.signal(number, signal.SIG_IGN)
    with Connection(file_descriptor) as connection, suppress(EOFError, ConnectionError):
        path, pickled = pickle.loads(connection.recv_bytes())
        sys.path[:] = path
        function = _reply(connection, pickle.loads, pickled, acknowledge=True)
        while function is not None:
            item, timeout_seconds = pickle.loads(connection.recv_bytes())
            if timeout_seconds is not None:  # the kernel ends us when the parent was killed and we hang
                signal.alarm(int(timeout_seconds) + 30)
            _reply(connection, function, item)
            signal.alarm(0)


def _reply(
    connection: Connection, function: Callable[[Any], Any], item: object, *, acknowledge: bool = False
) -> Any:
    """Call the function, send (False, result) or (True, exception), and return the result."""
    value = None
    try:
        value = function(item)
        message = _Message((False, None if acknowledge else value))
    except (VideoError, StorageError) as error:
        message = _Message((False, error))
    except MemoryError:
        message = _Message((False, StorageError(NO_MEMORY)))
    except Exception as error:
        message = _Message((True, _portable(error)))
    message.send(connection)
    return value


class _Message:
    """A pickled value whose large arrays travel in a file in memory: a pipe takes three times as long for them."""

    def __init__(self, value: object) -> None:
        buffers: list[pickle.PickleBuffer] = []
        self._pickled = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
        self._buffers = [buffer.raw() for buffer in buffers]

    def send(self, connection: Connection) -> None:
        """Send it; where the system has no memory to lend, through the pipe."""
        sizes = [buffer.nbytes for buffer in self._buffers]
        file = self._file() if sum(sizes) >= LARGE_BYTES else None
        if file is None:
            parts = [bytes(buffer) for buffer in self._buffers]
            connection.send_bytes(pickle.dumps((self._pickled, parts), protocol=5))
            return
        with file:
            connection.send_bytes(pickle.dumps((self._pickled, sizes)))
            send_handle(connection, file.fileno(), None)  # None: only Windows asks for a process

    def _file(self) -> BinaryIO | None:
        """Return a file that lives in memory as long as somebody has it open, or None."""
        try:
            file = os.fdopen(os.memfd_create("mmkd-result"), "wb", buffering=0)
        except (AttributeError, OSError):  # not Linux
            return None
        try:
            for buffer in self._buffers:
                while buffer:
                    buffer = buffer[file.write(buffer) :]
        except OSError:
            file.close()
            return None
        return file


def _receive_message(connection: Connection) -> Any:
    """Return the value of a message."""
    pickled, parts = pickle.loads(connection.recv_bytes())
    if not parts or isinstance(parts[0], bytes):
        return pickle.loads(pickled, buffers=map(bytearray, parts))  # arrays over bytes cannot be written
    with os.fdopen(recv_handle(connection), "rb") as file:
        file.seek(0)  # the worker shares our position
        buffers = [bytearray(size) for size in parts]
        for buffer in buffers:
            if file.readinto(buffer) != len(buffer):
                raise EOFError("the worker's file is too short")
    return pickle.loads(pickled, buffers=buffers)


def _portable(error: Exception) -> Exception:
    """Return the exception, or one that says the same, for its constructor may not survive the way."""
    text = f"raised in a worker process:\n{''.join(traceback.format_exception(error))}"
    try:
        error.add_note(text)
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(text)
    return error
