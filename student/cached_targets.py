"""Soft targets from a cache: experts mixed into a teacher when training starts, then looked up by row and view.

Everything is read once, verified, and mixed in memory: float32 (rows, views, classes) per head, 0.95 GB for
Something-Something V2 at 8 views. It gives up sharing that memory between processes.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mmkd.cache_tools.mixing import Missing, Weights, mean_cross_entropy, mix, parse_weights, softmin_weights
from mmkd.cache_tools.reader import CacheReader
from mmkd.cache_tools.records import Float32Array, IntArray
from mmkd.data_manifests.errors import InputError
from mmkd.student.targets import ArrayTargets

HeadWeights = dict[str, Weights]
"""Head -> expert -> weight."""


@dataclass(frozen=True)
class MixedTeacher:
    """The teacher's logits for one split."""

    logits: Mapping[str, Float32Array]
    """Head -> float32 (rows, views, classes); NaN where `valid` is False."""
    valid: npt.NDArray[np.bool_]
    """(rows, views) whether the teacher has logits."""


def choose_weights(
    reader: CacheReader, spec: str, *, weights_temperature: float, train_split: str
) -> tuple[HeadWeights, str | None]:
    """Return weights per head for `uniform`, `heldout` or `rgb=1,flow=2`, and a warning or None.

    `heldout` is the softmin of each expert's mean cross-entropy on the held-out part of the training split, over
    `weights_temperature` (Radevski et al.); uniform, with a warning, where nothing was held out.
    """
    heads = [head.name for head in reader.heads]
    uniform = {expert: 1 / len(reader.experts) for expert in reader.experts}
    if spec == "uniform":
        return dict.fromkeys(heads, uniform), None
    if spec != "heldout":
        return dict.fromkeys(heads, parse_weights(spec, reader.experts)), None
    if reader.held_out is None:
        return dict.fromkeys(heads, uniform), (
            "the experts share no held-out part of the training split: uniform weights are used"
        )
    table = reader.split(train_split)
    rows = reader.held_out.mask(reader.dataset, table.clip_ids)
    if not rows.any():
        return dict.fromkeys(heads, uniform), (
            "no clip of the training split happens to be held out: uniform weights are used"
        )
    errors: dict[str, dict[str, float]] = {head: {} for head in heads}
    for expert in reader.experts:
        logits, usable = reader.logits(train_split, expert), reader.usable(train_split, expert)
        for head in heads:
            errors[head][expert] = mean_cross_entropy(logits[head][rows], table.labels[head][rows], usable[rows])
    return {head: softmin_weights(errors[head], weights_temperature) for head in heads}, None


def mix_split(reader: CacheReader, split: str, weights: HeadWeights, missing: Missing) -> MixedTeacher:
    """Read and mix the teacher of one split; raise InputError when it has logits for no view at all."""
    experts = sorted({expert for mixture in weights.values() for expert in mixture})
    logits = {expert: reader.logits(split, expert) for expert in experts}
    usable = {expert: reader.usable(split, expert) for expert in experts}
    mixed: dict[str, Float32Array] = {}
    valid = None
    for head, mixture in weights.items():
        per_expert = {expert: logits[expert][head] for expert in mixture}
        mixed[head], head_valid = mix(per_expert, usable, weights=mixture, missing=missing)
        valid = head_valid if valid is None else valid & head_valid
    if valid is None or not valid.any():
        raise InputError(f"the cache holds no usable teacher logits for split {split!r}; see `mmkd-cache inspect`")
    for value in mixed.values():
        value[~valid] = np.nan  # one head's experts may be there where another's are not
    return MixedTeacher(mixed, valid)


def cached_targets(teacher: MixedTeacher, rows: IntArray) -> ArrayTargets:
    """Return a target source over the split's `rows`, which its own rows count from 0."""
    return ArrayTargets({head: value[rows] for head, value in teacher.logits.items()})
