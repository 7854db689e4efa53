"""Evaluating logits on splits and evaluation groups: a student's, an expert's or the teacher's, all alike."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mmkd.cache_tools.cache.reader import CacheReader
from mmkd.cache_tools.cache.split_table import SplitTable
from mmkd.cache_tools.frames.records import Float32Array
from mmkd.data_manifests.errors import InputError
from mmkd.data_manifests.manifest import Clip, Manifest
from mmkd.student.evaluation.metrics import ClipScores, average_views, clip_scores
from mmkd.student.recipe import Missing
from mmkd.student.teacher.cached_teacher import mix_split, teacher_views
from mmkd.student.teacher.mixing import HeadMixtures

SplitMetrics = dict[str, dict[str, dict[str, Any]]]
"""`split` or `split/group` -> head -> metrics (mmkd.student.evaluation.metrics.Metrics; None where undefined), with
`left_out`, the labelled clips without logits, and `clips`, a hash of the ids of those that count."""

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class HeadScores:
    """How a model did on one head of a split's clips."""

    labelled: Mask
    """(rows,) whether the clip has a label."""
    counted: Mask
    """(rows,) whether it counts: it has a label, and the model has logits."""
    scores: ClipScores
    """Of the clips that count, in order."""


@dataclass(frozen=True)
class SplitScores:
    """How a model did on each of a split's clips."""

    split: str
    """Name of the split."""
    clip_ids: tuple[str, ...]
    """(rows,) ids."""
    heads: Mapping[str, HeadScores]
    """Head -> how it did."""

    def metrics(self, clips: Sequence[Clip], among: Mapping[str, set[str]] | None = None) -> SplitMetrics:
        """Return the metrics over `clips` of this split, and over each of their evaluation groups.

        `among` (head -> clip ids) narrows down which of them count. Clips that do not count, for whatever reason,
        are left out, never right or wrong.
        """
        groups = {clip.clip_id: clip.groups for clip in clips}
        names = dict.fromkeys(name for clip in clips for name in clip.groups)
        parts = {self.split: np.array([clip_id in groups for clip_id in self.clip_ids], np.bool_)}
        for name in names:
            members = [name in groups.get(clip_id, ()) for clip_id in self.clip_ids]
            parts[f"{self.split}/{name}"] = np.array(members, np.bool_)
        return {
            part: {
                head: self._part(found, members, None if among is None else among[head])
                for head, found in self.heads.items()
            }
            for part, members in parts.items()
        }

    def _part(self, found: HeadScores, members: Mask, among: set[str] | None) -> dict[str, Any]:
        keep = members & found.counted
        if among is not None:
            keep &= np.array([clip_id in among for clip_id in self.clip_ids], np.bool_)
        chosen = keep[found.counted]
        scores = ClipScores(*(values[chosen] for values in vars(found.scores).values()))
        numbers = {key: None if math.isnan(value) else value for key, value in asdict(scores.metrics()).items()}
        ids = sorted(self.clip_ids[row] for row in np.flatnonzero(keep))
        left_out = int((members & found.labelled & ~keep).sum())
        return {**numbers, "left_out": left_out, "clips": hashlib.sha256("\n".join(ids).encode()).hexdigest()[:16]}

    def counted_ids(self, head: str) -> set[str]:
        """Return the ids of the clips that count for a head."""
        return {self.clip_ids[row] for row in np.flatnonzero(self.heads[head].counted)}


def score_split(table: SplitTable, logits: Mapping[str, Float32Array], usable: Mask) -> SplitScores:
    """Score view-averaged logits (rows, V, C) on a split's clips; rows (n,) that are not `usable` have none."""
    heads = {}
    for head, value in logits.items():
        labels = table.labels[head]
        counted = usable & (labels >= 0)
        scores = clip_scores(average_views(value[counted]), labels[counted])
        heads[head] = HeadScores(labels >= 0, counted, scores)
    return SplitScores(table.name, table.clip_ids, heads)


def evaluation_splits(reader: CacheReader, manifest: Manifest, train_split: str | None = None) -> list[str]:
    """Return the splits of the cache to evaluate on, in order.

    They are in the manifest, too, and neither `train_split` nor the split of which the cache holds random training
    views: those are not what evaluation looks at.
    """
    training = {train_split, reader.init.train_split}
    return [name for name in reader.layouts if name not in training and name in manifest.splits]


def left_out_splits(reader: CacheReader, manifest: Manifest, train_split: str | None = None) -> list[str]:
    """Return a line for each split of the cache that is not evaluated, unless it is everybody's training split."""
    lines = []
    for name in reader.layouts:
        if name not in manifest.splits:
            lines.append(f"split {name!r} of the cache is left out: it is not in the manifest")
        elif name == reader.init.train_split and name != train_split and train_split is not None:
            lines.append(f"split {name!r} is left out: the cache holds random training views of it")
        elif name == train_split and name != reader.init.train_split:
            lines.append(
                f"split {name!r} is left out: it is the training split (--set train_split=NAME says another)"
            )
    return lines


def refuse_nothing(reader: CacheReader, manifest: Manifest, splits: Sequence[str], train_split: str | None) -> None:
    """Raise InputError, which says why, when no split is left to evaluate on."""
    if not splits:
        why = left_out_splits(reader, manifest, train_split) or [
            f"the cache holds {', '.join(reader.layouts)} alone"
        ]
        raise InputError(f"there is no split to evaluate on: {'; '.join(why)}")


def score_cached(reader: CacheReader, split: str, mixtures: HeadMixtures, missing: Missing) -> SplitScores:
    """Score a mixture of cached experts (or one alone) on a split of the cache."""
    table = reader.split(split)
    valid = teacher_views(reader, split, mixtures, missing)
    if not valid.any():
        none = {head: np.empty((table.rows, table.views, 2), np.float32) for head in mixtures}
        return score_split(table, none, np.zeros(table.rows, np.bool_))
    teacher = mix_split(reader, split, mixtures, missing)
    return score_split(table, teacher.logits, np.asarray(teacher.valid.all(axis=1)))
