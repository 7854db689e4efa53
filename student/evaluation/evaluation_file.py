"""What an evaluation leaves in a run's folder: its metrics, and how the student did on every single clip.

`evaluation.json` has the metrics, `evaluation.clips.jsonl` a line for each clip of each split, from which `compare`
takes those of any part: another manifest's clips and groups, or the clips that all rows of a table have.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmkd.cache_tools.cache.sealed import open_seal, seal
from mmkd.data_manifests.atomic import storage_errors, write_atomically
from mmkd.data_manifests.errors import InputError
from mmkd.data_manifests.regular_file import read_regular
from mmkd.data_manifests.typed_json import PART, STRICT, typed
from mmkd.student.evaluation.evaluate import Averaged, HeadScores, SplitMetrics, SplitScores
from mmkd.student.evaluation.metrics import ClipScores

Score = tuple[int, float, float] | None
"""Rank, confidence and cross-entropy (see ClipScores); None for a clip without a label."""


@dataclass(frozen=True)
class StoredMetrics:
    """Those metrics of one part and head that the table shows; others are passed over."""

    __pydantic_config__ = PART
    top1: float | None
    top5: float | None
    ece: float | None
    count: int = 0
    left_out: int = 0
    clips: str = ""
    positions: int = 0
    crops: int = 0


@dataclass(frozen=True)
class Evaluation:
    """A run's evaluation with one cache."""

    __pydantic_config__ = STRICT
    cache: str
    """Fingerprint of the cache; without one, of the manifest and the views."""
    metrics: SplitMetrics
    """Of all splits."""
    clips_sha256: str | None = None
    """Of the file of single clips; evaluations of earlier versions have none."""


@dataclass(frozen=True)
class ClipLine:
    """A line of the file of single clips."""

    __pydantic_config__ = STRICT
    split: str
    """Its split."""
    clip_id: str
    """Its id."""
    heads: dict[str, Score | str]
    """Head -> how the student did, None without a label, or "left out"."""


LEFT_OUT = "left out"


def clips_path(path: Path) -> Path:
    """Return where the single clips of the evaluation file `path` lie."""
    return path.with_suffix(".clips.jsonl")


def write_evaluation(path: Path, cache: str, metrics: SplitMetrics, scores: Sequence[SplitScores]) -> None:
    """Write both files, the one that is read first last."""
    lines = "".join(json.dumps(line) + "\n" for split in scores for line in clip_lines(split)).encode()
    write_atomically(clips_path(path), lines)
    fields = {"cache": cache, "metrics": metrics, "clips_sha256": hashlib.sha256(lines).hexdigest()}
    write_atomically(path, (json.dumps(seal(fields), indent=1) + "\n").encode())


def clip_lines(split: SplitScores) -> Iterator[dict[str, Any]]:
    """Yield what is stored of each clip of a split."""
    single: dict[str, list[Any]] = {}
    for head, found in split.heads.items():
        own: list[Any] = [LEFT_OUT if labelled else None for labelled in found.labelled.tolist()]
        scores = zip(*(values.tolist() for values in vars(found.scores).values()), strict=True)
        for row, score in zip(np.flatnonzero(found.counted).tolist(), scores, strict=True):
            own[row] = score
        single[head] = own
    for row, clip_id in enumerate(split.clip_ids):
        heads = {head: own[row] for head, own in single.items()}
        yield {"split": split.split, "clip_id": clip_id, "heads": heads}


def read_evaluation(path: Path, again: str) -> Evaluation:
    """Return an evaluation; raise InputError, with what to run `again`, when there is none or it is damaged."""
    data = read_stored(path)
    if data is None:
        raise InputError(f"{path} is missing; run {again} first")
    try:
        value = defined(data)
        # Those of earlier versions hold nothing else, and no seal.
        if isinstance(value, dict) and value.keys() != {"cache", "metrics"}:
            value = open_seal(data)
        found = typed(Evaluation, value)
        check_metrics(found.metrics)
        return found
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({error}); run {again} again") from error


def read_stored(path: Path) -> bytes | None:
    """Return a file's bytes, None where there is none; StorageError where it cannot be read."""
    with storage_errors(path, verb="read"):
        try:
            return read_regular(path)
        except FileNotFoundError:
            return None


def defined(data: bytes) -> Any:
    """Parse JSON in which earlier versions wrote NaN, which JSON has not, for what is undefined."""
    return json.loads(data, parse_constant=lambda _: None)


def check_metrics(metrics: SplitMetrics) -> None:
    """Raise ValueError for metrics that a table could not show."""
    typed(dict[str, dict[str, StoredMetrics]], metrics)


def read_scores(path: Path, evaluation: Evaluation, again: str) -> dict[str, SplitScores] | None:
    """Return split -> how the run of the evaluation file `path` did on each clip; None where that was not kept.

    Raises InputError, with what to run `again`, when the file of single clips is not the evaluation's.
    """
    single = clips_path(path)
    data = read_stored(single) if evaluation.clips_sha256 else None
    if data is None:
        return None
    if hashlib.sha256(data).hexdigest() != evaluation.clips_sha256:
        raise InputError(f"{single} is damaged; run {again} again")
    lines: dict[str, list[ClipLine]] = {}
    try:
        for line in data.splitlines():
            value = typed(ClipLine, json.loads(line))
            lines.setdefault(value.split, []).append(value)
        return {
            split: split_scores(split, own, averaged(evaluation.metrics, split)) for split, own in lines.items()
        }
    except (ValueError, KeyError, RecursionError) as error:
        raise InputError(f"{single} is damaged ({error}); run {again} again") from error


def averaged(metrics: SplitMetrics, split: str) -> Averaged:
    """Return over which views a split's stored metrics are; unknown where an earlier version wrote them."""
    own = next(iter(metrics.get(split, {}).values()), {})
    return Averaged(int(own.get("positions", 0)), int(own.get("crops", 0)))


def split_scores(split: str, lines: Sequence[ClipLine], averaged: Averaged) -> SplitScores:
    """Put a split's single clips together."""
    heads: Mapping[str, list[Any]] = {head: [line.heads[head] for line in lines] for head in lines[0].heads}
    return SplitScores(
        split,
        tuple(line.clip_id for line in lines),
        {head: head_scores(own) for head, own in heads.items()},
        averaged,
    )


def head_scores(own: Sequence[Score | str]) -> HeadScores:
    """Put one head's single clips together."""
    scores = [score for score in own if not isinstance(score, str) and score is not None]
    rank, confidence, nll = zip(*scores, strict=True) if scores else ((), (), ())
    return HeadScores(
        np.array([score is not None for score in own], np.bool_),
        np.array([isinstance(score, tuple) for score in own], np.bool_),
        ClipScores(np.array(rank, np.int64), np.array(confidence, np.float64), np.array(nll, np.float64)),
    )
