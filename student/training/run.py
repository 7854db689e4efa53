"""One training run: its state, one step, and the end of an epoch."""

import logging
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mmkd.cache_tools.process.progress import Progress
from mmkd.cache_tools.tasks.folder_lock import FolderLock
from mmkd.data_manifests.atomic import write_atomically
from mmkd.data_manifests.counted import counted
from mmkd.data_manifests.errors import InputError, StorageError
from mmkd.student.data.batches import Batch, Schedule, ViewDataset
from mmkd.student.data.reading import Reading, read_batches
from mmkd.student.loss.criterion import Criterion
from mmkd.student.networks.freezing import freeze, frozen_modules, train_all_but
from mmkd.student.networks.own_networks import one_line
from mmkd.student.networks.recompute import recompute_blocks
from mmkd.student.recipes.loop import LoopRecipe
from mmkd.student.recipes.loss import LossOptions
from mmkd.student.teacher.targets import Targets, TargetSource, fetch_targets
from mmkd.student.training.averaging import Average
from mmkd.student.training.best import Validate, best_epoch, is_over
from mmkd.student.training.checkpoint import (
    AVERAGE_FILE,
    BEST_FILE,
    Checkpoint,
    Position,
    encode_network,
    load_latest,
    load_weights,
    save_checkpoint,
)
from mmkd.student.training.devices import autocast, to_device
from mmkd.student.training.epoch_metrics import METRICS_FILE, EpochMetrics, metrics_lines, old_metrics
from mmkd.student.training.late import LateResults, StepResult
from mmkd.student.training.optimiser import learning_rate, make_optimizer, set_rate, step_seed
from mmkd.student.training.ranks import Ranks
from mmkd.student.training.step_log import STEPS_FILE, StepLog
from mmkd.student.training.watch import BACKWARD, FORWARD, OPTIMISER, SETTLING, TARGETS, WAITING, Watch, part

log = logging.getLogger("mmkd")
NAMED_CLIPS = 8
MOST_SKIPPED = 25
"""Steps in a row whose gradient overflows fp16, before a run gives up: its scale is then 2^-25 of what it was."""


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
        ranks: Ranks,
        watch: Watch,
    ) -> None:
        """Start at step 0."""
        self.network, self.dataset, self.recipe = network, dataset, recipe
        self.targets, self.loss, self.device, self.ranks = targets, loss, device, ranks
        self.schedule = Schedule(dataset.rows, dataset.views, recipe.batch_size, recipe.seed, recipe.repeats)
        self._frozen = frozen_modules(network, recipe.freeze)
        freeze(self._frozen)
        train_all_but(network, self._frozen)
        self.average = Average(network, recipe.averaging) if recipe.averaging else None
        self.optimizer = make_optimizer(network, recipe)
        self._criterion = Criterion(recipe, loss, dataset.labels, device)
        self._scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "fp16")
        self._whole_batch = ranks.together(self._prepared(), device)
        self._forward: Any = torch.compile(self._whole_batch) if recipe.compile else self._whole_batch
        self.position = Position(0)
        self.metrics: list[EpochMetrics] = []
        self.clips_of_step = 0
        self._best: bytes | None = None
        self._late, self._settled, self._skipped, self._asked = LateResults(), 0, 0, False
        self._all_used = not ranks.several
        self._refuse_small_batches()
        self._last_loss = float("nan")
        self._run_dir: Path | None = None
        self._lock: FolderLock | None = None
        self._identity: Mapping[str, Any] = {}
        self._since = (time.perf_counter(), 0)
        self._saved_seconds = time.perf_counter()
        self._watch, self._log = watch, StepLog(recipe.log_steps, watch.interval_done)

    def _prepared(self) -> nn.Module:
        """Return the network in the forms that the recipe asks for."""
        recipe = self.recipe
        if recipe.rate_for_batch:
            log.info(
                "learning rate %.3g: %.3g is for batches of %d clips, and these are of %d",
                recipe.peak_rate,
                recipe.learning_rate,
                recipe.rate_for_batch,
                recipe.batch_size,
            )
        if recipe.channels_last:
            to_channels_last(self.network)
        if recipe.gradient_checkpointing:
            recompute_blocks(self.network)
        return self.network

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.recipe.epochs * self.schedule.steps_per_epoch

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to do: all steps are done, or the best epoch is too long ago."""
        return self.position.step >= self.total_steps or is_over(self.metrics, self.recipe.patience_epochs)

    @property
    def is_within_epoch(self) -> bool:
        """Whether the current epoch still lacks steps: whatever is saved then says nothing of its end."""
        return self.position.step % self.schedule.steps_per_epoch > 0

    @property
    def note(self) -> str:
        """What the progress display says: the last loss that is known, and how held-out clips fared."""
        parts = [f"loss {self._last_loss:.4f}"] if self._last_loss == self._last_loss else []
        if self.metrics and (held_out := self.metrics[-1].held_out):
            parts += [f"held-out {head} {100 * values['top1']:.1f} %" for head, values in held_out.items()]
        return ", ".join(parts)

    def open(self, run_dir: Path | None, identity: Mapping[str, Any], lock: FolderLock | None) -> None:
        """Keep checkpoints in `run_dir`, and go on from the newest whole one there."""
        self._run_dir, self._identity, self._lock = run_dir, identity, lock
        if run_dir is None:
            return
        found = load_latest(run_dir, self.network, self.optimizer, identity=identity)
        if found is not None:
            self._continue(found, run_dir)
        if self.ranks.same(lambda: self.position.step) != self.position.step:
            raise StorageError(
                f"{run_dir}: the processes of this run find different checkpoints there; the folder must be on a "
                "file system that all of them share. Run the same command again"
            )
        if self.ranks.is_first:
            check = (lambda: None) if lock is None else lock.check
            self._log.open(run_dir / STEPS_FILE, self.position.step, check)

    def _continue(self, found: Checkpoint, run_dir: Path) -> None:
        state = found.state
        self.position, self._identity, self._settled = state.position, state.identity, state.position.step
        if self.average is not None:
            load_weights(self.average.network, found.weights.get(AVERAGE_FILE, b""), run_dir)
            self.average.restore(int(state.numbers.get("average_updates", 0)))
        if self._scaler.is_enabled():
            self._scaler.load_state_dict(
                {
                    name.removeprefix(SCALER): value
                    for name, value in state.numbers.items()
                    if name.startswith(SCALER)
                }
            )
        self._best = found.weights.get(BEST_FILE)
        if state.metrics is None:
            self.metrics = old_metrics(run_dir / METRICS_FILE, self._epoch)
        else:
            self.metrics = state.metrics
            self._write_metrics()  # whatever became of the file meanwhile

    def show(self, what: str, enabled: bool) -> Progress:
        """Return the progress display of the whole run, in clips."""
        each = self.schedule.views_per_epoch
        done = self._epoch * each + self.position.clips
        return Progress(what, total=self.recipe.epochs * each, done=done, enabled=enabled)

    def batches_left(self) -> Generator[Batch]:
        """Yield the batches that the run still lacks, of all its epochs: what reads ahead lives as long."""
        whole = self.schedule.steps(self.position.step, self.total_steps)
        own = ((rows[self.ranks.share(rows)], views[self.ranks.share(rows)]) for rows, views in whole)
        views = (self.recipe.epochs - self._epoch) * self.schedule.views_per_epoch // self.ranks.count
        return read_batches(self.dataset, own, Reading.of(self.recipe, self.device.type), views=views)

    def of_epoch(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Return those of the next batches that the current epoch still lacks."""
        self._since = (time.perf_counter(), self.position.clips)  # a resumed epoch: clips of before are no speed
        self._log.begin()
        each = self.schedule.steps_per_epoch
        return islice(waiting(batches), each - self.position.step % each)

    def step(self, batch: Batch, *, stop: bool = False) -> None:
        """Do one step of the optimiser; what the step before it gave is looked at now.

        `stop` says that this process was asked to; the others learn of it with the step's loss.
        """
        step, recipe = self.position.step, self.recipe
        torch.manual_seed(step_seed(recipe.seed, step, self.ranks.rank))  # a resumed run draws the same
        set_rate(self.optimizer, learning_rate(recipe, step, self.schedule.steps_per_epoch))
        self.optimizer.zero_grad(set_to_none=True)
        with told_when_uncompiled(recipe):
            loss, suspects = self._backward(batch)
        self._refuse_unused()
        with part(OPTIMISER):
            self._scaler.unscale_(self.optimizer)
            norm = nn.utils.clip_grad_norm_(self.network.parameters(), recipe.clip_norm)
            self._scaler.step(self.optimizer)
            self._scaler.update()
            if self.average is not None:
                self.average.update(self.network)
        shared = self.ranks.sum(torch.stack([loss.double(), loss.new_tensor(stop).double()]))
        numbers = torch.stack([shared[0], norm.detach().double(), shared[1]])
        self.clips_of_step = self.schedule.clips_of(step)
        self._late.add(step, batch.rows, suspects, clips=self.clips_of_step, numbers=numbers)
        self.position = replace(self.position, step=step + 1)
        with part(SETTLING):
            self._settle(keep=1)

    def _backward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Add up the gradient of a batch, in as many parts as the recipe says; return its loss and its suspects."""
        pieces = cut(batch, self.recipe.accumulate)
        criterion = self._criterion.at(self.position.step / self.total_steps)
        with part(TARGETS):
            known = [self._labels_and_targets(piece) for piece in pieces]
        shares: list[Mapping[str, Tensor] | None] = [None]
        if len(pieces) > 1 or self.ranks.several:
            counts = [criterion.counts(labels, targets) for labels, targets in known]
            sums = torch.stack([torch.stack([count[head] for head in counts[0]]) for count in counts]).sum(0)
            whole = dict(zip(counts[0], self.ranks.sum(sums).clamp_min(1), strict=True))
            shares = [{head: count[head] / whole[head] for head in whole} for count in counts]
        losses, suspects = [], []
        for piece, (labels, targets), share in zip(pieces, known, shares, strict=True):
            with self._without_sync(last=piece is pieces[-1]):
                with part(FORWARD):
                    inputs, loss_of = criterion.prepare(to_device(piece.inputs, self.device), labels, targets)
                    with autocast(self.device, self.recipe.precision):
                        logits = self._forward(inputs)
                    loss = loss_of(logits, share)
                with part(BACKWARD):  # processes' gradients are averaged, and are wanted summed
                    self._scaler.scale(loss * self.ranks.count).backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
            losses.append(loss.detach())
            suspects.append(not_finite(logits, targets))
        return torch.stack(losses).sum(), torch.cat(suspects)

    def _without_sync(self, *, last: bool) -> AbstractContextManager[None]:
        """Return the context of a batch's part: processes exchange gradients with the last one alone."""
        if last or not isinstance(self._whole_batch, DistributedDataParallel):
            return nullcontext()
        return self._whole_batch.no_sync()

    def _refuse_small_batches(self) -> None:
        each = self.schedule.clips_of(self.schedule.steps_per_epoch - 1)
        if each < self.ranks.count:
            raise InputError(
                f"{self.ranks.count} processes cannot share a step of {counted(each, 'clip')}: set a larger "
                "train.batch_size, or start fewer"
            )
        try:
            self.recipe.check_mixing(processes=self.ranks.count)
        except ValueError as error:
            raise InputError(f"train: {error}") from error

    def _refuse_unused(self) -> None:
        """Raise InputError after the first step where parameters have no gradient that processes could exchange."""
        if self._all_used:
            return
        self._all_used = True
        learning = [(name, own) for name, own in self.network.named_parameters() if own.requires_grad]
        if unused := [name for name, own in learning if own.grad is None]:
            raise InputError(
                f"train.network: several processes train all of a network, and this one's {', '.join(unused[:4])}"
                f"{', ...' if len(unused) > 4 else ''} had no part in the loss: leave out what is not "
                "used, or let it have requires_grad=False"
            )

    def _labels_and_targets(self, batch: Batch) -> tuple[dict[str, Tensor], Targets | None]:
        own = {head: values[batch.rows] for head, values in self.dataset.labels.items()}
        targets = None
        if self.targets is not None:
            targets = fetch_targets(self.targets, batch.rows, batch.views, device=self.device)
        return to_device(own, self.device), targets

    def _settle(self, *, keep: int) -> None:
        """Look at the results of steps but for the last `keep`; raise InputError for one that is not finite."""
        for found in self._late.settled(keep=keep):
            self._refuse_not_finite(found)
            self._last_loss, self._asked = found.loss, self._asked or found.stop
            position = self.position
            self.position = Position(
                position.step, position.loss_sum + found.loss * found.clips, position.clips + found.clips
            )
            self._settled, each = found.step + 1, self.schedule.steps_per_epoch
            rate = learning_rate(self.recipe, found.step, each)
            self._log.add(found, epoch=found.step // each, learning_rate=rate)

    def _refuse_not_finite(self, found: StepResult) -> None:
        overflows = self._scaler.is_enabled() and np.isfinite(found.loss) and not np.isfinite(found.norm)
        self._skipped = self._skipped + 1 if overflows else 0  # the scaler left such a step out, and scales down
        if overflows and self._skipped < MOST_SKIPPED:
            return
        if not (np.isfinite(found.loss) and np.isfinite(found.norm)):
            raise InputError(self._not_finite(found))

    def _not_finite(self, found: StepResult) -> str:
        bad = found.suspects.cpu().numpy()
        rows = found.rows[bad] if bad.any() else found.rows
        names = [repr(self.dataset.clip_ids[row]) for row in rows[:NAMED_CLIPS]]
        advice = "Lower learning_rate, or look at these clips"
        if self._scaler.is_enabled():
            advice = "fp16 may not hold these values: use --set train.precision=bf16. " + advice
        return (
            f"step {found.step}: the loss ({found.loss}) or gradient norm ({found.norm}) is not finite; "
            f"clips {', '.join(names)}{', ...' if len(rows) > NAMED_CLIPS else ''}. {advice}"
        )

    def close(self) -> None:
        """Let go of what holds on to the other processes, before the group of them is closed."""
        self._whole_batch, self._forward = self.network, self.network

    def shall_stop(self, asked: bool) -> bool:
        """Return whether the run is to stop here, in all of its processes alike."""
        return self._asked if self.ranks.several else asked

    def end_epoch(self, validate: Validate | None) -> None:
        """Note the epoch's metrics, and its weights where they are the best so far."""
        self._settle(keep=0)
        self._log.end_interval()
        seconds, position = time.perf_counter() - self._since[0], self.position
        found = EpochMetrics(
            epoch=self._epoch - 1,
            steps=position.step,
            loss=position.loss_sum / position.clips,
            learning_rate=learning_rate(self.recipe, position.step - 1, self.schedule.steps_per_epoch),
            clips_per_second=round((position.clips - self._since[1]) / seconds, 3),
        )
        if validate is not None:
            found = replace(found, held_out=self.ranks.same(lambda: validate(self.network_to_keep)))
            train_all_but(self.network, self._frozen)
        self.metrics.append(found)
        keeps_best = validate is not None and self.recipe.keep != "last"
        if keeps_best and best_epoch(self.metrics) == found.epoch:
            self._best = encode_network(self.network_to_keep)
        self.position = Position(position.step)
        self._watch.epoch_done(found)

    @property
    def network_to_keep(self) -> nn.Module:
        """The network with the weights that the run would leave now."""
        return self.network if self.average is None else self.average.network

    def leave_weights(self) -> None:
        """Put the weights of the best epoch, or averaged ones, into the network, if the run has such."""
        if self._best is not None:
            load_weights(self.network, self._best, Path(BEST_FILE))
        elif self.average is not None:
            self.network.load_state_dict(self.average.network.state_dict())

    def save_sometimes(self) -> None:
        """Write a checkpoint within an epoch, when the last one is as old as the recipe says."""
        minutes = self.recipe.checkpoint_minutes
        if minutes is not None and time.perf_counter() - self._saved_seconds >= 60 * minutes:
            self.save()

    def save(self) -> None:
        """Write metrics and checkpoint, where the run has a directory."""
        self._settle(keep=0)
        self._log.end_interval()
        self._saved_seconds = time.perf_counter()
        if self._run_dir is None or not self.ranks.is_first:
            return
        self._write_metrics()
        self._log.write()
        save_checkpoint(
            self._run_dir,
            self.network,
            self.optimizer,
            position=self.position,
            identity=self._identity,
            metrics=self.metrics,
            weights=dict(self._weights_kept()),
            numbers=self._numbers_kept(),
        )
        self._log.begin()

    def _weights_kept(self) -> Iterator[tuple[str, bytes]]:
        if self.average is not None:
            yield AVERAGE_FILE, encode_network(self.average.network)
        if self._best is not None:
            yield BEST_FILE, self._best

    def _numbers_kept(self) -> dict[str, int | float]:
        numbers: dict[str, int | float] = {
            f"{SCALER}{name}": value for name, value in self._scaler.state_dict().items()
        }
        if self.average is not None:
            numbers["average_updates"] = self.average.updates
        return numbers

    def _write_metrics(self) -> None:
        """Write metrics.jsonl, which is for people: what a resumed run reads is the checkpoint's copy."""
        if self._run_dir is None or not self.ranks.is_first:
            return
        if self._lock is not None:
            self._lock.check()
        write_atomically(self._run_dir / METRICS_FILE, metrics_lines(self.metrics).encode())

    @property
    def _epoch(self) -> int:
        return self.position.step // self.schedule.steps_per_epoch


SCALER = "scaler."
"""Begins the names of the loss scaler's numbers in a checkpoint."""


@contextmanager
def told_when_uncompiled(recipe: LoopRecipe) -> Iterator[None]:
    """Raise InputError in place of torch's own when a network cannot be compiled here."""
    try:
        yield
    except RuntimeError as error:
        if recipe.compile and type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise InputError(
                f"train.compile: torch cannot compile this network here ({one_line(error)})"
            ) from error
        raise


def waiting(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yield the batches; a trace shows how long each was waited for."""
    while True:
        with part(WAITING):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def cut(batch: Batch, parts: int) -> list[Batch]:
    """Cut a batch into parts whose sizes differ by at most one; fewer where it has fewer clips."""
    if parts == 1:
        return [batch]
    bounds = np.linspace(0, len(batch.rows), min(parts, len(batch.rows)) + 1).astype(int)
    return [
        Batch(batch.rows[a:b], batch.views[a:b], {name: value[a:b] for name, value in batch.inputs.items()})
        for a, b in pairwise(bounds)
    ]


@torch.no_grad()
def not_finite(logits: Mapping[str, Tensor], targets: Targets | None) -> Tensor:
    """Return bool (B,): which clips have logits, or targets, that are not finite."""
    bad = torch.stack([~values.isfinite().all(1) for values in logits.values()]).any(0)
    if targets is not None:
        own = torch.stack([~targets.logits[head].isfinite().all(1) for head in logits]).any(0)
        bad = bad | (targets.valid & own)
    return bad


def to_channels_last(network: nn.Module) -> None:
    """Lay out the kernels of convolutions with channels innermost; what they are applied to follows."""
    for parameter in network.parameters():
        if parameter.ndim == 5:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)
        elif parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
