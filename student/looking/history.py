"""What a training did, read from its folder, finished or not: a student's, a baseline's or an expert's."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from mmkd.cache_tools.tasks.folder_lock import newest_holder
from mmkd.cache_tools.tasks.heartbeat import surely_dead
from mmkd.data_manifests.atomic import storage_errors
from mmkd.data_manifests.errors import InputError
from mmkd.data_manifests.regular_file import read_regular
from mmkd.data_manifests.typed_json import PART, STRICT, typed
from mmkd.student.evaluation.evaluation_file import Evaluation, read_evaluation
from mmkd.student.evaluation.run_files import MODEL_FILE, RUN_FILE, read_run
from mmkd.student.training.epoch_metrics import METRICS_FILE, EpochMetrics, HeldOutMetrics
from mmkd.student.training.step_log import STEPS_FILE, Interval, read_intervals

State = Literal["finished", "at work", "not finished"]
CARD_FILE = "expert.json"
TRAINING = "training"
"""The folder of an expert in which it was trained."""
CHECKPOINT_STATES = "checkpoint-*/state.json"


@dataclass(frozen=True)
class StoredEvaluation:
    """One evaluation of a run."""

    file: str
    """Its file's name."""
    found: Evaluation
    """What it says."""


@dataclass(frozen=True)
class History:
    """What is known of one training."""

    name: str
    """What tells it from the others that are looked at."""
    folder: Path
    """As it was named."""
    kind: Literal["student", "baseline", "expert"]
    """What was trained."""
    state: State
    """Whether it has left its weights, or a process is at work there."""
    epochs: int | None
    """Epochs that its recipe asks for, where that is known."""
    metrics: Sequence[EpochMetrics]
    """Of each finished epoch."""
    since: Interval | None = None
    """Its last steps, where they are of an epoch that is not finished."""
    evaluations: Sequence[StoredEvaluation] = ()
    """Of a finished student or baseline."""
    held_out: HeldOutMetrics | None = None
    """Of a finished expert, on the clips that were held out."""

    def heads(self) -> list[str]:
        """Return the heads that its epochs were validated on."""
        return list(dict.fromkeys(head for values in self.metrics for head in values.held_out or {}))

    def held_out_top1(self, head: str) -> list[tuple[int, float]]:
        """Return (epoch, counted from 1; top-1, a fraction) of each epoch that was validated on a head."""
        return [
            (values.epoch + 1, values.held_out[head]["top1"])
            for values in self.metrics
            if values.held_out and "top1" in values.held_out.get(head, {})
        ]

    def best(self, head: str) -> tuple[int, float] | None:
        """Return the epoch of the best held-out top-1, of equals that of the least cross-entropy, and its top-1."""
        nll = {values.epoch + 1: (values.held_out or {}).get(head, {}).get("nll", 0.0) for values in self.metrics}
        return max(self.held_out_top1(head), key=lambda pair: (pair[1], -nll[pair[0]]), default=None)

    def to_json(self) -> dict[str, Any]:
        """Return all of it as JSON values; epochs are counted from 0 there, as in metrics.jsonl."""
        best = {head: found for head in self.heads() if (found := self.best(head))}
        return {
            "name": self.name,
            "folder": str(self.folder),
            "kind": self.kind,
            "state": self.state,
            "epochs_asked_for": self.epochs,
            "epochs": [values.to_json() for values in self.metrics],
            "since": None if self.since is None else asdict(self.since),
            "best_held_out": {head: {"epoch": epoch - 1, "top1": top1} for head, (epoch, top1) in best.items()},
            "held_out": self.held_out,
            "evaluations": [
                {"file": own.file, "cache": own.found.cache, "metrics": own.found.metrics}
                for own in self.evaluations
            ],
        }


@dataclass(frozen=True)
class _Card:
    """What is used of an expert's card."""

    __pydantic_config__ = PART
    training: dict[str, Any]
    recipe: dict[str, Any]


@dataclass(frozen=True)
class _EpochsOf:
    """What is used of a recipe of training."""

    __pydantic_config__ = PART
    epochs: int


@dataclass(frozen=True)
class _HeldOut:
    __pydantic_config__ = STRICT
    held_out: HeldOutMetrics | None


def read_histories(folders: Sequence[Path]) -> list[History]:
    """Return the history of each folder, by names that tell them apart; raises as `read_history`."""
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise InputError("a run is named twice; name each once")
    return [read_history(folder, name) for folder, name in zip(folders, short_names(folders), strict=True)]


def short_names(folders: Sequence[Path]) -> list[str]:
    """Return as few last parts of each path as tell it from the others; of an expert's training, the expert's."""
    parts = [training_of(folder)[0].resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(own[-count:]) for own in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def training_of(folder: Path) -> tuple[Path, Path]:
    """Return the folder that a training leaves its result in, and that of its metrics: two for an expert."""
    if (folder / RUN_FILE).is_file():
        return folder, folder
    inner = folder / TRAINING
    if (folder / CARD_FILE).is_file() or (inner / METRICS_FILE).is_file() or any(inner.glob(CHECKPOINT_STATES)):
        return folder, inner
    if folder.resolve().name == TRAINING and (folder / METRICS_FILE).is_file():
        return folder.resolve().parent, folder
    return folder, folder


def read_history(folder: Path, name: str) -> History:
    """Return what the training in a folder did.

    Raises InputError for a folder without a run or an expert, and for damaged metrics, evaluations or cards,
    VerificationError for a damaged run.json.
    """
    result, training = training_of(folder)
    if training != result:
        return _expert(folder, name, result, training)
    record = read_run(folder)  # which says so where it is no run
    metrics = read_metrics(training / METRICS_FILE)
    finished = record.model_sha256 is not None or (folder / MODEL_FILE).is_file()
    return History(
        name=name,
        folder=folder,
        kind="baseline" if record.labels_only else "student",
        state=state_of(folder, finished=finished),
        epochs=_epochs(record.recipe.get("train")),
        metrics=metrics,
        since=last_steps(training, metrics),
        evaluations=read_evaluations(folder),
    )


def _expert(folder: Path, name: str, result: Path, training: Path) -> History:
    card_path = result / CARD_FILE
    epochs, held_out = _epochs_of_checkpoint(training), None
    metrics = read_metrics(training / METRICS_FILE)
    if card_path.is_file():
        try:
            card = typed(_Card, json.loads(_bytes(card_path)))
            epochs = _epochs(card.recipe.get("train")) or epochs
            held_out = typed(_HeldOut, {"held_out": card.training.get("held_out")}).held_out
        except (ValueError, RecursionError) as error:
            raise InputError(f"{card_path} is damaged ({error}); `mmkd-cache teach` writes it again") from error
    return History(
        name=name,
        folder=folder,
        kind="expert",
        state=state_of(result, finished=card_path.is_file()),
        epochs=epochs,
        metrics=metrics,
        since=last_steps(training, metrics),
        held_out=held_out,
    )


def state_of(folder: Path, *, finished: bool) -> State:
    """Return whether a process that lives, or may live on another machine, holds the folder, or it is done."""
    holder = newest_holder(folder)
    if holder is not None and not surely_dead(holder.id):
        return "at work"
    return "finished" if finished else "not finished"


def read_metrics(path: Path) -> list[EpochMetrics]:
    """Return the metrics of the finished epochs, none where there is no file yet; InputError for a damaged one."""
    if not path.exists():
        return []
    metrics = []
    for number, line in enumerate(_bytes(path).splitlines(), 1):
        try:
            values = typed(EpochMetrics, json.loads(line))
            if values.epoch != number - 1:
                raise ValueError(f"epoch {values.epoch} stands where {number - 1} belongs")
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{path} line {number} is damaged ({error}); it is for people alone: the same training, "
                "continued, writes it again from its checkpoint"
            ) from error
        metrics.append(values)
    return metrics


def last_steps(training: Path, metrics: Sequence[EpochMetrics]) -> Interval | None:
    """Return the last steps in steps.csv, where they come after the finished epochs."""
    last = next(reversed(read_intervals(training / STEPS_FILE)), None)
    done = metrics[-1].steps if metrics else 0
    return last if last is not None and last.last_step > done else None


def read_evaluations(run: Path) -> list[StoredEvaluation]:
    """Return a run's evaluations, that with its own cache first; InputError for a damaged one."""
    again = f"`mmkd-student evaluate {run} --cache CACHE`"
    paths = sorted(run.glob("evaluation*.json"), key=lambda path: (len(path.name), path.name))
    return [StoredEvaluation(path.name, read_evaluation(path, again)) for path in paths]


def _epochs_of_checkpoint(training: Path) -> int | None:
    """Return the epochs that the newest checkpoint's recipe asks for; it is looked at for nothing else."""
    for path in sorted(training.glob(CHECKPOINT_STATES), reverse=True):
        try:
            identity: Mapping[str, Any] = json.loads(_bytes(path))["identity"]
            return _epochs(identity["recipe"])
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return None


def _epochs(recipe: object) -> int | None:
    try:
        return typed(_EpochsOf, recipe).epochs
    except ValueError:
        return None


def _bytes(path: Path) -> bytes:
    with storage_errors(path, verb="read"):
        return read_regular(path)
