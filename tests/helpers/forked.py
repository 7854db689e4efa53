"""Builds in real processes that start in milliseconds: the tests' side of `fork_server.py`."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.commands import ENVIRONMENT, Result

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


@dataclass(frozen=True)
class Child:
    """A command at work."""

    server: "Forked"
    pid: int
    log: Path

    def wait(self, *, at_most_stopped: bool = False) -> Result | None:
        """Wait for its end; or, if asked for, until it stops itself, which gives None."""
        code = self.server.order(**{"wait_stopped" if at_most_stopped else "wait": self.pid})["code"]
        if code is None:
            return None
        return Result(code, *(Path(f"{self.log}{end}").read_text() for end in (".out", ".err")))

    def wait_stopped(self) -> None:
        """Wait until the child stopped itself."""
        ended = self.wait(at_most_stopped=True)
        assert ended is None, f"ended with {ended}, never stopped"

    def go_on(self) -> None:
        """Wake a stopped child."""
        os.kill(self.pid, signal.SIGCONT)

    @property
    def seconds_of_processor(self) -> float:
        """Time it used so far; a child that waits uses none."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Forked:
    """The server, the small world below `root`, and a finished cache of it in `root/cache`."""

    def __init__(self, root: Path) -> None:
        self.root, self._number = root, 0
        self._server = subprocess.Popen(
            [sys.executable, "-P", Path(__file__).with_name("fork_server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT | ONE_THREAD,
        )

    def __enter__(self) -> "Forked":
        try:
            assert self.order(make=str(self.root)) == {"code": 0}
            result = self.build(self.cache)
            assert result.code == 0, result.err
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stdin.close()
        self._server.wait(60)
        self._server.stdout.close()

    def order(self, **order: object) -> dict:
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        line = self._server.stdout.readline()
        assert line, f"the fork server died of {order}"
        return json.loads(line)

    @property
    def cache(self) -> Path:
        """The cache of an undisturbed build; tests must not write into it."""
        return self.root / "cache"

    def copy(self, out: Path) -> Path:
        """Return a copy of the finished cache without its journal."""
        return shutil.copytree(self.cache, out, ignore=shutil.ignore_patterns("journal"))

    def options(self, *experts: str) -> list[object]:
        """Options of build; all experts without a name."""
        files = ["-c", self.root / "teacher.yaml", "--manifest", self.root / "manifest.jsonl"]
        files += ["--videos", self.root / "videos", "--boxes", self.root / "bounding_boxes.json"]
        chosen = [part for name in experts or ("rgb", "boxes") for part in ("--expert", self.expert(name))]
        return [*files, "--workers", 0, *chosen]

    def expert(self, name: str) -> Path:
        """Directory of an expert: `rgb`, `boxes`, or `other`, which is another `rgb`."""
        return self.root / "experts" / name

    def start(self, *arguments: object, faults: dict | None = None) -> Child:
        """Start `mmkd-cache ARGUMENTS`."""
        self._number += 1
        log = self.root / f"log-{self._number}"
        answer = self.order(start=[str(part) for part in arguments], log=str(log), faults=faults or {})
        return Child(self, answer["pid"], log)

    def run(self, *arguments: object, faults: dict | None = None) -> Result:
        """Run `mmkd-cache ARGUMENTS` to its end."""
        return self.start(*arguments, faults=faults).wait()

    def start_build(
        self, out: Path, *more: object, experts: tuple[str, ...] = (), faults: dict | None = None
    ) -> Child:
        """Start a build into `out`; `more` options come last, so that they override."""
        return self.start("build", *self.options(*experts), "-o", out, *more, faults=faults)

    def build(self, out: Path, *more: object, experts: tuple[str, ...] = (), faults: dict | None = None) -> Result:
        """Build into `out`."""
        return self.start_build(out, *more, experts=experts, faults=faults).wait()


def contents(cache: Path) -> dict[str, bytes]:
    """Return every file of a cache but the journal's: key -> bytes."""
    found = (path for path in sorted(cache.rglob("*")) if path.is_file())
    return {
        path.relative_to(cache).as_posix(): path.read_bytes()
        for path in found
        if path.relative_to(cache).parts[0] != "journal"
    }
