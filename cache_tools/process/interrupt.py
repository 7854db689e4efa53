"""A clean stop: SIGINT, SIGTERM and SIGUSR1 become a flag that long loops check where stopping is safe.

Batch systems send SIGTERM or SIGUSR1 some seconds before they kill a job. Where no loop has the flag, such as while
experts load, they end a command as Ctrl-C does. A second SIGINT aborts at once,
for a user who does not want to wait. Only the main thread can own signal handlers: elsewhere the flag never
rises, and the caller's own handling stays as it is.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from mmkd.data_manifests.errors import InterruptedByUserError

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Whether, and by which signal, a clean stop was asked for."""

    def __init__(self) -> None:
        """Nothing was asked for yet."""
        self._received: signal.Signals | None = None
        self._at_once: str | None = None

    @property
    def requested(self) -> bool:
        """Whether a stop signal has arrived."""
        return self._received is not None

    def check(self, kept: str) -> None:
        """Raise InterruptedByUserError when a stop was asked for; `kept` says what is not lost."""
        if self._received is not None:
            name = self._received.name
            raise InterruptedByUserError(f"stopped by {name}: {kept}; run the same command again to go on")

    @contextmanager
    def at_once(self, kept: str) -> Iterator[None]:
        """Raise InterruptedByUserError the moment a stop is asked for within the body.

        For waiting on work that a stop throws away; where the body writes, `check` between its steps instead.
        """
        self._at_once = kept
        try:
            self.check(kept)
            yield
        finally:
            self._at_once = None

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Note a signal; raise KeyboardInterrupt at the second SIGINT, and within `at_once` at the first signal."""
        if number == signal.SIGINT and self._received is not None:
            raise KeyboardInterrupt
        is_first = self._received is None
        self._received = signal.Signals(number)
        if self._at_once is not None and is_first:
            self.check(self._at_once)
        if number == signal.SIGINT:  # os.write, because print may be what this very handler interrupted
            os.write(2, b"\nstopping after the work in hand; press Ctrl-C again to abort at once\n")


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Yield a StopRequest that notes stop signals; on leaving, the handlers are as they were."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    previous = {number: signal.signal(number, request.handle) for number in STOP_SIGNALS}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGUSR1 raise KeyboardInterrupt in the body, as SIGINT does; afterwards all is as before."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [number for number in STOP_SIGNALS if signal.getsignal(number) == signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
