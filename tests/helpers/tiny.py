"""The tiny demo data set that the fixture `tiny` makes: trained experts and a cache, once a session."""

from dataclasses import dataclass
from pathlib import Path


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
