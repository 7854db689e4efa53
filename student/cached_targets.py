"""From cached experts to a teacher: weights chosen, then logits mixed shard by shard, each byte verified.

`mix_split` gives a whole split in memory, for evaluation; the training split's teacher is shared by all processes
of a node (see `mmkd.student.shared_targets`).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mmkd.cache_tools.layout import logits_array, maximum_array
from mmkd.cache_tools.mixing import (
    Missing,
    Weights,
    mean_cross_entropy,
    mix,
    mixable,
    parse_weights,
    softmin_weights,
)
from mmkd.cache_tools.precision import decode_logits
from mmkd.cache_tools.reader import CacheReader
from mmkd.cache_tools.records import Float32Array
from mmkd.data_manifests.errors import InputError

HeadWeights = dict[str, Weights]
"""Head -> expert -> weight."""
Block = tuple[slice, slice, Float32Array]
"""Rows, views, and the logits (rows, views, classes) there."""


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
    valid = valid_views(reader, split, weights, missing)
    classes = {head.name: len(head.classes) for head in reader.heads}
    mixed: dict[str, Float32Array] = {}
    for head, mixture in weights.items():
        mixed[head] = np.empty((*valid.shape, classes[head]), np.float32)
        for rows, views, values in mixed_blocks(reader, split, head, mixture=mixture, missing=missing, valid=valid):
            mixed[head][rows, views] = values
    return MixedTeacher(mixed, valid)


def valid_views(reader: CacheReader, split: str, weights: HeadWeights, missing: Missing) -> npt.NDArray[np.bool_]:
    """Return (rows, views) whether every head has a teacher; raise InputError when no view has."""
    experts = sorted({expert for mixture in weights.values() for expert in mixture})
    usable = {expert: reader.usable(split, expert) for expert in experts}
    valid: npt.NDArray[np.bool_] = np.logical_and.reduce(
        [mixable(usable, weights=mixture, missing=missing) for mixture in weights.values()]
    )
    if not valid.any():
        raise InputError(f"the cache holds no usable teacher logits for split {split!r}; see `mmkd-cache inspect`")
    return valid


def mixed_blocks(
    reader: CacheReader,
    split: str,
    head: str,
    *,
    mixture: Weights,
    missing: Missing,
    valid: npt.NDArray[np.bool_],
) -> Iterator[Block]:
    """Yield one head's teacher in the order of the shards; NaN where not valid.

    A shard of each expert is all that lies in memory. `valid` (rows, views) is `valid_views`'s: one head's experts
    may be there where another's are not.
    """
    usable = {expert: reader.usable(split, expert) for expert in mixture}
    streams = [logit_blocks(reader, split, expert, head) for expert in mixture]
    for parts in zip(*streams, strict=True):
        rows, views, _ = parts[0]
        logits = {expert: part[2] for expert, part in zip(mixture, parts, strict=True)}
        present = {expert: mask[rows, views] for expert, mask in usable.items()}
        mixed, _ = mix(logits, present, weights=mixture, missing=missing)
        mixed[~valid[rows, views]] = np.nan
        yield rows, views, mixed


def logit_blocks(reader: CacheReader, split: str, expert: str, head: str) -> Iterator[Block]:
    """Yield (rows, views, float32 (rows, views, classes)) of an expert's logits, in the order of the shards."""
    # Swap for CacheReader.blocks, shard by shard, once it is there: an array of one head lies in memory whole here.
    shifted = reader.array(logits_array(split, expert, head))
    maximum = reader.array(maximum_array(split, expert, head))
    for shard in reader.layout(split).shards():
        rows, views = slice(shard.rows.start, shard.rows.stop), slice(shard.views.start, shard.views.stop)
        yield rows, views, decode_logits(shifted[rows, views], maximum[rows, views])
