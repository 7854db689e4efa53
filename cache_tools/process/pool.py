"""Worker processes for decoders that may abort, hang or be killed: one item is lost, never the job.

Each worker is a fresh interpreter with a pipe of its own, watched by one thread of the parent. So there is no
lock or pipe that a dying worker could leave in an unusable state for the others: a pool with a shared result
pipe (pebble 5.2 was measured) hangs for good when a worker is killed while it sends a large array.
It gives up closures and functions defined in `__main__`: the function must be
importable by name.
"""

import pickle
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, TypeVar

from mmkd.cache_tools.process.pool_worker import NO_MEMORY, PARENTS_SIGNALS, Worker, WorkerLostError
from mmkd.data_manifests.errors import StorageError, VideoError

Item = TypeVar("Item")
Result = TypeVar("Result")

KNOWN_AHEAD = 256
"""Items with a known outcome that may lie between those in work: they cost nothing but their place."""
LOOK_AHEAD = 3
"""Items in work or waiting to be taken, per worker: larger smooths uneven clips and takes more memory."""
ATTEMPTS = 2
"""How often an item is tried, each time in a fresh worker after the first, before it is given up or judged."""
FAULTS_IN_A_ROW = 3
"""After so many of the machine's faults the next one is believed at once."""
TOO_SLOW = "is the disk with the videos well? Run again, or allow more with data.clip_timeout_seconds"


def run_tasks(
    function: Callable[[Item], Result],
    items: Iterable[Item | VideoError],
    *,
    workers: int,
    timeout_seconds: float | None = None,
    recheck_errors: bool = False,
    extra_items: int = 0,
    canaries: Sequence[Item] = (),
) -> Generator[tuple[int, Result | VideoError | StorageError], None, None]:
    """Yield (position, `function(item)`) in the order of `items`, computed in `workers` processes.

    An item that is a VideoError is its own value: what is known never travels. A VideoError raised by the
    function is its item's value, with `recheck_errors` only when it repeats in a fresh worker. A worker that dies
    or takes longer than `timeout_seconds` is replaced and its item tried once more; when that fails, too, the
    item is judged (see `_Watchers.judge`): its value is a VideoError when the machine is well and the fault is the
    item's, and a StorageError when it is the machine's. So is the value of an item that raises StorageError, or
    runs out of memory, twice. Any other exception is raised here. `extra_items` are computed ahead besides
    `LOOK_AHEAD` for each worker: as many as the caller takes before it pauses. `canaries` are items that should
    go well, to tell whether the machine is well before one of `items` has gone well. Closing the generator kills
    the workers. `workers=0` runs inline, for tests and tiny jobs: without protection from death and time.
    """
    if workers < 0:
        raise ValueError(f"workers must be 0 or more, got {workers}")
    if workers == 0:
        return _run_inline(function, items)
    if getattr(function, "__module__", None) == "__main__":
        raise ValueError("a worker cannot import a function from __main__; define it in a module")
    watchers = _Watchers(pickle.dumps(function, protocol=5), timeout_seconds, recheck_errors, canaries)
    return _run_in_workers(watchers, items, workers, ahead=LOOK_AHEAD * workers + extra_items)


def _run_inline(
    function: Callable[[Item], Result], items: Iterable[Item | VideoError]
) -> Generator[tuple[int, Result | VideoError | StorageError], None, None]:
    for index, item in enumerate(items):
        value: Result | VideoError | StorageError
        try:
            value = item if isinstance(item, VideoError) else function(item)
        except (VideoError, StorageError) as error:
            value = error
        except MemoryError:
            value = StorageError(NO_MEMORY)
        yield index, value


def _run_in_workers(
    watchers: "_Watchers", items: Iterable[Any], workers: int, *, ahead: int
) -> Generator[tuple[int, Any], None, None]:
    executor = ThreadPoolExecutor(workers, "mmkd-worker", initializer=watchers.begin_thread)
    waiting: deque[tuple[bool, Future[Any]]] = deque()
    """(whether it is in work, its outcome) of the items taken and not yet delivered."""
    in_work = delivered = 0

    def deliver() -> tuple[int, Any]:
        nonlocal in_work, delivered
        was_in_work, future = waiting.popleft()
        value = future.result()
        if isinstance(value, _Suspect):  # with nothing else at work: what the machine can do, it can do now
            wait([other for _, other in waiting])
            value = executor.submit(watchers.judge, value).result()
        in_work -= was_in_work
        delivered += 1
        return delivered - 1, value

    try:
        for item in items:
            known = isinstance(item, VideoError)
            waiting.append((not known, _done(item) if known else executor.submit(watchers.call, item)))
            in_work += not known
            while in_work >= ahead or len(waiting) >= ahead + KNOWN_AHEAD:
                yield deliver()
        while waiting:
            yield deliver()
    finally:
        # Killed first: shutdown waits for the threads, and those for workers that may hang.
        watchers.kill_all()
        executor.shutdown(wait=True, cancel_futures=True)
        watchers.close_all()


def _done(value: object) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


@dataclass(frozen=True)
class _Suspect:
    """An item that was lost with its worker in every attempt: it is to blame, or the machine."""

    item: object
    """The item."""
    loss: "WorkerLostError"
    """The last attempt's end."""


class _Watchers:
    """What the watching threads share: the function, the time limit and the workers to kill at the end."""

    def __init__(
        self, function: bytes, timeout_seconds: float | None, recheck_errors: bool, canaries: Sequence[object]
    ) -> None:
        self._function = function
        self._canaries = canaries
        self._faults_in_a_row = 0
        self._good: tuple[object, ...] = ()
        """The latest item that went well, if any."""
        self._rechecked = (VideoError, StorageError) if recheck_errors else (StorageError,)
        self._timeout_seconds = timeout_seconds
        self._lock = threading.Lock()
        self._workers: set[Worker] = set()
        self._stopped = False
        self._local = threading.local()

    @staticmethod
    def begin_thread() -> None:
        """Block the signals that end a job in this thread, so that its workers are born with them blocked."""
        signal.pthread_sigmask(signal.SIG_BLOCK, PARENTS_SIGNALS)

    def call(self, item: object) -> object:
        """Run one item in this thread's worker; the value is its result, an error, or a _Suspect."""
        value: object = None
        for _ in range(ATTEMPTS):
            value = self._attempt(item)
            if isinstance(value, _Suspect) and value.loss.by_time:
                return value  # another attempt takes as long: it comes when nothing else is at work
            if not isinstance(value, (_Suspect, *self._rechecked)):
                self._good = self._good if isinstance(value, VideoError) else (item,)
                break
            if isinstance(value, StorageError) and self._faults_in_a_row >= FAULTS_IN_A_ROW:
                break  # the machine is not well: nothing is gained by asking twice
        self._faults_in_a_row = self._faults_in_a_row + 1 if isinstance(value, StorageError) else 0
        return value

    def judge(self, suspect: _Suspect) -> object:
        """Try an item for the last time; the value is its result, a VideoError, or a StorageError.

        Nothing else is at work, so memory and disk are the item's alone. It is to blame when it is lost again while
        another one goes well in a fresh worker. Where no other is known a crash is the item's fault, since decoders
        crash again and again, and a kill or a lack of time is the machine's.
        """
        others = [*self._good, *self._canaries]
        well = any(not isinstance(self._attempt(item), (_Suspect, VideoError, StorageError)) for item in others)
        value = self._attempt(suspect.item)
        if not isinstance(value, _Suspect):
            return value
        if well or (value.loss.is_crash and not others):
            return VideoError(str(value.loss))
        whom = ", and so did others" if others else ""
        return StorageError(f"{value.loss} in each attempt{whom}: {TOO_SLOW if value.loss.by_time else NO_MEMORY}")

    def _attempt(self, item: object) -> object:
        """Run one item in this thread's worker, which goes when it fails: the next one gets a fresh worker."""
        worker = self._worker()
        try:
            value = worker.call(item, self._timeout_seconds)
            if not isinstance(value, self._rechecked):
                return value
        except WorkerLostError as error:
            value = _Suspect(item, error)
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

    def _worker(self) -> "Worker":
        worker: Worker | None = getattr(self._local, "worker", None)
        if worker is None:
            with self._lock:
                # Under the lock, so that kill_all meets every worker that was started before it.
                if self._stopped:
                    raise RuntimeError("the pool is closed")
                try:
                    worker = Worker()
                except OSError as error:
                    raise StorageError(f"a worker process cannot be started: {error.strerror}") from error
                self._workers.add(worker)
            self._local.worker = worker
            try:
                worker.prepare(self._function)
            except WorkerLostError as error:
                self._discard(worker)
                raise StorageError(f"a worker process cannot be started: {error}") from error
        return worker

    def _discard(self, worker: "Worker") -> None:
        self._local.worker = None
        with self._lock:
            self._workers.discard(worker)
        worker.kill()
        worker.close()
