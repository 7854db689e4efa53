"""Memory and files over a thousand steps of training with loader processes, and what is left when they are ended.

    python tests/benchmarks/endurance.py [ROOT] [--cache DIR] [--clips N] [--steps N] [--every N] [--batch N]
        [--processes N]

ROOT is a finished `make demo`; without it a small demo is made. First the demo's student trains on cached targets,
its clips decoded again for each step, a checkpoint at each epoch's end: every so many steps the resident memory and
the open files of the trainer and of its loaders are looked at. Growth is that of the mean of the last quarter over
the mean of the second one; the aim is none. Then tests/helpers/loader_run.py trains anew for each of Ctrl-C and
SIGTERM (to the whole group), SIGKILL of a loader and SIGKILL of the trainer, in a session and with a folder for
temporary files of its own: what of processes, open files, files and shared memory is left behind is counted.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from mmkd.cache_tools.recipes.recipe import load_recipe
from mmkd.student.networks.networks import build_network
from mmkd.student.recipes.student import StudentRecipe
from mmkd.student.training.loop import fit
from mmkd.student.training.watch import Watch
from tests.helpers.demo_place import Place, chosen_place, machine, open_stage_two, place_options
from tests.helpers.places import ROOT
from tests.helpers.processes import memory_kib, open_files, session

SHARED_MEMORY = Path("/dev/shm")
GONE_SECONDS = 60.0


class Meter(Watch):
    """Looks at memory and files every so many steps."""

    def __init__(self, every: int) -> None:
        """Look at steps `every`, 2 `every`, ..."""
        self.every, self.steps = every, 0
        self.rows: list[list[int]] = []
        """Step, then KiB and files of the trainer, then the most of both of any loader."""

    def step_done(self) -> None:
        """Count a step."""
        self.steps += 1
        if self.steps % self.every == 0:
            loaders = [process.pid for process in multiprocessing.active_children()]
            most = [max(map(look, loaders), default=0) for look in (lambda pid: memory_kib(pid)["now"], open_files)]
            self.rows.append([self.steps, memory_kib()["now"], open_files(), *most])


def train(place: Place, folder: Path, options: argparse.Namespace) -> Meter:
    """Train for so many steps, and look."""
    data = open_stage_two(place, clips=options.clips, memory_bytes=0)
    named = {"data.manifest": str(place.root / "manifest.jsonl"), "data.videos": str(place.root / "videos")}
    recipe = load_recipe(StudentRecipe, files=[place.root / "student.yaml"], named=named)
    each = -(-data.split.data.rows // options.batch)
    changes = {"batch_size": options.batch, "epochs": -(-options.steps // each), "warmup_epochs": 0}
    own = recipe.train.model_copy(update=changes | {"loader_processes": options.processes})
    heads = {head.name: len(head.classes) for head in data.reader.heads}
    network, meter = build_network(own, heads=heads, modality="rgb"), Meter(options.every)
    loss = recipe.loss_options()
    fit(network, data.split.data, own, targets=data.cached, loss=loss, run_dir=folder, watch=meter, progress=False)
    return meter


def print_memory(meter: Meter) -> None:
    """Print what was seen, and how much it grew."""
    rows = np.array(meter.rows, np.float64)
    print(f"{'step':>8}{'trainer, MiB':>14}{'files':>8}{'largest loader, MiB':>21}{'files':>8}")
    for step, trainer, files, loader, its_files in rows[:: max(1, len(rows) // 10)]:
        print(f"{step:8.0f}{trainer / 1024:14.1f}{files:8.0f}{loader / 1024:21.1f}{its_files:8.0f}")
    quarters = np.array_split(rows, 4)
    before, after = quarters[min(1, len(rows) - 1)].mean(0), quarters[-1].mean(0) if len(rows) > 3 else rows[-1]
    growth = after - before
    print(f"growth over {growth[0]:.0f} steps:", end="")
    for name, memory, files in (("trainer", 1, 2), ("loader", 3, 4)):
        share = 100 * growth[memory] / max(before[memory], 1)
        print(f" {name} {growth[memory] / 1024:+.2f} MiB ({share:+.2f} %), {growth[files]:+.1f} files;", end="")
    print()


def names_in(folder: Path) -> set[str]:
    """Return what lies in a folder, empty where there is none."""
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def end_them(folder: Path) -> tuple[list[dict], dict]:
    """Let a program end its training in every way; return what it says, and what is left when it was killed."""
    temporary, lines, killed = folder / "temporary", [], {}
    temporary.mkdir()
    before = names_in(SHARED_MEMORY)
    with subprocess.Popen(
        [sys.executable, ROOT / "tests/helpers/loader_run.py", folder / "runs"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)},
    ) as program:
        for line in program.stdout:
            found = json.loads(line)
            if "at_work" in found:
                killed["processes at work"] = len(session(program.pid))
                program.kill()
            else:
                lines.append(found)
    began = time.monotonic()
    while session(program.pid) and time.monotonic() < began + GONE_SECONDS:
        time.sleep(0.02)
    killed["seconds until they are gone"] = round(time.monotonic() - began, 2)
    killed["processes left"] = len(session(program.pid))
    killed["shared-memory segments left"] = sorted(names_in(SHARED_MEMORY) - before)
    killed["temporary files left"] = sorted(names_in(temporary))
    return lines, killed


def print_ends(lines: list[dict], killed: dict) -> None:
    """Print what was left behind."""
    print(f"{'ended by':18}{'exit code':>10}{'loaders left':>14}{'files left open':>17}  goes on to the same bits")
    for found in lines:
        if "code" in found:
            files = max(found["files"], 0)
            print(f"{found['what']:18}{found['code']:10}{len(found['loaders']):14}{files:17}  {found['same']}")
    print("the trainer killed: " + ", ".join(f"{name} {value}" for name, value in killed.items()))


def main() -> None:
    """Print both."""
    parser = place_options("memory over many steps, and what is left when training is ended", clips=112)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with chosen_place(options) as place:
            began = time.perf_counter()
            meter = train(place, folder / "run", options)
        print(f"{meter.steps} steps of {options.batch} clips in {time.perf_counter() - began:.0f} s")
        print_memory(meter)
        print_ends(*end_them(folder))
    print(f"load after: {', '.join(f'{value:.1f}' for value in os.getloadavg())}")


if __name__ == "__main__":
    main()
