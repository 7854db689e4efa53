"""Worker processes for decoders that may abort, hang or be killed: one item is lost, never the job.

Each worker is a fresh interpreter with a pipe of its own, minded by one thread of the parent. So there is no
lock or pipe that a dying worker could leave in an unusable state for the others: a pool with a shared result
pipe (pebble 5.2 was measured) hangs for good when a worker is killed while it sends a large array. A worker
imports only what the function needs, never the caller's `__main__`, so that a script needs no guard and its
torch is not loaded again. It gives up closures and functions defined in `__main__`: the function must be
importable by name.
"""

import os
import pickle
import signal
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any, BinaryIO, TypeVar

from mmkd.data_manifests.errors import StorageError, VideoError

Item = TypeVar("Item")
Result = TypeVar("Result")

LOOK_AHEAD = 3
"""Items in work or waiting to be taken, per worker: larger smooths uneven clips and takes more memory."""
ATTEMPTS = 2
"""How often an item is tried, each time in a fresh worker after the first, before it is given up."""
LARGE_BYTES = 2**16
"""Arrays that are smaller together go through the pipe."""
START_SECONDS = 120.0
"""How long a worker may take to import its function; slow network file systems need tens of seconds."""
_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OPENCV_FOR_THREADS_NUM")
_ONE_THREAD = dict.fromkeys(_THREADS, "1")


def run_tasks(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    workers: int,
    timeout_seconds: float | None = None,
    doubt_errors: bool = False,
    extra_items: int = 0,
) -> Generator[tuple[int, Result | VideoError | StorageError], None, None]:
    """Yield (position, `function(item)`) in the order of `items`, computed in `workers` processes.

    A VideoError raised by the function is its item's value, with `doubt_errors` only when it repeats in a fresh
    worker. A worker that dies or takes longer than `timeout_seconds` is replaced and its item tried once more in a
    fresh one, then a VideoError is its value; so is a StorageError, a fault of the machine and not of the item. Any
    other exception is raised here. `extra_items` are computed ahead besides `LOOK_AHEAD` for each worker: as many
    as the caller takes before it pauses. Closing the generator kills the workers. `workers=0` runs inline, for
    tests and tiny jobs: without protection from death and time.
    """
    if workers < 0:
        raise ValueError(f"workers must be 0 or more, got {workers}")
    if workers == 0:
        return _run_inline(function, items)
    if getattr(function, "__module__", None) == "__main__":
        raise ValueError("a worker cannot import a function from __main__; define it in a module")
    minders = _Minders(pickle.dumps(function, protocol=5), timeout_seconds, doubt_errors)
    return _run_in_workers(minders, items, workers, ahead=LOOK_AHEAD * workers + extra_items)


def _run_inline(
    function: Callable[[Item], Result], items: Iterable[Item]
) -> Generator[tuple[int, Result | VideoError | StorageError], None, None]:
    for index, item in enumerate(items):
        value: Result | VideoError | StorageError
        try:
            value = function(item)
        except (VideoError, StorageError) as error:
            value = error
        yield index, value


def _run_in_workers(
    minders: "_Minders", items: Iterable[Any], workers: int, *, ahead: int
) -> Generator[tuple[int, Any], None, None]:
    executor = ThreadPoolExecutor(workers, "mmkd-worker", initializer=minders.begin_thread)
    waiting: deque[Future[Any]] = deque()
    delivered = 0
    try:
        for item in items:
            waiting.append(executor.submit(minders.call, item))
            if len(waiting) >= ahead:
                yield delivered, waiting.popleft().result()
                delivered += 1
        while waiting:
            yield delivered, waiting.popleft().result()
            delivered += 1
    finally:
        minders.kill_all()
        executor.shutdown(wait=True, cancel_futures=True)
        minders.close_all()


class _Minders:
    """What the minding threads share: the function, the time limit and the workers to kill at the end."""

    def __init__(self, function: bytes, timeout_seconds: float | None, doubt_errors: bool) -> None:
        self._function = function
        self._doubted = (VideoError, StorageError) if doubt_errors else (StorageError,)
        self._timeout_seconds = timeout_seconds
        self._lock = threading.Lock()
        self._workers: set[_Worker] = set()
        self._stopped = False
        self._local = threading.local()

    @staticmethod
    def begin_thread() -> None:
        """Block the signals that end a job in this thread, so that its workers are born with them blocked."""
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)

    def call(self, item: object) -> object:
        """Run one item in this thread's worker; the value is the result, a VideoError or a StorageError."""
        value: object = None
        for _ in range(ATTEMPTS):
            worker = self._worker()
            try:
                value = worker.call(item, self._timeout_seconds)
                if not isinstance(value, self._doubted):
                    return value
            except _WorkerLostError as error:
                value = VideoError(str(error))
            self._discard(worker)
        return value

    def kill_all(self) -> None:
        """Kill every worker and start no other; the threads that wait for them then end."""
        with self._lock:
            self._stopped = True
            workers = list(self._workers)
        for worker in workers:
            worker.kill()

    def close_all(self) -> None:
        """Close the pipes, when no thread waits for one any more."""
        for worker in self._workers:
            worker.close()

    def _worker(self) -> "_Worker":
        worker: _Worker | None = getattr(self._local, "worker", None)
        if worker is None:
            with self._lock:
                if self._stopped:
                    raise RuntimeError("the pool is closed")
                worker = _Worker()
                self._workers.add(worker)
            self._local.worker = worker
            try:
                worker.prepare(self._function)
            except _WorkerLostError as error:
                self._discard(worker)
                raise StorageError(f"a worker process cannot be started: {error}") from error
        return worker

    def _discard(self, worker: "_Worker") -> None:
        self._local.worker = None
        with self._lock:
            self._workers.discard(worker)
        worker.kill()
        worker.close()


class _WorkerLostError(Exception):
    """The worker is dead or has been given up; the text is the reason for the clip's status."""


class _Worker:
    """One worker process and its pipe."""

    def __init__(self) -> None:
        self._connection, theirs = Pipe()
        command = f"from mmkd.cache_tools.pool import serve; serve({theirs.fileno()})"
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", command],
                stdin=subprocess.DEVNULL,
                stdout=2,  # what a decoder prints must not end up in a command's result
                pass_fds=(theirs.fileno(),),
                env=os.environ | _ONE_THREAD,
            )

    def prepare(self, function: bytes) -> None:
        """Send the pickled function and wait until the worker has imported it."""
        self._send(pickle.dumps((sys.path, function)))
        self._receive(START_SECONDS)

    def call(self, item: object, timeout_seconds: float | None) -> object:
        """Return the function's result or its VideoError; raise _WorkerLostError, or what else it raised."""
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
            raise _WorkerLostError("decoder died") from error

    def _receive(self, timeout_seconds: float | None) -> object:
        try:
            if not self._connection.poll(timeout_seconds):
                raise _WorkerLostError(f"took longer than {timeout_seconds:g} s")
            message = _receive_message(self._connection)
        except (EOFError, OSError) as error:
            raise _WorkerLostError("decoder died") from error
        failed, value = message
        if failed:
            raise value
        return value


def serve(file_descriptor: int) -> None:
    """Serve one parent until it closes the pipe (the entry point of a worker process)."""
    for number in _SIGNALS:  # the parent decides when the job ends
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
            send_handle(connection, file.fileno(), None)

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
        return pickle.loads(pickled, buffers=map(bytearray, parts))
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
