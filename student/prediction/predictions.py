"""What a student said of clips: its best classes by name, as a table, as JSON and in lines for people."""

import csv
import io
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmkd.cache_tools.cache.softmax import log_softmax
from mmkd.cache_tools.frames.records import Float32Array, Float64Array
from mmkd.data_manifests.kinds import PREDICTION_COLUMNS
from mmkd.student.evaluation.actions import ACTION, NOUN, VERB, has_actions
from mmkd.student.evaluation.metrics import average_views
from mmkd.student.prediction.video_clips import Unread, VideoClip


@dataclass(frozen=True)
class Guess:
    """One class for one clip."""

    name: str
    """The class's name."""
    probability: float
    """Softmax of the mean logits over the head's classes, 0 to 1."""
    logit: float
    """Mean over the clip's views, float32; of an action the logarithm of its probability."""


@dataclass(frozen=True)
class Predictions:
    """What a student said of clips."""

    clips: tuple[VideoClip, ...]
    """(n,) those that could be read, in order."""
    logits: Mapping[str, Float32Array]
    """Head -> (n, V, classes), by view; empty without clips."""
    heads: Mapping[str, list[str]]
    """Head -> ordered class list."""
    unread: tuple[Unread, ...]
    """What could not be read, and why."""

    def best(self, row: int, top_k: int) -> dict[str, list[Guess]]:
        """Return head -> the `top_k` best classes of a clip (or all, if they are fewer), best first.

        By the mean of the logits over views, as evaluation counts; of equal ones the first in the list is better.
        Heads verb and noun give `action`, too: pairs by the product of their probabilities, as evaluation has it.
        """
        means = {head: average_views(value[row : row + 1])[0] for head, value in self.logits.items()}
        logs = {head: log_softmax(mean.astype(np.float64)) for head, mean in means.items()}
        found = {}
        for head, mean in means.items():
            order = np.argsort(-mean, kind="stable")[:top_k].tolist()
            found[head] = [
                Guess(self.heads[head][at], float(np.exp(logs[head][at])), float(mean[at])) for at in order
            ]
        if has_actions(logs):
            found[ACTION] = self._best_pairs(logs[VERB], logs[NOUN], top_k)
        return found

    def _best_pairs(self, log_verb: Float64Array, log_noun: Float64Array, top_k: int) -> list[Guess]:
        pairs = (log_verb[:, None] + log_noun).reshape(-1)
        order = np.argsort(-pairs, kind="stable")[:top_k].tolist()
        verbs, nouns = self.heads[VERB], self.heads[NOUN]
        names = (f"{verbs[at // len(nouns)]} {nouns[at % len(nouns)]}" for at in order)
        return [
            Guess(name, float(np.exp(pairs[at])), float(pairs[at])) for name, at in zip(names, order, strict=True)
        ]


def shown(path: Path) -> str:
    """Return a path as its user knows it: from the current directory, where it lies below that."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def printable(path: Path) -> str:
    """Return a path for a line, with a mark in place of what is not text in its name."""
    return os.fsencode(shown(path)).decode("utf-8", "replace")


def as_json(found: Predictions, top_k: int) -> dict[str, Any]:
    """Return clips with their best classes, and what could not be read."""
    return {
        "clips": [
            {
                "video": shown(clip.path),
                "start_seconds": clip.start_seconds,
                "end_seconds": clip.end_seconds,
                "heads": {
                    head: [
                        {"class": each.name, "probability": each.probability, "logit": each.logit} for each in own
                    ]
                    for head, own in found.best(row, top_k).items()
                },
            }
            for row, clip in enumerate(found.clips)
        ],
        "unread": [
            {
                "video": shown(each.path),
                "start_seconds": each.start_seconds,
                "end_seconds": each.end_seconds,
                "reason": each.reason,
            }
            for each in found.unread
        ],
    }


def as_csv(found: Predictions, top_k: int) -> bytes:
    """Return a row for each clip, head and class; names of files keep their bytes."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(PREDICTION_COLUMNS)
    for row, clip in enumerate(found.clips):
        times = (f"{clip.start_seconds:.6f}", f"{clip.end_seconds:.6f}")
        for head, own in found.best(row, top_k).items():
            for rank, each in enumerate(own, start=1):
                numbers = (f"{each.probability:.6g}", f"{each.logit:.9g}")  # 9 digits give a float32 back
                writer.writerow([shown(clip.path), *times, head, rank, each.name, *numbers])
    return os.fsencode(text.getvalue())


def as_lines(found: Predictions, top_k: int, *, with_times: bool) -> Iterator[str]:
    """Yield a line for each clip and head."""
    for row, clip in enumerate(found.clips):
        span = f" {clip.start_seconds:.2f} to {clip.end_seconds:.2f} s" if with_times else ""
        for head, own in found.best(row, top_k).items():
            named = ", ".join(f"{each.name} {100 * each.probability:.1f} %" for each in own)
            yield f"{printable(clip.path)}{span}: {head}: {named}"


def unread_lines(found: Predictions) -> list[str]:
    """Return a line for each clip that could not be read."""
    lines = []
    for each in found.unread:
        span = "" if each.start_seconds is None else f" {each.start_seconds:.2f} to {each.end_seconds:.2f} s"
        lines.append(f"{printable(each.path)}{span}: {each.reason}")
    return lines
