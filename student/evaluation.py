"""Evaluating logits on splits and evaluation groups: a student's, an expert's or the teacher's, all alike."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from mmkd.cache_tools.mixing import HeadMixtures, Missing
from mmkd.cache_tools.reader import CacheReader, SplitTable
from mmkd.cache_tools.records import Float32Array
from mmkd.data_manifests.records import Clip
from mmkd.student.cached_targets import mix_split
from mmkd.student.metrics import average_views, evaluate

SplitMetrics = dict[str, dict[str, Any]]
"""`split` or `split/group` -> head -> metrics (see mmkd.student.metrics.Metrics)."""


def evaluate_split(
    table: SplitTable,
    logits: Mapping[str, Float32Array],
    usable: npt.NDArray[np.bool_],
    *,
    clips: Sequence[Clip],
) -> SplitMetrics:
    """Evaluate view-averaged logits (rows, V, C) on the split and on each of its evaluation groups.

    Rows (n,) that are not `usable` count as left out, never as right or wrong.
    """
    groups = {clip.clip_id: clip.groups for clip in clips}
    names = dict.fromkeys(name for clip in clips for name in clip.groups)
    parts = {table.name: np.ones(table.rows, np.bool_)}
    for name in names:
        parts[f"{table.name}/{name}"] = np.array([name in groups[clip_id] for clip_id in table.clip_ids])
    result: SplitMetrics = {}
    for part, members in parts.items():
        keep = members & usable
        result[part] = {
            head: asdict(evaluate(average_views(value[keep]), table.labels[head][keep]))
            | {"left_out": int((members & ~usable).sum())}
            for head, value in logits.items()
        }
    return result


def evaluation_splits(reader: CacheReader, train_split: str) -> list[str]:
    """Return the cache's splits other than the training split, in order."""
    return [name for name in reader.layouts if name != train_split]


def evaluate_cached(
    reader: CacheReader, mixtures: HeadMixtures, missing: Missing, *, train_split: str, clips: Sequence[Clip]
) -> SplitMetrics:
    """Evaluate a mixture of cached experts (or one alone) on the cache's evaluation splits."""
    result: SplitMetrics = {}
    for split in evaluation_splits(reader, train_split):
        table = reader.split(split)
        teacher = mix_split(reader, split, mixtures, missing)
        own = [clip for clip in clips if clip.split == split]
        result |= evaluate_split(table, teacher.logits, np.asarray(teacher.valid.all(axis=1)), clips=own)
    return result
