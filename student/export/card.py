"""What is known of a student, for its card: data set, classes, teacher, accuracies with their views, origin.

All of it is read from the run's folder, and no path of this machine goes along: a card is for other people.
"""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from mmkd.student.evaluation.evaluation_file import read_evaluation
from mmkd.student.evaluation.run_files import EVALUATION_FILE, RunRecord
from mmkd.student.evaluation.trained import TrainedStudent


def describe(record: RunRecord, student: TrainedStudent) -> dict[str, Any]:
    """Return what a user of a file needs to know: class names by head, views, normalisation, where it is from."""
    normalisation = student.network.normalisation
    return {
        "classes": student.heads,
        "views": student.policy.model_dump(mode="json"),
        "normalisation": {"inside": True, "mean": list(normalisation.mean), "std": list(normalisation.std)},
        "dataset": record.dataset,
        "model_sha256": record.model_sha256,
        "cache": record.cache,
        "mmkd": version("mmkd"),
        "torch": torch.__version__,
    }


def card_of(run: Path, record: RunRecord, student: TrainedStudent, license_id: str) -> dict[str, Any]:
    """Return the card but for checks and measurements; raises InputError for an evaluation that is damaged."""
    train = record.recipe.get("train", {})
    start = train.get("weights")
    return {
        **describe(record, student),
        "license": license_id,
        "network": train.get("network"),
        "starting_weights": None if start is None else Path(start).name,
        "epochs": train.get("epochs"),
        "train_split": record.recipe.get("train_split"),
        "teacher": None if record.labels_only else record.weights,
        "evaluations": evaluations(run),
    }


def evaluations(run: Path) -> list[dict[str, Any]]:
    """Return every evaluation in a run's folder: the cache's fingerprint, and metrics by part and head."""
    again = f"`mmkd-student evaluate {run} --cache CACHE`"
    others = sorted(path for path in run.glob("evaluation-*.json"))
    found = [read_evaluation(path, again) for path in (run / EVALUATION_FILE, *others) if path.exists()]
    return [{"cache": each.cache, "metrics": each.metrics} for each in found if each.metrics]
