"""Weights after the fact: schemes fitted and compared on held-out clips, from cached logits alone.

Every figure is over views of clips on which no expert trained. What a scheme has to fit (softmin, calibrated) is
fitted on one half of the clips and scored on the other, both ways (cross-fitted); the weights that are written are
fitted on all of them. Weights per sample look at the label that they are scored on: an oracle, for training targets
alone. What it gives up: views without all experts are left out, and clips of one video may lie in both halves.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mmkd.cache_tools.cache.reader import CacheReader
from mmkd.cache_tools.cache.split_table import SplitTable
from mmkd.cache_tools.frames.records import Float32Array, IntArray
from mmkd.cache_tools.views.keyed_words import KeyedWords
from mmkd.data_manifests.counted import counted
from mmkd.data_manifests.errors import InputError
from mmkd.student.evaluation.metrics import Metrics, evaluate
from mmkd.student.teacher.mixing import (
    HeadMixtures,
    Mask,
    Mixture,
    mean_cross_entropy,
    mix_head,
    softmin_weights,
    uniform_weights,
)
from mmkd.student.weighing.calibration import fit_calibrated
from mmkd.student.weighing.storage_error import half_widths, mixture_kl_bound

How = Literal["not fitted", "cross-fitted", "same clips", "oracle"]
"""How figures relate to their clips: nothing was fitted; fitted on the other half; fitted on the very same clips;
made from their labels."""


@dataclass(frozen=True)
class HeadLogits:
    """What the experts say of one head on the clips that weights are fitted on."""

    logits: Mapping[str, Float32Array]
    """Expert -> float32 (clips, views, classes)."""
    usable: Mapping[str, Mask]
    """Expert -> (clips, views)."""
    labels: IntArray
    """(clips,) -1 where absent."""
    fold: IntArray
    """(clips,) 0 or 1: the half for cross-fitting."""

    @property
    def complete(self) -> Mask:
        """(clips, views) whether a view has a label and every expert."""
        mask: Mask = np.logical_and.reduce(list(self.usable.values())) & (self.labels >= 0)[:, None]
        return mask

    def half(self, fold: int) -> "HeadLogits":
        """Return the clips of one half."""
        rows = self.fold == fold
        return HeadLogits(
            {name: value[rows] for name, value in self.logits.items()},
            {name: value[rows] for name, value in self.usable.items()},
            self.labels[rows],
            self.fold[rows],
        )


def fit_uniform(data: HeadLogits, weights_temperature: float) -> Mixture:
    """Return equal weights."""
    return Mixture(uniform_weights(tuple(data.logits)))


def fit_softmin(data: HeadLogits, weights_temperature: float) -> Mixture:
    """Return the softmin of each expert's mean cross-entropy (Radevski et al.), as `--weights heldout` does."""
    errors = {name: mean_cross_entropy(z, data.labels, data.usable[name]) for name, z in data.logits.items()}
    return Mixture(softmin_weights(errors, weights_temperature))


def fit_nll(data: HeadLogits, weights_temperature: float) -> Mixture:
    """Return a temperature per expert and weights by NLL."""
    rows, views = np.nonzero(data.complete)
    return fit_calibrated({name: z[rows, views] for name, z in data.logits.items()}, data.labels[rows])


def fit_per_sample(data: HeadLogits, weights_temperature: float) -> Mixture:
    """Return weights for each sample, which need no fit."""
    return Mixture(uniform_weights(tuple(data.logits)), sample_temperature=weights_temperature)


Fit = Callable[[HeadLogits, float], Mixture]
"""(clips, weights temperature) -> mixture."""

SCHEMES: dict[str, Fit] = {
    "uniform": fit_uniform,
    "softmin": fit_softmin,
    "calibrated": fit_nll,
    "per-sample": fit_per_sample,
}
FITTED = frozenset({"softmin", "calibrated"})


@dataclass(frozen=True)
class Row:
    """A row of the table: one expert alone, or one scheme."""

    metrics: Metrics
    """Over complete views, each counted by itself."""
    how: How
    """How the figures relate to their clips."""
    mixture: Mixture
    """Fitted on all clips."""
    kl_bound: float | None = None
    """Largest KL in nats by which storage can have moved this teacher, over all views of the split that have every
    expert; None for single experts and weights per sample."""


@dataclass(frozen=True)
class WeighReport:
    """What `weigh_experts` found."""

    split: str
    """Split whose clips were used."""
    held_out: bool
    """Whether only its held-out part was."""
    clips: int
    """Clips that were looked at."""
    views: Mapping[str, int]
    """Head -> views that were scored: those with a label and every expert."""
    left_out: Mapping[str, int]
    """Head -> views that were not."""
    rows: Mapping[str, Mapping[str, Row]]
    """Head -> name of expert (as `rgb alone`) or scheme -> its row."""
    temperature: float
    """Temperature of the loss for which the storage error is bounded."""
    bound_views: Mapping[str, int]
    """Head -> views over which it is bounded."""
    stored_kl: Mapping[str, Mapping[str, float]]
    """Head -> expert -> largest KL of its stored from its computed logits: measured when the cache was built."""

    @property
    def mixtures(self) -> dict[str, HeadMixtures]:
        """Scheme -> head -> mixture."""
        return {scheme: {head: rows[scheme].mixture for head, rows in self.rows.items()} for scheme in SCHEMES}

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        rows = {
            head: {
                name: {
                    **asdict(row.metrics),
                    "how": row.how,
                    "mixture": row.mixture.to_json(),
                    "storage_kl_bound": row.kl_bound,
                }
                for name, row in named.items()
            }
            for head, named in self.rows.items()
        }
        names = ("split", "held_out", "clips", "views", "left_out", "temperature", "bound_views", "stored_kl")
        return {name: getattr(self, name) for name in names} | {"heads": rows}


def weigh_experts(
    reader: CacheReader,
    *,
    split: str | None = None,
    train_split: str,
    weights_temperature: float = 1.0,
    temperature: float = 1.0,
) -> WeighReport:
    """Fit every scheme on the held-out part of the training split, or on all of another labelled `split`.

    `temperature` is the lowest that the loss will have, for the bound of the storage error. Raises InputError when
    nothing was held out, or when no clip has a label and every expert.
    """
    name = split or train_split
    if split is None and train_split not in reader.layouts:
        raise InputError(
            f"the cache has no training split {train_split!r}, on whose held-out part weights are fitted; name "
            f"another labelled split with --split (it has {', '.join(reader.layouts)})"
        )
    table = reader.split(name)
    clips = chosen_clips(reader, table, train_split)
    views, left_out, rows, bound_views = {}, {}, {}, {}
    for head in (head.name for head in reader.heads):
        data = read_head(reader, table, head, clips)
        views[head] = int(data.complete.sum())
        left_out[head] = data.complete.size - views[head]
        if not views[head]:
            raise InputError(
                f"head {head!r}: none of {counted(len(clips), 'clip')} of split {name!r} has a "
                f"label and every expert"
            )
        scored = score(data, weights_temperature)
        # An oracle's weights depend on the stored logits themselves, so its error has no bound.
        bounded = {key: row.mixture for key, row in scored.items() if key in SCHEMES and row.how != "oracle"}
        bounds, bound_views[head] = storage_bounds(reader, name, head, bounded, temperature=temperature)
        rows[head] = {key: replace(row, kl_bound=bounds.get(key)) for key, row in scored.items()}
    return WeighReport(
        split=name,
        held_out=name == train_split,
        clips=len(clips),
        views=views,
        left_out=left_out,
        rows=rows,
        temperature=temperature,
        bound_views=bound_views,
        stored_kl=stored_kl(reader),
    )


def chosen_clips(reader: CacheReader, table: SplitTable, train_split: str) -> IntArray:
    """Return the rows that weights may be fitted on; InputError when the experts trained on all of the split."""
    if table.name != train_split:
        return np.arange(table.rows)
    if reader.held_out is None:
        raise InputError(
            f"the experts share no held-out part of split {train_split!r}, and what they trained on tells nothing; "
            f"name another labelled split with --split (the cache has {', '.join(reader.layouts)})"
        )
    rows = np.flatnonzero(reader.held_out.mask(reader.dataset, table.clip_ids))
    if not len(rows):
        raise InputError(f"no clip of split {train_split!r} happens to be held out; name another one with --split")
    return rows


def read_head(reader: CacheReader, table: SplitTable, head: str, clips: IntArray) -> HeadLogits:
    """Read one head's logits of the chosen rows."""
    logits = {expert: reader.head_logits(table.name, expert, head, clips) for expert in reader.experts}
    usable = {expert: reader.usable(table.name, expert)[clips] for expert in reader.experts}
    # Halves by hash, not by row: they are the same whatever the order of the clips and the number of views.
    draws = [KeyedWords("weigh-half", reader.dataset, table.clip_ids[row], 0).unit() for row in clips]
    fold = np.empty(len(clips), np.int64)
    fold[np.argsort(draws)] = np.arange(len(clips)) % 2
    return HeadLogits(logits, usable, table.labels[head][clips], fold)


def score(data: HeadLogits, weights_temperature: float) -> dict[str, Row]:
    """Return the table's rows: each expert alone, then each scheme."""
    rows = {}
    for expert in data.logits:
        alone = Mixture({expert: 1.0})
        rows[f"{expert} alone"] = Row(evaluate(*mixed_views(data, alone)), "not fitted", alone)
    for scheme, fit in SCHEMES.items():
        if scheme in FITTED:
            rows[scheme] = score_fitted(data, fit, weights_temperature)
        else:
            mixture = fit(data, weights_temperature)
            how: How = "not fitted" if mixture.sample_temperature is None else "oracle"
            rows[scheme] = Row(evaluate(*mixed_views(data, mixture)), how, mixture)
    return rows


def score_fitted(data: HeadLogits, fit: Fit, weights_temperature: float) -> Row:
    """Score what each half gives on the other half, as one set; on the same clips where a half is empty."""
    mixture, first, second = fit(data, weights_temperature), data.half(0), data.half(1)
    # A half without a complete view has nothing to fit on, and nothing to score.
    if not (first.complete.any() and second.complete.any()):
        return Row(evaluate(*mixed_views(data, mixture)), "same clips", mixture)
    scored = [
        mixed_views(second, fit(first, weights_temperature)),
        mixed_views(first, fit(second, weights_temperature)),
    ]
    logits, labels = (np.concatenate(parts) for parts in zip(*scored, strict=True))
    return Row(evaluate(logits, labels), "cross-fitted", mixture)


def mixed_views(data: HeadLogits, mixture: Mixture) -> tuple[Float32Array, IntArray]:
    """Return the teacher's logits (N, C) and labels (N,) of the complete views."""
    mixed, _ = mix_head(data.logits, data.usable, mixture, missing="drop", labels=data.labels)
    rows, views = np.nonzero(data.complete)
    return mixed[rows, views], data.labels[rows]


def storage_bounds(
    reader: CacheReader, split: str, head: str, mixtures: Mapping[str, Mixture], *, temperature: float
) -> tuple[dict[str, float], int]:
    """Return name -> bound of the storage error over the split's views that have every expert, and their number."""
    formats = {expert: reader.storage(expert) for expert in reader.experts}
    usable = np.logical_and.reduce([reader.usable(split, expert) for expert in reader.experts])
    bounds, count = dict.fromkeys(mixtures, 0.0), 0
    streams = [reader.logit_blocks(split, expert, head) for expert in reader.experts]
    for parts in zip(*streams, strict=True):
        rows, views, _ = parts[0]
        present: npt.NDArray[np.bool_] = usable[rows, views]
        logits = {expert: part[2][present] for expert, part in zip(reader.experts, parts, strict=True)}
        widths, count = half_widths(logits, formats), count + int(present.sum())
        for name, mixture in mixtures.items():
            found = mixture_kl_bound(logits, widths, mixture, temperature=temperature)
            bounds[name] = max(bounds[name], float(found.max(initial=0.0)))
    return bounds, count


def stored_kl(reader: CacheReader) -> dict[str, dict[str, float]]:
    """Return head -> expert -> the largest KL that the build measured, over all shards."""
    found: dict[str, dict[str, float]] = {head.name: dict.fromkeys(reader.experts, 0.0) for head in reader.heads}
    for record in reader.records:
        for head, value in record.worst_kl.items():
            found[head][record.node] = max(found[head][record.node], value)
    return found
