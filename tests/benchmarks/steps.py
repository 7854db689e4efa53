"""One training step on labels alone, on cached targets, and with a live teacher: time and peak memory, in one run.

    python tests/benchmarks/steps.py [ROOT] [--cache DIR] [--experts DIR] [--clips N] [--steps N] [--live-steps N]
        [--batch N] [--threads N]

ROOT is a finished `make demo`; without it a small demo with untrained experts is made. All train the demo's student
from the same weights on the same batches, which lie read in memory. They take turns, batch by batch, and every
other time in the other order, so that other work on the machine meets them all; the ratios are medians, with their
quartiles, of each batch's own. CPU time is that of all threads. The live teacher decodes, computes flow and runs
the experts for each batch. Memory is the resident peak of a process of its own that does a few steps, by
/proc/self/status. The aim: cached targets within 2 % of labels alone.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from mmkd.cache_tools.recipes.recipe import load_recipe
from mmkd.student.data.batches import Batch, Schedule
from mmkd.student.data.reading import Reading, read_batches
from mmkd.student.networks.networks import build_network
from mmkd.student.recipes.student import StudentRecipe
from mmkd.student.teacher.targets import TargetSource
from mmkd.student.training.devices import keep_freed_memory, reproducible
from mmkd.student.training.ranks import ALONE
from mmkd.student.training.run import Run
from mmkd.student.training.watch import NOBODY
from tests.helpers.demo_place import Place, StageTwo, chosen_place, machine, open_stage_two, place_options
from tests.helpers.processes import memory_kib

LABELS, CACHED, LIVE = "labels", "cached", "live"
NAMES = {LABELS: "labels alone", CACHED: "cached targets", LIVE: "live teacher"}
WARM, MEMORY_STEPS = 3, 6
CPU = torch.device("cpu")


def source_of(kind: str, place: Place, data: StageTwo) -> TargetSource | None:
    """Return the targets of a kind of run; experts and what they need are imported for the live one alone."""
    if kind != LIVE:
        return data.cached if kind == CACHED else None
    from tests.benchmarks.live_teacher import open_live

    return open_live(place, data)


def run_of(kind: str, place: Place, data: StageTwo, batch: int) -> Run:
    """Return a run of the demo's student."""
    named = {"data.manifest": str(place.root / "manifest.jsonl"), "data.videos": str(place.root / "videos")}
    recipe = load_recipe(StudentRecipe, files=[place.root / "student.yaml"], named=named)
    train = recipe.train.model_copy(update={"batch_size": batch, "epochs": 10_000})
    torch.manual_seed(0)
    network = build_network(
        train, heads={head.name: len(head.classes) for head in data.reader.heads}, modality="rgb"
    )
    return Run(
        network,
        data.split.data,
        train,
        targets=source_of(kind, place, data),
        loss=recipe.loss_options(),
        device=CPU,
        ranks=ALONE,
        watch=NOBODY,
    )


def batches_of(data: StageTwo, batch: int, count: int) -> list[Batch]:
    """Read the first batches of a run."""
    clips = data.split.data
    steps = Schedule(clips.rows, clips.views, batch, seed=0).steps(0, count)
    return list(read_batches(clips, steps, Reading(threads=1, processes=0, ahead=0), views=count * batch))


def timed(run: Run, batch: Batch) -> tuple[float, float]:
    """Do a step and all that it leaves to be read late; return its seconds of the wall and of the processor."""
    wall, cpu = time.perf_counter(), time.process_time()
    run.step(batch)
    run._settle(keep=0)
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(place: Place, options: argparse.Namespace) -> tuple[dict[str, list[tuple[float, float] | None]], Run]:
    """Return kind -> seconds of each step (None where it was left out), and the live run."""
    data = open_stage_two(place, clips=options.clips)
    batches = batches_of(data, options.batch, WARM + options.steps)
    runs = {kind: run_of(kind, place, data, options.batch) for kind in NAMES}
    seconds: dict[str, list[tuple[float, float] | None]] = {kind: [] for kind in NAMES}
    with reproducible(CPU):
        for number, batch in enumerate(batches):
            order = [LABELS, CACHED] if number % 2 else [CACHED, LABELS]
            if number == 0 or WARM <= number < WARM + options.live_steps:
                order.append(LIVE)
            else:
                seconds[LIVE].append(None)
            for kind in order:
                seconds[kind].append(timed(runs[kind], batch))
            if number == 0:
                runs[LIVE].targets.seconds.clear()
    return {kind: found[WARM:] for kind, found in seconds.items()}, runs[LIVE]


def print_times(seconds: dict[str, list[tuple[float, float] | None]]) -> None:
    """Print medians, and the ratios of each batch's steps to the one on labels alone."""
    print(f"{'one step':16}{'wall, ms':>12}{'CPU, ms':>12}   of labels alone, same batch: median (quartiles)")
    for kind, found in seconds.items():
        pairs = [(own, base) for own, base in zip(found, seconds[LABELS], strict=True) if own and base]
        wall, cpu = (np.array([[own[i], base[i]] for own, base in pairs]) for i in (0, 1))
        line = f"{NAMES[kind]:16}{1e3 * np.median(wall[:, 0]):12.1f}{1e3 * np.median(cpu[:, 0]):12.1f}"
        if kind != LABELS:
            for name, values in (("wall", wall), ("CPU", cpu)):
                low, middle, high = np.quantile(values[:, 0] / values[:, 1], [0.25, 0.5, 0.75])
                line += f"   {name} {middle:.3f} ({low:.3f} to {high:.3f})"
        print(line)


def steps_in_own_process(kind: str, place: Place, options: argparse.Namespace) -> None:
    """Do a few steps of one kind and print the memory that they took."""
    data = open_stage_two(place, clips=options.clips)
    run = run_of(kind, place, data, options.batch)
    batches = batches_of(data, options.batch, MEMORY_STEPS)
    before = memory_kib()["now"]
    with reproducible(CPU):
        for batch in batches:
            run.step(batch)
    print(json.dumps({"before": before, "peak": memory_kib()["peak"]}))


def print_memory(place: Place, options: argparse.Namespace) -> None:
    """Print the peaks of processes that do nothing else."""
    print(f"{'peak memory':16}{'MiB':>12}{'of labels':>12}{'before the steps, MiB':>26}")
    base = None
    for kind, name in NAMES.items():
        asked = [*place.options(), "--clips", options.clips, "--batch", options.batch, "--threads", options.threads]
        command = [sys.executable, __file__, *map(str, asked), "--alone", kind]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        base = base or found["peak"]
        print(f"{name:16}{found['peak'] / 1024:12.0f}{found['peak'] / base:12.3f}{found['before'] / 1024:26.0f}")


def main() -> None:
    """Print both tables."""
    parser = place_options("a training step on labels, on cached targets, with a live teacher", clips=256)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--live-steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--alone", choices=NAMES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    with chosen_place(options) as place:
        if options.alone:
            steps_in_own_process(options.alone, place, options)
            return
        print(f"{machine()}; batches of {options.batch}")
        seconds, live = measure(place, options)
        print_times(seconds)
        each = 1e3 / (options.live_steps * options.batch)
        parts = ", ".join(f"{part} {each * value:.1f}" for part, value in live.targets.seconds.items())
        print(f"of the live step, ms a clip: {parts}")
        print_memory(place, options)
        print(f"load after: {', '.join(f'{value:.1f}' for value in os.getloadavg())}")


if __name__ == "__main__":
    main()
