"""The training loop: a network, a data set and, optionally, targets; it knows no modality.

Everything random in step k is drawn from a seed made of the run's seed and k, and the order of clips and
views is a function of the seed, so a run that was stopped and resumed ends with the same bits as an
undisturbed one (on one device type, thread count and set of versions). What it gives up: one process, no
gradient accumulation, no weight averaging.
"""

import hashlib
import json
import math
import time
from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmkd.cache_tools.process.interrupt import stop_on_signals
from mmkd.cache_tools.process.progress import Progress
from mmkd.cache_tools.tasks.folder_lock import FolderLock
from mmkd.data_manifests.atomic import write_atomically
from mmkd.data_manifests.counted import counted
from mmkd.data_manifests.errors import InputError
from mmkd.student.data.batches import Batch, Schedule, ViewDataset, read_batches
from mmkd.student.recipes.loop import WITHOUT_EFFECT, LoopRecipe
from mmkd.student.recipes.loss import LossOptions
from mmkd.student.teacher.targets import Targets, TargetSource, fetch_targets
from mmkd.student.training.checkpoint import (
    INITIAL_WEIGHTS,
    Position,
    encode_network,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from mmkd.student.training.devices import keep_freed_memory, reproducible, to_device
from mmkd.student.training.epoch_metrics import METRICS_FILE, EpochMetrics, old_metrics
from mmkd.student.training.losses import total_loss
from mmkd.student.training.optimiser import learning_rate, make_optimizer, step_seed

NAMED_CLIPS = 8


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
    progress: bool = True,
    what: str = "training",
) -> FitReport:
    """Train `network` (inputs dict -> logits per head) in place, continuing from `run_dir`'s checkpoint if any.

    Without `targets` it learns from labels alone. `identity` (JSON values) is all that could change a number
    and that the loop cannot see, e.g. the cache's fingerprint: a checkpoint of another identity is refused. `lock`
    is the hold on the run's folder: it is looked at before each write there. `other_start` says that the network
    does not have its initial weights, so that a checkpoint must be there, and is not asked for them.
    Raises InterruptedByUserError after a clean stop, InputError for a data set without anything to learn from
    or a loss that is not finite.
    """
    device = torch.device(device)
    if device.type == "cpu":
        keep_freed_memory()
    loss = LossOptions() if loss is None else loss
    check_dataset(dataset, needs_labels=targets is None)
    run_identity = describe_run(network, dataset, recipe, loss=loss if targets else None, extra=identity)
    if other_start:
        del run_identity[INITIAL_WEIGHTS]
    run = Run(network.to(device), dataset, recipe, targets=targets, loss=loss, device=device)
    run.open(run_dir, run_identity, lock)
    resumed_at, began = run.position.step, time.perf_counter()
    with stop_on_signals() as stop, reproducible(device), run.show(what, progress) as bar:
        while run.position.step < run.total_steps:
            with closing(run.batches_left()) as batches:  # its reading threads end here, also on a stop or a fault
                for batch in batches:
                    bar.advance(len(batch.rows), note=f"loss {run.step(batch):.4f}")
                    if stop.requested:
                        run.save()
                        stop.check(f"{run.position.step} of {counted(run.total_steps, 'step')} are kept")
            run.save()
        rate = bar.units_per_second
    network.eval()
    seconds = time.perf_counter() - began
    final_loss = run.metrics[-1].loss if run.metrics else math.nan
    return FitReport(run.total_steps, resumed_at, final_loss, seconds, rate)


class Run:
    """The state of one run: network, optimiser, position and the metrics so far."""

    def __init__(
        self,
        network: nn.Module,
        dataset: ViewDataset,
        recipe: LoopRecipe,
        *,
        targets: TargetSource | None,
        loss: LossOptions,
        device: torch.device,
    ) -> None:
        """Start at step 0."""
        self.network = network.train()
        self.dataset, self.recipe, self.targets, self.loss = dataset, recipe, targets, loss
        self.device = device
        self.schedule = Schedule(dataset.rows, dataset.views, recipe.batch_size, recipe.seed)
        self.optimizer = make_optimizer(network, recipe)
        self.position = Position(0)
        self.metrics: list[EpochMetrics] = []
        self._run_dir: Path | None = None
        self._lock: FolderLock | None = None
        self._identity: Mapping[str, Any] = {}
        self._since = (time.perf_counter(), 0)

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.recipe.epochs * self.schedule.steps_per_epoch

    def open(self, run_dir: Path | None, identity: Mapping[str, Any], lock: FolderLock | None) -> None:
        """Keep checkpoints in `run_dir`, and go on from the one there."""
        self._run_dir, self._identity, self._lock = run_dir, identity, lock
        path = None if run_dir is None else latest_checkpoint(run_dir)
        if run_dir is None or path is None:
            return
        loaded = load_checkpoint(path, self.network, self.optimizer, identity=identity)
        self.position, self._identity = loaded.position, loaded.identity
        if loaded.metrics is None:
            self.metrics = old_metrics(run_dir / METRICS_FILE, self._epoch)
        else:
            self.metrics = loaded.metrics
            self._write_metrics()  # whatever became of the file meanwhile

    def show(self, what: str, enabled: bool) -> Progress:
        """Return the progress display of the whole run, in clips."""
        done = self._epoch * self.dataset.rows + self.position.clips
        return Progress(what, total=self.recipe.epochs * self.dataset.rows, done=done, enabled=enabled)

    def batches_left(self) -> Generator[Batch]:
        """Yield the batches that the current epoch still lacks."""
        steps = self.schedule.epoch(self._epoch)[self.position.step % self.schedule.steps_per_epoch :]
        self._since = (time.perf_counter(), self.position.clips)  # a resumed epoch: clips of before are no speed
        recipe = self.recipe
        return read_batches(self.dataset, steps, threads=recipe.loader_threads, ahead=recipe.prefetch_batches)

    def step(self, batch: Batch) -> float:
        """Do one step of the optimiser and return its loss; ends the epoch's metrics with its last step."""
        step, recipe = self.position.step, self.recipe
        torch.manual_seed(step_seed(recipe.seed, step))  # by step and not once: a resumed run draws the same
        rate = learning_rate(recipe, step, self.schedule.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = self._loss(batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves Tensor.backward unannotated
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), recipe.clip_norm)
        value = loss.item()
        if not np.isfinite(value) or not torch.isfinite(norm):
            raise InputError(self._not_finite(batch, value, float(norm)))
        self.optimizer.step()
        clips = len(batch.rows)
        self.position = Position(step + 1, self.position.loss_sum + value * clips, self.position.clips + clips)
        if self.position.step % self.schedule.steps_per_epoch == 0:
            self._end_epoch(rate)
        return value

    def save(self) -> None:
        """Write metrics and checkpoint, where the run has a directory."""
        if self._run_dir is None:
            return
        self._write_metrics()
        save_checkpoint(
            self._run_dir,
            self.network,
            self.optimizer,
            position=self.position,
            identity=self._identity,
            metrics=self.metrics,
        )

    def _write_metrics(self) -> None:
        """Write metrics.jsonl, which is for people: what a resumed run reads is the checkpoint's copy."""
        if self._run_dir is None:
            return
        if self._lock is not None:
            self._lock.check()
        lines = "".join(json.dumps(asdict(values)) + "\n" for values in self.metrics)
        write_atomically(self._run_dir / METRICS_FILE, lines.encode())

    @property
    def _epoch(self) -> int:
        return self.position.step // self.schedule.steps_per_epoch

    def _forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor], Targets | None]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            logits = self.network(to_device(batch.inputs, self.device))
        own_labels = {head: values[batch.rows] for head, values in self.dataset.labels.items()}
        if self.targets is None:
            return logits, to_device(own_labels, self.device), None
        targets = fetch_targets(self.targets, batch.rows, batch.views, device=self.device)
        return logits, to_device(own_labels, self.device), targets

    def _loss(self, batch: Batch) -> Tensor:
        logits, labels, targets = self._forward(batch)
        return total_loss(logits, labels, targets, options=self.loss)

    def _end_epoch(self, rate: float) -> None:
        seconds = time.perf_counter() - self._since[0]
        position = self.position
        self.metrics.append(
            EpochMetrics(
                epoch=self._epoch - 1,
                steps=position.step,
                loss=position.loss_sum / position.clips,
                learning_rate=rate,
                clips_per_second=round((position.clips - self._since[1]) / seconds, 3),
            )
        )
        self.position = Position(position.step)

    @torch.no_grad()
    def _not_finite(self, batch: Batch, loss: float, norm: float) -> str:
        logits, _, targets = self._forward(batch)
        bad = torch.zeros(len(batch.rows), dtype=torch.bool, device=self.device)
        for head, values in logits.items():
            bad |= ~values.isfinite().all(1)
            if targets is not None:
                bad |= targets.valid & ~targets.logits[head].isfinite().all(1)
        rows = batch.rows[bad.cpu().numpy()] if bad.any() else batch.rows
        names = [repr(self.dataset.clip_ids[row]) for row in rows[:NAMED_CLIPS]]
        return (
            f"step {self.position.step}: the loss ({loss}) or gradient norm ({norm}) is not finite; "
            f"clips {', '.join(names)}{', ...' if len(rows) > NAMED_CLIPS else ''}. "
            "Lower learning_rate, or look at these clips"
        )


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
