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
from mmkd.cache_tools.views.drawing import ViewPolicy
from mmkd.data_manifests.errors import InputError
from mmkd.data_manifests.manifest import Clip, Manifest
from mmkd.student.data.splits import SplitNames
from mmkd.student.evaluation.actions import ACTION, NOUN, VERB, action_scores, has_actions
from mmkd.student.evaluation.metrics import ClipScores, average_views, clip_scores
from mmkd.student.recipes.student import Missing
from mmkd.student.teacher.cached_teacher import mix_split, teacher_views
from mmkd.student.teacher.mixing import HeadMixtures

SplitMetrics = dict[str, dict[str, dict[str, Any]]]
"""`split` or `split/group` -> head -> metrics (mmkd.student.evaluation.metrics.Metrics; None where undefined), with
`left_out`, the labelled clips without logits, `clips`, a hash of the ids of those that count, `mean_class`, the
mean over classes of top-1, `positions` and `crops`, whose views each clip's logits average, and for actions
`both_top5` (see mmkd.student.evaluation.actions). A group named `GROUP_HEAD`, such as `tail_verb`, is about that
head alone."""

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
class Averaged:
    """Over which views of a clip its logits are averaged."""

    positions: int = 0
    """Places in time; 0 where an earlier version did not say."""
    crops: int = 0
    """Windows at each place."""

    @classmethod
    def of(cls, policy: ViewPolicy) -> "Averaged":
        """Return what a policy's evaluation views are."""
        return cls(policy.evaluation_clips, policy.evaluation_crops)


@dataclass(frozen=True)
class SplitScores:
    """How a model did on each of a split's clips."""

    split: str
    """Name of the split."""
    clip_ids: tuple[str, ...]
    """(rows,) ids."""
    heads: Mapping[str, HeadScores]
    """Head -> how it did; of verb and noun `action`, too."""
    averaged: Averaged
    """Over which views."""

    def metrics(self, clips: Sequence[Clip], among: Mapping[str, set[str]] | None = None) -> SplitMetrics:
        """Return the metrics over `clips` of this split, and over each of their evaluation groups.

        `among` (head -> clip ids) narrows down which of them count. Clips that do not count, for whatever reason,
        are left out, never right or wrong.
        """
        labels = {clip.clip_id: clip.labels for clip in clips}
        own_labels = [labels.get(clip_id, {}) for clip_id in self.clip_ids]
        return {
            part: {
                head: self._part(head, members, own_labels, None if among is None else among[head])
                for head in self.heads_of(part)
                if among is None or head in among
            }
            for part, members in self.parts(clips).items()
        }

    def parts(self, clips: Sequence[Clip]) -> dict[str, Mask]:
        """Return the split and each evaluation group of `clips` -> (rows,) which of its clips are in it."""
        groups = {clip.clip_id: clip.groups for clip in clips}
        names = dict.fromkeys(name for clip in clips for name in clip.groups)
        parts = {self.split: np.array([clip_id in groups for clip_id in self.clip_ids], np.bool_)}
        for name in names:
            members = [name in groups.get(clip_id, ()) for clip_id in self.clip_ids]
            parts[f"{self.split}/{name}"] = np.array(members, np.bool_)
        return parts

    def heads_of(self, part: str) -> list[str]:
        """Return the heads that a split or group is about: the one that its name ends with, or all."""
        named = [head for head in self.heads if part.endswith(f"_{head}") and "/" in part]
        return named or list(self.heads)

    def _part(
        self, head: str, members: Mask, labels: Sequence[Mapping[str, int | None]], among: set[str] | None
    ) -> dict[str, Any]:
        found = self.heads[head]
        keep = members & found.counted
        if among is not None:
            keep &= np.array([clip_id in among for clip_id in self.clip_ids], np.bool_)
        chosen = keep[found.counted]
        scores = ClipScores(*(values[chosen] for values in vars(found.scores).values()))
        names = self._labels_of(head)
        classes = [tuple(labels[row][name] for name in names) for row in np.flatnonzero(keep).tolist()]
        measured = asdict(scores.metrics()) | {"mean_class": scores.mean_class(classes)}
        if len(names) > 1:
            measured["both_top5"] = self._both(keep, 5)
        numbers = {key: None if math.isnan(value) else value for key, value in measured.items()}
        ids = sorted(self.clip_ids[row] for row in np.flatnonzero(keep))
        left_out = int((members & found.labelled & ~keep).sum())
        clips = hashlib.sha256("\n".join(ids).encode()).hexdigest()[:16]
        return {**numbers, "left_out": left_out, "clips": clips, **asdict(self.averaged)}

    def _labels_of(self, head: str) -> tuple[str, ...]:
        """Return the heads whose labels make a clip's class: verb and noun of an action, else the head."""
        is_pair = head == ACTION and has_actions(set(self.heads) - {ACTION})
        return (VERB, NOUN) if is_pair else (head,)

    def _both(self, keep: Mask, k: int) -> float:
        """Return the fraction of clips whose verb and noun are both among the k best."""
        right = np.ones(int(keep.sum()), np.bool_)
        for head in (VERB, NOUN):
            found = self.heads[head]
            right &= found.scores.rank[keep[found.counted]] < k
        return float(right.mean()) if len(right) else math.nan

    def right(self, head: str, members: Mask) -> dict[str, bool]:
        """Return the ids of those `members` (rows,) that count for a head -> whether its label came first."""
        found = self.heads[head]
        rows, ranks = np.flatnonzero(found.counted).tolist(), found.scores.rank.tolist()
        return {self.clip_ids[row]: rank == 0 for row, rank in zip(rows, ranks, strict=True) if members[row]}

    def counted_ids(self, head: str) -> set[str]:
        """Return the ids of the clips that count for a head."""
        return {self.clip_ids[row] for row in np.flatnonzero(self.heads[head].counted)}


def score_split(
    table: SplitTable, logits: Mapping[str, Float32Array], usable: Mask, averaged: Averaged = Averaged()
) -> SplitScores:
    """Score view-averaged logits (rows, V, C) on a split's clips; rows (n,) that are not `usable` have none.

    Verb and noun are scored as actions, too.
    """
    heads = {}
    for head, value in logits.items():
        labels = table.labels[head]
        counted = usable & (labels >= 0)
        scores = clip_scores(average_views(value[counted]), labels[counted])
        heads[head] = HeadScores(labels >= 0, counted, scores)
    if has_actions(logits):
        heads[ACTION] = score_actions(table, logits, usable)
    return SplitScores(table.name, table.clip_ids, heads, averaged)


def score_actions(table: SplitTable, logits: Mapping[str, Float32Array], usable: Mask) -> HeadScores:
    """Score verb and noun as one action; a clip has its label where it has both."""
    verbs, nouns = table.labels[VERB], table.labels[NOUN]
    both = (verbs >= 0) & (nouns >= 0)
    counted = usable & both
    verb, noun = (average_views(logits[head][counted]) for head in (VERB, NOUN))
    return HeadScores(both, counted, action_scores(verb, noun, verbs[counted], nouns[counted]))


def evaluation_splits(there: SplitNames, manifest: Manifest, train_split: str | None = None) -> list[str]:
    """Return the splits to evaluate on, of those that are there, in order.

    They are in the manifest, too, with a label, and neither `train_split` nor the one that has random training
    views: those are not what evaluation looks at.
    """
    training = {train_split, there.training}
    known = [name for name in there.names if name not in training and name in manifest.splits]
    return [name for name in known if has_label(manifest, name)]


def has_label(manifest: Manifest, split: str) -> bool:
    """Return whether some clip of a split has a label: a challenge's test split has none."""
    return manifest.unlabelled(split) < len(manifest.split(split))


def left_out_splits(there: SplitNames, manifest: Manifest, train_split: str | None = None) -> list[str]:
    """Return a line for each split that is not evaluated, unless it is everybody's training split."""
    lines = []
    if not there.of_cache:
        unlabelled = [name for name in manifest.splits if name not in there.names and name != there.training]
        return [no_label_line(name) for name in unlabelled]
    for name in there.names:
        if name not in manifest.splits:
            lines.append(f"split {name!r} of the cache is left out: it is not in the manifest")
        elif name == there.training and name != train_split and train_split is not None:
            lines.append(f"split {name!r} is left out: the cache holds random training views of it")
        elif name == train_split and name != there.training:
            lines.append(
                f"split {name!r} is left out: it is the training split (--set train_split=NAME says another)"
            )
        elif name != there.training and not has_label(manifest, name):
            lines.append(no_label_line(name))
    return lines


def no_label_line(split: str) -> str:
    """Return the line about a split that no accuracy can be told of."""
    return (
        f"split {split!r} is left out: none of its clips has a label (`mmkd-student predict` tells their classes, "
        "`submission` writes a challenge's file)"
    )


def refuse_nothing(there: SplitNames, manifest: Manifest, splits: Sequence[str], train_split: str | None) -> None:
    """Raise InputError, which says why, when no split is left to evaluate on."""
    if not splits:
        holder = "cache" if there.of_cache else "manifest"
        why = left_out_splits(there, manifest, train_split) or [
            f"the {holder} holds {', '.join(there.names) or 'no label'} alone"
        ]
        raise InputError(f"there is no split to evaluate on: {'; '.join(why)}")


def score_cached(reader: CacheReader, split: str, mixtures: HeadMixtures, missing: Missing) -> SplitScores:
    """Score a mixture of cached experts (or one alone) on a split of the cache."""
    table, averaged = reader.split(split), Averaged.of(reader.init.policy)
    valid = teacher_views(reader, split, mixtures, missing)
    if not valid.any():
        none = {head: np.empty((table.rows, table.views, 2), np.float32) for head in mixtures}
        return score_split(table, none, np.zeros(table.rows, np.bool_), averaged)
    teacher = mix_split(reader, split, mixtures, missing)
    return score_split(table, teacher.logits, np.asarray(teacher.valid.all(axis=1)), averaged)
