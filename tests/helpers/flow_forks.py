"""Flow runs in real processes that start in milliseconds, each with a fault of its own; as `fork_server.py` does.

Run as a program it reads a JSON line for each run and forks: {"arguments": [...], "log": PATH, "die_at": N or null,
"limit": BYTES or null}; it answers with the exit code, negative for a signal. Nothing here starts a thread before a
fork, so children may. Imported it is the tests' side.
"""

import importlib
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

PRELOADED = ("mmkd.pipeline.cli", "mmkd.pipeline.flow_command.run", "cv2", "av", "h5py", "torch")


def die_at(change: int) -> None:
    """End this process, as by SIGKILL, at the n-th change of a file."""
    seen = 0

    def audit(name, args):
        nonlocal seen
        writes = name == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or name in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate"):
            seen += 1
            if seen > change:
                os._exit(9)

    sys.addaudithook(audit)


def run_child(order: dict) -> None:
    """Become the command; never returns."""
    from mmkd.pipeline.cli import main

    file = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if order["die_at"] is not None:
        die_at(order["die_at"])
    if order["limit"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["limit"], resource.RLIM_INFINITY))
    code = 1
    try:
        sys.argv = ["mmkd-cache", "flow", *order["arguments"]]
        main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        os._exit(code)


class FlowForks:
    """The server."""

    def __init__(self, root: Path) -> None:
        from tests.helpers.commands import ENVIRONMENT

        self._log = root / "log"
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENCV_FOR_THREADS_NUM"), "1")
        self._server = subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT | threads,
        )

    def run(self, *arguments: object, die_at: int | None = None, limit: int | None = None) -> tuple[int, str]:
        """Return exit code and output of one run of `mmkd-cache flow`."""
        order = {"arguments": [str(a) for a in arguments], "log": str(self._log), "die_at": die_at, "limit": limit}
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        code = int(self._server.stdout.readline())
        return code, self._log.read_text(errors="replace")

    def close(self) -> None:
        """End it."""
        self._server.stdin.close()
        self._server.wait(60)
        self._server.stdout.close()


if __name__ == "__main__":
    for module in PRELOADED:  # once, not in every child: an import may write files, too
        importlib.import_module(module)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            run_child(json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
