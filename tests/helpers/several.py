"""A run of the loop as one of several processes: `python -m tests.helpers.several OUT [OPTIONS]`."""

import json
import os
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch

from mmkd.data_manifests.errors import MmkdError, VideoError
from mmkd.student.recipes.loss import LossOptions
from mmkd.student.recipes.train import TrainRecipe
from mmkd.student.training.loop import fit
from mmkd.student.training.ranks import joined
from tests.helpers.array_targets import ArrayTargets
from tests.helpers.moving_bars import MovingBars
from tests.helpers.places import ROOT
from tests.helpers.plain_network import plain

RECIPE = {"network": "small3d", "epochs": 3, "batch_size": 7, "learning_rate": 1e-2, "optimizer": "sgd"}
RECIPE |= {"loader_threads": 1, "prefetch_batches": 1, "clip_norm": 1e9}


class Ending(MovingBars):
    """Sends this process a signal when an item is read for the given time."""

    def __init__(self, *args, at, number, faulty=False, **options):
        super().__init__(*args, **options)
        self.reads_left, self.number, self.faulty = at, number, faulty

    def item(self, row, view):
        self.reads_left -= 1
        if self.reads_left == 0:
            os.kill(os.getpid(), self.number)
        if self.faulty:
            raise VideoError("broken")
        return super().item(row, view)


def equal_epochs(ranks, network):
    """A validation by which the first epoch is the best; the first process alone asks, as batch norms differ."""
    assert ranks.is_first, "another process validates, too, and may find another best epoch"
    return {"direction": {"top1": 0.5, "nll": 0.1}}


def work(out, options):
    """Train in this process, as one of several where the environment says so."""
    torch.set_num_threads(1)
    logits = np.random.default_rng(0).normal(size=(26, 2, 4)).astype(np.float32)
    logits[[1, 2, 3, 7, 20]] = np.nan
    with joined(torch.device("cpu")) as ranks:
        at = options.get("at", {}).get(str(ranks.rank), 0)
        faulty = options.get("fault") == ranks.rank
        dataset = Ending(26, views=2, at=at, number=options.get("signal", signal.SIGUSR1), faulty=faulty)
        dataset.labels["direction"] = np.where(np.arange(26) % 5 == 3, -1, dataset.classes)
        network = plain()
        if options.get("unused"):
            network.extra = torch.nn.Linear(3, 3)
        report = fit(
            network,
            dataset,
            TrainRecipe(**RECIPE | options.get("recipe", {})),
            targets=ArrayTargets({"direction": logits}),
            loss=LossOptions(label_weight=0.4, temperature=2.0, without_target="label-only"),
            run_dir=out,
            ranks=ranks,
            validate=partial(equal_epochs, ranks) if options.get("validate") else None,
            progress=False,
        )
    if ranks.is_first:
        torch.save(network.state_dict(), out / "weights.pt")
        (out / "report.json").write_text(json.dumps({"loss": report.final_loss, "resumed_at": report.resumed_at}))


def start(out, *, count, options=None):
    """Start `count` processes and return them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.helpers.several", out, json.dumps(options or {})]
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    own = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    return [subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True) for env in own]


def finish(processes):
    """Wait for them, and return their exit codes and what they said."""
    said = [process.communicate(timeout=120)[1] for process in processes]
    return [process.returncode for process in processes], said


if __name__ == "__main__":
    try:
        work(Path(sys.argv[1]), json.loads(sys.argv[2]))
    except MmkdError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
