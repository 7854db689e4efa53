"""What a student is worth by the views in its cache and by the frames that it sees: the demo's, side by side.

    python tests/benchmarks/students.py DEMO [--seeds 0 1 2] [--epochs N] [--views 1 2 ...]

After `make demo` (or `make seeds`) in the folder DEMO. One cache grows from one view of each training clip to as
many as there are epochs; at that number each is seen once, so its targets are those of a live teacher that sees a
new view every epoch. All students of a seed have the same recipe, weights, steps and augmentation, and are
evaluated on 1,120 standard and 560 compositional clips that no demo run sees. Then students of the largest cache
that look at fewer or smaller frames of it, with what a view costs them. A run that was stopped goes on.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from mmkd.student.evaluation.trained import TrainedStudent, load_student

BIN = Path(sys.executable).parent
LOOKS: dict[str, dict[str, Any]] = {
    "all frames, 48 px": {},
    "all frames, 32 px": {"size_px": 32},
    "all frames, 24 px": {"size_px": 24},
    "every 2nd, 48 px": {"every": 2},
    "every 2nd, 32 px": {"every": 2, "size_px": 32},
    "every 4th, 48 px": {"every": 4},
}
"""Name -> `train.input`."""
SPLITS = ("standard", "compositional")
Row = dict[str, list[float]]
"""Split -> top-1 in percent of each seed."""


def run(program: str, *arguments: object) -> str:
    """Run a command of ours, its messages shown; return what it prints."""
    command = [str(BIN / program), *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def further_clips(demo: Path) -> list[object]:
    """Return the options that name clips which no demo run sees; they are made where they are not there."""
    folder = demo / "further"
    data: list[object] = ["--manifest", folder / "manifest.jsonl", "--videos", folder / "videos"]
    if not (folder / "manifest.jsonl").exists():
        run("mmkd-cache", "demo", folder, "--standard-clips", 1120, "--compositional-clips", 560)
        splits = [part for name in ("train", *SPLITS) for part in ("--split", f"{name}={folder / name}.json")]
        source = ("--dataset", "mmkd-demo", "--labels", folder / "labels.json", "--videos", folder / "videos")
        run("mmkd-cache", "manifest", "something-something", *source, *splits, "-o", folder / "manifest.jsonl")
    return data


class Seed:
    """One seed's experts, the cache that grows, and its students."""

    def __init__(self, demo: Path, seed: int, epochs: int) -> None:
        """Take what `make demo SEED=seed` left."""
        self.demo, self.seed, self.epochs = demo, seed, epochs
        self.folder = demo / f"seed-{seed}" / "students"
        self.data: list[object] = ["--manifest", demo / "manifest.jsonl", "--videos", demo / "videos"]

    def views(self) -> int:
        """Return how many views of each training clip the cache holds by now."""
        if not (self.folder / "cache").exists():
            return 0
        return int(
            json.loads(run("mmkd-cache", "inspect", self.folder / "cache", "--json"))["splits"]["train"]["views"]
        )

    def grow(self, views: int) -> Path:
        """Let the cache hold at least so many views of each training clip."""
        cache = self.folder / "cache"
        if self.views() < views:
            experts = [
                part
                for name in ("rgb", "flow", "boxes")
                for part in ("--expert", self.demo / f"seed-{self.seed}" / "experts" / name)
            ]
            boxes = ("--boxes", self.demo / "bounding_boxes.json", "--set", "build.shard_views=1")
            recipe = ("-c", self.demo / "teacher.yaml", *self.data, *boxes)
            run("mmkd-cache", "build", *recipe, *experts, "--views", views, "-o", cache)
        return cache

    def student(self, name: str, views: int, *options: object) -> tuple[dict[str, float], Path]:
        """Train a student unless it is there; return split -> top-1 in percent on further clips, and its run."""
        out = self.folder / name
        if not (out / "model.safetensors").exists():
            cache = self.grow(views)
            if (there := self.views()) != views:
                sys.exit(f"{cache} holds {there} views already, and {out} needs {views}: delete {self.folder}")
            length = ("--seed", self.seed, "--set", f"train.epochs={self.epochs}")
            recipe = ("-c", self.demo / "student.yaml", *self.data, "--cache", cache)
            run("mmkd-student", "train", *recipe, *length, *options, "-o", out)
        said = run("mmkd-student", "evaluate", out, *further_clips(self.demo), "--json")
        metrics = json.loads(said)
        return {split: 100 * metrics[split]["action"]["top1"] for split in SPLITS}, out


def cost(student: TrainedStudent) -> tuple[float, float]:
    """Return a view's GMAC, and its milliseconds: the least of five batches of 32, on one thread of the CPU."""
    shape = (32, student.policy.frames, student.policy.size_px, student.policy.size_px, 3)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        student.network({"rgb": pixels[:1]})
    torch.set_num_threads(1)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        student.logits(pixels.numpy())
        seconds.append(time.perf_counter() - start)
    return counter.get_total_flops() / 2e9, min(seconds) / 32 * 1e3


def shown(values: list[float]) -> str:
    """Return mean and spread over seeds."""
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def add(rows: dict[str, Row], name: str, found: dict[str, float]) -> None:
    """Note one seed's result."""
    for split, value in found.items():
        rows.setdefault(name, {}).setdefault(split, []).append(value)


def show(title: str, rows: dict[str, Row], costs: dict[str, str] | None = None) -> None:
    """Print a table."""
    print(f"\n| {title} | standard | compositional |" + (" GMAC, ms a view |" if costs else ""))
    print("|---|---|---|" + ("---|" if costs else ""))
    for name, row in rows.items():
        cells = [name, *(shown(row[split]) for split in SPLITS), *([costs[name]] if costs else [])]
        print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Train what is not there, and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--views", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--looks", type=int, default=len(LOOKS), help="how many of the looks")
    options = parser.parse_args()
    by_views: dict[str, Row] = {}
    by_look: dict[str, Row] = {}
    costs: dict[str, str] = {}
    for number in options.seeds:
        seed = Seed(options.demo, number, options.epochs)
        for views in [*sorted(options.views), options.epochs]:
            live = f"{options.epochs}, a new one every epoch, as of a live teacher"
            found, _ = seed.student(f"views-{views}", views)
            add(by_views, live if views == options.epochs else f"{views}", found)
        baseline, _ = seed.student("baseline", options.epochs, "--labels-only", "--fresh-views")
        add(by_views, "no teacher, a new view every epoch", baseline)
        for place, (name, look) in enumerate(list(LOOKS.items())[: options.looks]):
            asked = ("--set", f"train.input={json.dumps(look)}") if look else ()
            found, out = seed.student(f"look-{place}", options.epochs, *asked)
            add(by_look, name, found)
            gmac, milliseconds = cost(load_student(out))
            costs[name] = f"{gmac:.3f}, {milliseconds:.2f}"
    show(f"views in the cache, {options.epochs} epochs", by_views)
    show("what the student sees", by_look, costs)


if __name__ == "__main__":
    main()
