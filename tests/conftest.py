"""What several test files share: a tiny demo data set, and a teacher and a cache made from it, once a session."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .forked import Forked

ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("MMKD_")}


@dataclass(frozen=True)
class Result:
    """What a command did."""

    code: int
    out: str
    err: str


def run_command(*arguments: object, timeout_seconds: float = 250) -> Result:
    """Run `mmkd-cache ...` or `mmkd-student ...` as a user would, in a process of its own."""
    program = Path(sys.executable).with_name(str(arguments[0]))
    done = subprocess.run(
        [program, *map(str, arguments[1:])],
        capture_output=True,
        text=True,
        timeout=timeout_seconds,
        env=ENVIRONMENT,
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def run_ok(*arguments: object) -> str:
    """Run a command that must succeed; return its stdout."""
    result = run_command(*arguments)
    assert result.code == 0, result.err[-2000:]
    return result.out


@dataclass(frozen=True)
class Tiny:
    """A tiny demo data set: 14 clips in each of 3 splits, with recipes cut down to seconds."""

    root: Path

    @property
    def data(self) -> list[object]:
        return ["--manifest", self.root / "manifest.jsonl", "--videos", self.root / "videos", "--workers", "0"]

    @property
    def stage_one(self) -> list[object]:
        """Options of teach and build."""
        boxes = ["--boxes", self.root / "bounding_boxes.json"]
        return ["-c", self.root / "teacher.yaml", "-c", self.root / "tiny.yaml", *self.data, *boxes]

    @property
    def experts(self) -> list[object]:
        """Options of build."""
        return [part for name in ("rgb", "flow", "boxes") for part in ("--expert", self.root / "experts" / name)]

    @property
    def stage_two(self) -> list[object]:
        """Options of train and evaluate."""
        return ["-c", self.root / "student.yaml", *self.data, "--cache", self.root / "cache"]


TINY_RECIPE = """
held_out: {fraction: 0.4}
experts:
  rgb: {train: {epochs: 1, warmup_epochs: 0, batch_size: 8}}
  flow: {train: {epochs: 1, warmup_epochs: 0, batch_size: 8}}
  boxes: {train: {epochs: 1, warmup_epochs: 0, batch_size: 8}}
build: {views: 3, shard_rows: 8, batch_views: 8}
"""


@pytest.fixture(scope="session")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Forked"]:
    """A smaller data set, untrained experts, their cache, and builds that start at once; not to be written into."""
    from .forked import Forked

    with Forked(tmp_path_factory.mktemp("quick")) as forked:
        yield forked


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Data set, manifest, three experts (one epoch each) and a cache; tests must not write into it."""
    root = tmp_path_factory.mktemp("tiny")
    ENVIRONMENT["SLURM_TMPDIR"] = str(tmp_path_factory.mktemp("node"))  # copies of targets, not in the user's own
    sizes = ("--train-clips", 14, "--standard-clips", 14, "--compositional-clips", 14)
    run_ok("mmkd-cache", "demo", root, *sizes)
    (root / "tiny.yaml").write_text(TINY_RECIPE)
    splits = [
        part
        for name in ("train", "standard", "compositional")
        for part in ("--split", f"{name}={root / name}.json")
    ]
    run_ok(
        "mmkd-cache",
        "manifest",
        "something-something",
        *splits,
        "--labels",
        root / "labels.json",
        "--dataset",
        "mmkd-demo",
        "-o",
        root / "manifest.jsonl",
    )
    made = Tiny(root)
    for name in ("rgb", "flow", "boxes"):
        run_ok("mmkd-cache", "teach", name, *made.stage_one, "-o", root / "experts" / name)
    run_ok("mmkd-cache", "build", *made.stage_one, *made.experts, "-o", root / "cache")
    return made
