"""A demo for benchmarks: a finished `make demo`, or a small one made for a while, opened as stage two opens it."""

import argparse
import os
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from mmkd.cache_tools.cache.reader import CacheReader
from mmkd.cache_tools.frames.clip_set import ClipSet, DataRecipe
from mmkd.student.data.split_data import SplitData, open_split
from mmkd.student.recipes.student import Missing
from mmkd.student.teacher.cached_targets import CachedTargets, shared_targets
from mmkd.student.teacher.cached_teacher import choose_mixtures
from mmkd.student.teacher.mixing import HeadMixtures


@dataclass(frozen=True)
class Place:
    """Where a demo lies."""

    root: Path
    """Manifest, videos, boxes and recipes."""
    cache: Path
    """The cache."""
    experts: Path
    """A folder of experts."""
    copies: Path
    """The node's copies of mixed targets."""

    def options(self) -> list[str]:
        """Return them for another process's command line."""
        named = ("--cache", self.cache, "--experts", self.experts, "--copies", self.copies)
        return [str(self.root), *map(str, named)]


@dataclass(frozen=True)
class StageTwo:
    """What a student learns from."""

    reader: CacheReader
    """The cache."""
    clip_set: ClipSet
    """Manifest and videos."""
    split: SplitData
    """The training clips, under their stored views."""
    mixtures: HeadMixtures
    """The teacher."""
    cached: CachedTargets
    """Its targets."""


def open_stage_two(
    place: Place,
    *,
    clips: int | None,
    weights: str = "uniform",
    missing: Missing = "renormalise",
    memory_bytes: int = 2**30,
) -> StageTwo:
    """Open the first `clips` training clips, keeping at most `memory_bytes` of decoded frames."""
    data = DataRecipe(manifest=place.root / "manifest.jsonl", videos=place.root / "videos", workers=0)
    reader, clip_set = CacheReader(place.cache), ClipSet(data)
    train = reader.init.train_split
    only = None if clips is None else {clip.clip_id for clip in clip_set.manifest.split(train)[:clips]}
    split = open_split(reader, clip_set, train, memory_bytes=memory_bytes, only=only)
    mixtures, _ = choose_mixtures(reader, weights, weights_temperature=1, train_split=train)
    cached = shared_targets(reader, train, mixtures, missing=missing, rows=split.rows, directory=place.copies)
    return StageTwo(reader, clip_set, split, mixtures, cached)


def place_options(description: str, *, clips: int = 128) -> argparse.ArgumentParser:
    """Return a parser with the options of `chosen_place`, and how many training clips to take."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("root", nargs="?", type=Path, help="a finished `make demo` [default: a small one is made]")
    parser.add_argument("--cache", type=Path, help="[default: ROOT/seed-0/cache]")
    parser.add_argument("--experts", type=Path, help="[default: ROOT/seed-0/experts]")
    parser.add_argument("--copies", type=Path, help="[default: in the system's temporary folder]")
    parser.add_argument("--clips", type=int, default=clips, help="training clips to take")
    return parser


@contextmanager
def chosen_place(options: argparse.Namespace) -> Iterator[Place]:
    """Return where the options say that a demo lies, or make a small one, with untrained experts, for a while."""
    with tempfile.TemporaryDirectory() as folder:
        copies = options.copies or Path(folder) / "copies"
        if options.root is not None:
            seed = options.root / "seed-0"
            yield Place(options.root, options.cache or seed / "cache", options.experts or seed / "experts", copies)
            return
        place = Place(Path(folder), Path(folder) / "cache", Path(folder) / "experts", copies)
        make_place(place, clips=options.clips)
        yield place


def make_place(place: Place, *, clips: int, views: int = 2) -> None:
    """Write a demo with untrained experts and their cache."""
    from mmkd.pipeline.build.build import build_cache
    from tests.benchmarks.build import make_data, untrained_experts

    recipe = make_data(place.root, clips, {"build.views": views, "data.workers": 1})
    build_cache(recipe, untrained_experts(place.experts, recipe), place.cache)


def machine() -> str:
    """Return what the figures are measured on."""
    load, threads = ", ".join(f"{value:.1f}" for value in os.getloadavg()), torch.get_num_threads()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    cores = f"{platform.machine()}, {os.cpu_count()} cores{gpu}"
    return f"{cores}, torch {torch.__version__}, {threads} threads, load {load}"
