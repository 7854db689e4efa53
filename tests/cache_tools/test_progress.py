"""Progress on terminals and in logs, and clean stops on signals."""

import io
import os
import signal
import subprocess
import sys
import threading

import pytest

from mmkd.cache_tools.process.interrupt import STOP_SIGNALS, stop_on_signals
from mmkd.cache_tools.process.progress import Progress, duration
from mmkd.data_manifests.errors import InterruptedByUserError


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return self.seconds


def test_a_log_gets_first_last_and_at_most_a_line_a_minute():
    log, clock = io.StringIO(), Clock()
    with Progress("building", total=300, done=100, stream=log, clock=clock) as progress:
        for _ in range(150):
            clock.seconds += 1
            progress.advance(note="flow 80 %")
    lines = log.getvalue().splitlines()
    assert lines[0] == "building: 100/300 clips"
    assert lines[1] == "building: 160/300 clips, 1.0/s, 2 min 20 s left, flow 80 %"
    assert lines[2].startswith("building: 220/300 clips, 1.0/s, 1 min 20 s left")
    assert lines[3] == "building: 250/300 clips, 1.0/s, flow 80 % after 2 min 30 s"
    assert len(lines) == 4


def test_a_terminal_gets_a_bar():
    terminal = Terminal()
    with Progress("probing videos", total=4, unit="video", stream=terminal) as progress:
        progress.advance(4, note="loss 1.5")
    assert "probing videos" in terminal.getvalue()
    assert "4/4" in terminal.getvalue()
    assert "loss 1.5" in terminal.getvalue()


def test_stderr_is_the_default_stdout_stays_free_and_disabled_is_silent(capsys):
    with Progress("a", total=1) as progress:
        progress.advance()
    with Progress("silent", total=1, enabled=False) as progress:
        progress.advance()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "a: 1/1 clip" in captured.err
    assert "silent" not in captured.err


def test_the_last_line_comes_also_when_the_work_fails():
    log = io.StringIO()
    with pytest.raises(ZeroDivisionError), Progress("a", total=2, stream=log):
        _ = 1 / 0
    assert log.getvalue().splitlines()[-1].startswith("a: 0/2 clips")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_raises_the_flag_and_the_handlers_come_back(number):
    before = {each: signal.getsignal(each) for each in STOP_SIGNALS}
    with stop_on_signals() as stop:
        assert not stop.requested
        stop.check("nothing")
        os.kill(os.getpid(), number)
        assert stop.requested
        with pytest.raises(
            InterruptedByUserError, match=rf"{number.name}: 3 shards .* run the same command"
        ) as caught:
            stop.check("3 shards are kept")
    assert caught.value.exit_code == 75
    assert {each: signal.getsignal(each) for each in STOP_SIGNALS} == before


def test_the_second_ctrl_c_aborts():
    with stop_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_at_once_a_signal_ends_a_wait_and_a_second_one_does_not_disturb_the_cleaning_up():
    cleaned = []

    def wait():
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        try:
            assert not threading.Event().wait(60), "the wait was not ended"
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            cleaned.append(True)

    with stop_on_signals() as stop:
        with pytest.raises(InterruptedByUserError, match="SIGTERM: all is kept"), stop.at_once("all is kept"):
            wait()
        with pytest.raises(InterruptedByUserError), stop.at_once("all is kept"):
            raise AssertionError("a stop that was asked for before is noticed at the beginning")
    assert cleaned == [True]
    with stop_on_signals() as stop:
        with stop.at_once("all is kept"):
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested, "outside, a signal is only noted"


def test_handlers_come_back_after_an_error_and_nest():
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_signals() as outer:
        with pytest.raises(ZeroDivisionError), stop_on_signals():
            _ = 1 / 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert outer.requested
    assert signal.getsignal(signal.SIGTERM) is before


def test_other_threads_get_a_flag_that_never_rises():
    seen = []

    def work():
        with stop_on_signals() as stop:
            seen.append(stop.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]


def test_modules_that_commands_need_early_do_not_import_torch():
    names = (
        "cache_tools.process.progress",
        "cache_tools.process.interrupt",
        "student.recipes.student",
        "student.evaluation.metrics",
    )
    code = "; ".join([*(f"import mmkd.{name}" for name in names), "import sys; sys.exit('torch' in sys.modules)"])
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
