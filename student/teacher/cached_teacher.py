"""From cached experts to a teacher: weights chosen, then logits mixed shard by shard, each byte verified.

`mix_split` gives a whole split in memory, for evaluation; the training split's teacher is shared by all processes
of a node (see `mmkd.student.teacher.cached_targets`).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mmkd.cache_tools.cache.reader import CacheReader
from mmkd.cache_tools.frames.records import Float32Array
from mmkd.cache_tools.layout import label_array
from mmkd.data_manifests.errors import InputError
from mmkd.student.recipes.student import Missing
from mmkd.student.teacher.mixing import (
    HeadMixtures,
    Mixture,
    mean_cross_entropy,
    mix_head,
    mixable,
    parse_weights,
    softmin_weights,
    uniform_weights,
)
from mmkd.student.teacher.mixture_file import mixtures_from_file, split_spec

Block = tuple[slice, slice, Float32Array]
"""Rows, views, and the logits (rows, views, classes) there."""


@dataclass(frozen=True)
class MixedTeacher:
    """The teacher's logits for one split."""

    logits: Mapping[str, Float32Array]
    """Head -> float32 (rows, views, classes); NaN where `valid` is False."""
    valid: npt.NDArray[np.bool_]
    """(rows, views) whether the teacher has logits."""


def choose_mixtures(
    reader: CacheReader, spec: str, *, weights_temperature: float, train_split: str
) -> tuple[HeadMixtures, str | None]:
    """Return the mixture of each head for what `--weights` says, and a warning or None.

    `uniform`; `rgb=1,flow=2`; `FILE.json` or `FILE.json:scheme` (of `mmkd-cache weigh`); `heldout`, the softmin of
    each expert's mean cross-entropy on the held-out part of the training split, over `weights_temperature`
    (Radevski et al.), and uniform, with a warning, where nothing was held out; `per-sample`, the softmin of each
    view's own cross-entropies, over the same temperature, and uniform for clips without a label.
    """
    heads = [head.name for head in reader.heads]
    uniform = uniform_weights(reader.experts)
    named = split_spec(spec)
    if named is not None:
        return mixtures_from_file(reader, *named), None
    if spec == "per-sample":
        return dict.fromkeys(heads, Mixture(uniform, sample_temperature=weights_temperature)), None
    if spec == "heldout":
        return softmin_mixtures(reader, weights_temperature=weights_temperature, train_split=train_split)
    weights = uniform if spec == "uniform" else parse_weights(spec, reader.experts)
    return dict.fromkeys(heads, Mixture(weights)), None


def softmin_mixtures(
    reader: CacheReader, *, weights_temperature: float, train_split: str
) -> tuple[HeadMixtures, str | None]:
    """Return each head's softmin weights from the held-out clips, or uniform ones and a warning."""
    heads = [head.name for head in reader.heads]
    uniform = dict.fromkeys(heads, Mixture(uniform_weights(reader.experts)))
    if reader.held_out is None:
        return uniform, "the experts share no held-out part of the training split: uniform weights are used"
    if train_split not in reader.layouts:
        return (
            uniform,
            f"the cache has no split {train_split!r}, on which weights are fitted: uniform ones are used",
        )
    table = reader.split(train_split)
    rows = np.flatnonzero(reader.held_out.mask(reader.dataset, table.clip_ids))
    if not len(rows):
        return uniform, "no clip of the training split happens to be held out: uniform weights are used"
    errors: dict[str, dict[str, float]] = {head: {} for head in heads}
    for expert in reader.experts:
        usable = reader.usable(train_split, expert)[rows]
        for head, logits in reader.logits(train_split, expert, rows).items():
            errors[head][expert] = mean_cross_entropy(logits, table.labels[head][rows], usable)
    return {head: Mixture(softmin_weights(errors[head], weights_temperature)) for head in heads}, None


def mix_split(reader: CacheReader, split: str, mixtures: HeadMixtures, missing: Missing) -> MixedTeacher:
    """Read and mix the teacher of one split, to evaluate it.

    Raises InputError when it has logits for no view at all, or when it is weighed by the clips' true labels.
    """
    if any(mixture.sample_temperature is not None for mixture in mixtures.values()):
        raise InputError(
            f"weights per sample are made from the true labels: such a teacher gives training targets, and cannot "
            f"be evaluated on split {split!r}"
        )
    valid = valid_views(reader, split, mixtures, missing)
    classes = {head.name: len(head.classes) for head in reader.heads}
    mixed: dict[str, Float32Array] = {}
    for head, mixture in mixtures.items():
        mixed[head] = np.empty((*valid.shape, classes[head]), np.float32)
        for rows, views, values in mixed_blocks(reader, split, head, mixture=mixture, missing=missing, valid=valid):
            mixed[head][rows, views] = values
    return MixedTeacher(mixed, valid)


def valid_views(reader: CacheReader, split: str, mixtures: HeadMixtures, missing: Missing) -> npt.NDArray[np.bool_]:
    """Return (rows, views) whether every head has a teacher; raise InputError when no view has."""
    valid = teacher_views(reader, split, mixtures, missing)
    if not valid.any():
        raise InputError(f"the cache holds no usable teacher logits for split {split!r}; see `mmkd-cache inspect`")
    return valid


def teacher_views(
    reader: CacheReader, split: str, mixtures: HeadMixtures, missing: Missing
) -> npt.NDArray[np.bool_]:
    """Return (rows, views) whether every head has a teacher; raise InputError for an expert that is not there."""
    experts = sorted({expert for mixture in mixtures.values() for expert in mixture.weights})
    usable = {expert: reader.usable(split, expert) for expert in experts}
    valid: npt.NDArray[np.bool_] = np.logical_and.reduce(
        [mixable(usable, weights=mixture.weights, missing=missing) for mixture in mixtures.values()]
    )
    return valid


def mixed_blocks(
    reader: CacheReader,
    split: str,
    head: str,
    *,
    mixture: Mixture,
    missing: Missing,
    valid: npt.NDArray[np.bool_],
) -> Iterator[Block]:
    """Yield one head's teacher in the order of the shards; NaN where not valid.

    A shard of each expert is all that lies in memory. `valid` (rows, views) is `valid_views`'s: one head's experts
    may be there where another's are not.
    """
    usable = {expert: reader.usable(split, expert) for expert in mixture.weights}
    labels = reader.array(label_array(split, head))
    streams = [reader.logit_blocks(split, expert, head) for expert in mixture.weights]
    for parts in zip(*streams, strict=True):
        rows, views, _ = parts[0]
        logits = {expert: part[2] for expert, part in zip(mixture.weights, parts, strict=True)}
        present = {expert: mask[rows, views] for expert, mask in usable.items()}
        mixed, _ = mix_head(logits, present, mixture, missing=missing, labels=labels[rows])
        mixed[~valid[rows, views]] = np.nan
        yield rows, views, mixed
