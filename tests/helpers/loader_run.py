"""Training with loader processes, stopped and killed in every way; run as a program, in a session of its own.

Prints a JSON line for each run: how it ended, and the descriptors and loader processes that were left. The last run
says that it is at work, and is killed by whoever started this program. Arguments: a folder for the runs.
"""

import gc
import json
import logging
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from mmkd.data_manifests.errors import MmkdError
from mmkd.student.networks.networks import build_network
from mmkd.student.recipes.train import TrainRecipe
from mmkd.student.training.checkpoint import latest_checkpoint
from mmkd.student.training.loop import fit
from tests.helpers.moving_bars import MovingBars
from tests.helpers.processes import open_files

RECIPE = TrainRecipe(
    network="small3d", epochs=3, batch_size=4, learning_rate=1e-3, loader_processes=2, prefetch_batches=1
)
AT_STEP = 8
"""The step, counted from 1, in which something happens; there are 5 in an epoch."""


def loaders() -> list[int]:
    """The ids of this process's loader processes, which are the server's children."""
    return [process.pid for process in multiprocessing.active_children() if process.pid]


def to_the_group(number: signal.Signals) -> None:
    os.killpg(0, number)


def to_a_loader(number: signal.Signals) -> None:
    os.kill(loaders()[0], number)


def tell_and_wait(_: signal.Signals) -> None:
    print(json.dumps({"at_work": loaders()}), flush=True)
    time.sleep(600)


def least_files(wanted: int, seconds: float) -> int:
    """How many files are open, once they are as few as wanted, or the least in so many seconds.

    The threads that feed queues close their pipes when they get to run. Garbage goes first: an error knows queues.
    """
    gc.collect()
    least, until = open_files(), time.monotonic() + seconds
    while least > wanted and time.monotonic() < until:
        time.sleep(0.05)
        least = min(least, open_files())
    return least


def train(run_dir: Path, recipe: TrainRecipe = RECIPE, do=None, number=signal.SIGKILL) -> torch.nn.Module:
    """Train; at step AT_STEP call `do(number)` while batches are read ahead."""
    network = build_network(recipe, heads={"direction": 4}, modality="rgb")
    steps = []

    def count(*_: object) -> None:
        steps.append(1)
        if do is not None and len(steps) == AT_STEP:
            do(number)

    network.register_forward_pre_hook(count)
    fit(network, MovingBars(20, views=3), recipe, run_dir=run_dir, progress=False)
    return network


def state(network: torch.nn.Module) -> list[np.ndarray]:
    return [value.numpy() for value in network.state_dict().values()]


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(state(a), state(b), strict=True))


def main(root: Path) -> None:
    torch.set_num_threads(1)
    logging.getLogger("mmkd").setLevel(logging.ERROR)
    undisturbed = train(root / "threads", RECIPE.model_copy(update={"loader_processes": 0}))
    print(json.dumps({"what": "processes", "same": same(undisturbed, train(root / "processes"))}), flush=True)
    for what, do, number in (
        ("SIGINT", to_the_group, signal.SIGINT),
        ("SIGTERM", to_the_group, signal.SIGTERM),
        ("loader killed", to_a_loader, signal.SIGKILL),
    ):
        told = {"what": what}
        files = least_files(0, 0.3)
        try:
            train(root / what, do=do, number=number)
        except MmkdError as error:
            told |= {
                "code": error.exit_code,
                "error": str(error),
                "checkpoint": latest_checkpoint(root / what).name,
            }
        told |= {"loaders": loaders(), "files": least_files(files, 5) - files}
        told["same"] = same(undisturbed, train(root / what))
        print(json.dumps(told), flush=True)
    train(root / "killed", do=tell_and_wait)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
