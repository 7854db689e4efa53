"""Options and manifests of the tiny data set, with parts exchanged for bad ones."""

import json
from pathlib import Path
from typing import Any

from tests.helpers.tiny import Tiny

SHORT = ["--set", "train.epochs=1", "--set", "train.warmup_epochs=0", "--weights", "uniform"]


def rows_of(manifest: Path) -> list[dict[str, Any]]:
    """The manifest's JSON lines, the header first."""
    return [json.loads(line) for line in manifest.read_text().splitlines()]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def stage_one(tiny: Tiny, **other: object) -> list[object]:
    """Options of teach and build with some paths replaced; decoding in this process."""
    paths = {
        "manifest": tiny.root / "manifest.jsonl",
        "videos": tiny.root / "videos",
        "boxes": tiny.root / "bounding_boxes.json",
    }
    named = [part for name, path in (paths | other).items() for part in (f"--{name}", path)]
    return ["-c", tiny.root / "teacher.yaml", "-c", tiny.root / "tiny.yaml", *named, "--workers", 0]


def expert(tiny: Tiny, *names: str) -> list[object]:
    return [part for name in names for part in ("--expert", tiny.root / "experts" / name)]
