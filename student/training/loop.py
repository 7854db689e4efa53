"""The training loop: a network, a data set and, optionally, targets; it knows no modality.

Everything random in step k is drawn from a seed made of the run's seed and k, and the order of clips and
views is a function of the seed, so a run that was stopped and resumed ends with the same bits as an
undisturbed one (on one device type, thread count and set of versions). One step is `mmkd.student.training.run`'s.
"""

import hashlib
import math
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmkd.cache_tools.process.interrupt import StopRequest, stop_on_signals
from mmkd.cache_tools.tasks.folder_lock import FolderLock
from mmkd.data_manifests.counted import counted
from mmkd.data_manifests.errors import InputError, InterruptedByUserError
from mmkd.student.data.batches import ViewDataset
from mmkd.student.recipes.loop import WITHOUT_EFFECT, LoopRecipe
from mmkd.student.recipes.loss import LossOptions
from mmkd.student.teacher.targets import TargetSource
from mmkd.student.training.best import Validate
from mmkd.student.training.checkpoint import INITIAL_WEIGHTS, encode_network
from mmkd.student.training.devices import keep_freed_memory, repeating_gradients, reproducible, sound_kernels
from mmkd.student.training.ranks import ALONE, Ranks, told_when_lost
from mmkd.student.training.run import Run
from mmkd.student.training.watch import KEEPING, NOBODY, Watch, part

OTHER_STOPPED = (
    "stopped: another process of this run was asked to; all is kept; run the same command again to go on"
)


@dataclass(frozen=True)
class FitReport:
    """What a run of the loop did."""

    steps: int
    """Steps of the whole run, among them those that earlier, stopped runs did."""
    resumed_at: int
    """Steps that were there already when this run began."""
    final_loss: float
    """Mean training loss over the clips of the last epoch; NaN where its metrics are lost."""
    seconds: float
    """Time that this run took."""
    clips_per_second: float
    """Training rate of this run; 0 when nothing was left to do."""


def fit(
    network: nn.Module,
    dataset: ViewDataset,
    recipe: LoopRecipe,
    *,
    targets: TargetSource | None = None,
    loss: LossOptions | None = None,
    run_dir: Path | None = None,
    lock: FolderLock | None = None,
    device: torch.device | str = "cpu",
    identity: Mapping[str, Any] | None = None,
    other_start: bool = False,
    validate: Validate | None = None,
    ranks: Ranks = ALONE,
    watch: Watch = NOBODY,
    progress: bool = True,
    what: str = "training",
) -> FitReport:
    """Train `network` (inputs dict -> logits per head) in place, continuing from `run_dir`'s checkpoint if any.

    Without `targets` it learns from labels alone. `identity` (JSON values) is all that could change a number
    and that the loop cannot see, e.g. the cache's fingerprint: a checkpoint of another identity is refused. `lock`
    is the hold on the run's folder: it is looked at before each write there. `other_start` says that the network
    does not have its initial weights, so that a checkpoint must be there, and is not asked for them. `validate`
    tells after each epoch how the network does on held-out clips: the run leaves the weights of the best epoch,
    unless the recipe keeps the last; without it the last ones (averaged ones, if the recipe averages).
    `watch` is told of each step.
    Raises InterruptedByUserError after a clean stop, InputError for a data set without anything to learn from
    or a loss that is not finite.
    """
    device = torch.device(device)
    if device.type == "cpu":
        keep_freed_memory()
    loss = LossOptions() if loss is None else loss
    check_dataset(dataset, needs_labels=targets is None)
    check_validation(recipe, validate)
    run_identity = describe_run(network, dataset, recipe, loss=loss if targets else None, extra=identity)
    if other_start:
        del run_identity[INITIAL_WEIGHTS]
    run = Run(
        network.to(device), dataset, recipe, targets=targets, loss=loss, device=device, ranks=ranks, watch=watch
    )
    run.open(run_dir, run_identity, lock)
    resumed_at, began = run.position.step, time.perf_counter()
    with (
        closing(run),
        stop_on_signals() as stop,
        reproducible(device, recipe.precision_mode),
        repeating_gradients(device, recipe.precision_mode),
        sound_kernels(device, recipe.precision),
        run.show(what, progress and ranks.is_first) as bar,
        closing(run.batches_left()) as batches,  # what reads them ends here, also on a stop or a fault
        watch.over(run.position.step, run.total_steps),
    ):
        while not run.is_over:
            for batch in run.of_epoch(batches):
                with told_when_lost(ranks):
                    run.step(batch, stop=stop.requested)
                watch.step_done()
                bar.advance(run.clips_of_step, note=run.note)
                if run.is_within_epoch:  # its end comes first where this was its last step
                    stop_if_asked(run, stop)
                    with part(KEEPING):
                        run.save_sometimes()
            with part(KEEPING):
                run.end_epoch(validate)
                run.save()
            stop_if_asked(run, stop)
        rate = bar.units_per_second
    run.leave_weights()
    network.eval()
    seconds = time.perf_counter() - began
    final_loss = run.metrics[-1].loss if run.metrics else math.nan
    return FitReport(run.position.step, resumed_at, final_loss, seconds, rate)


def stop_if_asked(run: Run, stop: StopRequest) -> None:
    """Save the run and raise InterruptedByUserError, if this process or another of the run was asked to stop."""
    if run.shall_stop(stop.requested):
        run.save()
        stop.check(f"{run.position.step} of {counted(run.total_steps, 'step')} are kept")
        raise InterruptedByUserError(OTHER_STOPPED)


def check_validation(recipe: LoopRecipe, validate: Validate | None) -> None:
    """Raise InputError for a recipe that needs held-out clips where there are none."""
    if validate is None and (asked := recipe.asks_for_held_out()):
        raise InputError(f"{asked} needs clips that tell the best epoch: set train.held_out, or leave it out")


def describe_run(
    network: nn.Module,
    dataset: ViewDataset,
    recipe: LoopRecipe,
    *,
    loss: LossOptions | None,
    extra: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return the fields that a checkpoint must share with a run that resumes it: contents, never paths."""
    ids = "\n".join(dataset.clip_ids).encode()
    labels = {head: hashlib.sha256(values.tobytes()).hexdigest() for head, values in dataset.labels.items()}
    return {
        "recipe": recipe.model_dump(mode="json", exclude={*WITHOUT_EFFECT, "weights"}),
        "loss": None if loss is None else loss.model_dump(mode="json"),
        "clips": {"count": dataset.rows, "sha256": hashlib.sha256(ids).hexdigest(), "views": dataset.views},
        "labels": labels,
        INITIAL_WEIGHTS: hashlib.sha256(encode_network(network)).hexdigest(),
        "extra": dict(extra or {}),
    }


def check_dataset(dataset: ViewDataset, *, needs_labels: bool) -> None:
    """Raise InputError for a data set that nothing can be learned from."""
    if dataset.rows == 0:
        raise InputError("there is no clip to train on")
    for head, labels in dataset.labels.items():
        if needs_labels and not (labels >= 0).any():
            raise InputError(f"no training clip has a label of head {head!r}; give targets or labels")
