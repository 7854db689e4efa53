"""A process that has everything imported and forks a child for each command: real processes at no start-up cost.

Run by `forked.py` as a program. It reads a JSON line for each order on stdin and answers with one on stdout:

    {"make": ROOT}                          a small data set and untrained experts in ROOT, see `quick_world.py`
    {"start": [ARGUMENT...], "log": PATH, "faults": {...}}   fork, run the command line there; answers {"pid": N}
    {"wait": PID}                           answers {"code": N}, negative for the signal that ended the child
    {"wait_stopped": PID}                   likewise, or {"code": null} once the child stopped itself

No thread is started and no tensor computed before the last fork, so that children may do as they like.
"""

import json
import os
import sys
from pathlib import Path

import torch

import mmkd.pipeline.build.build
import mmkd.pipeline.cli
import mmkd.pipeline.experts.teacher
from mmkd.cache_tools.process import command  # noqa: F401 - as above

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.helpers import faults, quick_world


def run_child(arguments: list[str], log: str, wanted: dict) -> None:
    """Become the command; never returns."""
    for descriptor, mode in ((1, ".out"), (2, ".err")):
        file = os.open(log + mode, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
    code = 1
    try:
        torch.set_num_threads(1)
        faults.install(wanted)
        sys.argv = ["mmkd-cache", *arguments]
        mmkd.pipeline.cli.main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def start(order: dict) -> dict:
    """Fork."""
    pid = os.fork()
    if pid == 0:
        run_child(order["start"], order["log"], order["faults"])
    return {"pid": pid}


def make(root: str) -> dict:
    """Make the small world in a child, which may use threads."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            quick_world.make(Path(root))
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    return wait(pid)


def wait(pid: int, options: int = 0) -> dict:
    """Wait for a child."""
    _, status = os.waitpid(pid, options)
    return {"code": None if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status)}


for line in sys.stdin:
    received = json.loads(line)
    if "make" in received:
        answer = make(received["make"])
    elif "start" in received:
        answer = start(received)
    elif "wait" in received:
        answer = wait(received["wait"])
    else:
        answer = wait(received["wait_stopped"], os.WUNTRACED)
    print(json.dumps(answer), flush=True)
