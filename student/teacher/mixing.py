"""From experts to a teacher: the weighted sum of raw logits, with weights chosen after the fact.

Source: the weighting schemes of Radevski et al.'s public code: uniform, the softmin of each expert's mean
cross-entropy on held-out training clips over a weights temperature, or the same for each sample alone. Weights are
per head and sum to 1. Beyond the authors': a temperature per expert, which divides its logits before the sum.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from mmkd.cache_tools.cache.softmax import log_softmax
from mmkd.cache_tools.frames.records import Float32Array, Float64Array, IntArray
from mmkd.data_manifests.errors import InputError
from mmkd.student.recipes.student import Missing

SCHEMES = ("uniform", "heldout", "per-sample")
"""Weights by name, without a file."""
Mask = npt.NDArray[np.bool_]
Weights = dict[str, float]
"""Expert -> weight; positive, summing to 1."""

BLOCK_ROWS = 1024
"""Rows whose cross-entropies are computed at a time, in float64."""


@dataclass(frozen=True)
class Mixture:
    """How the logits of one head's experts become the teacher's."""

    weights: Weights
    """Expert -> weight; positive, summing to 1. With `sample_temperature`: those of clips without a label."""
    temperatures: Mapping[str, float] = field(default_factory=dict)
    """Expert -> what divides its logits; larger is flatter; 1 for experts that are left out."""
    sample_temperature: float | None = None
    """Where given, each row and view has weights of its own: the softmin of the experts' cross-entropies with its
    label, over this temperature. So such a teacher makes training targets alone."""

    def __post_init__(self) -> None:
        """Raise ValueError for weights that do not sum to 1, or numbers that are not positive."""
        numbers = [*self.weights.values(), *self.temperatures.values()]
        if self.sample_temperature is not None:
            numbers.append(self.sample_temperature)
        if not all(np.isfinite(number) and number > 0 for number in numbers):
            raise ValueError("weights and temperatures must be positive, finite numbers")
        if not abs(sum(self.weights.values()) - 1) < 1e-6:
            raise ValueError(f"the weights {self.weights} do not sum to 1")
        if extra := sorted(set(self.temperatures) - set(self.weights)):
            raise ValueError(f"temperatures for {extra} without weight")

    def to_json(self) -> dict[str, Any]:
        """Return it for files: weights alone where there is nothing else."""
        if not self.temperatures and self.sample_temperature is None:
            return dict(self.weights)
        value: dict[str, Any] = {"weights": dict(self.weights)}
        if self.temperatures:
            value["temperatures"] = dict(self.temperatures)
        if self.sample_temperature is not None:
            value["sample_temperature"] = self.sample_temperature
        return value

    @classmethod
    def from_json(cls, value: Any) -> "Mixture":
        """Return what `to_json` made; ValueError or TypeError for anything else."""
        if not isinstance(value, dict):
            raise TypeError(f"expected an object of weights, got {value!r:.40}")
        if not isinstance(value.get("weights"), dict):
            return cls(_numbers(value))
        unknown = set(value) - {"weights", "temperatures", "sample_temperature"}
        if unknown:
            raise ValueError(f"unknown keys {sorted(unknown)}")
        sample_temperature = value.get("sample_temperature")
        return cls(
            _numbers(value["weights"]),
            _numbers(value.get("temperatures", {})),
            None if sample_temperature is None else _numbers({"": sample_temperature})[""],
        )


HeadMixtures = dict[str, Mixture]
"""Head -> how its experts are mixed."""


def _numbers(value: Any) -> dict[str, float]:
    if not isinstance(value, dict) or not all(type(number) in (int, float) for number in value.values()):
        raise TypeError(f"expected expert: number pairs, got {value!r:.40}")
    return {name: float(number) for name, number in value.items()}


def uniform_weights(experts: tuple[str, ...]) -> Weights:
    """Return equal weights."""
    return {expert: 1 / len(experts) for expert in experts}


def parse_weights(text: str, experts: tuple[str, ...]) -> Weights:
    """Parse `rgb=1,flow=2` into weights that sum to 1; experts left out weigh nothing.

    Raises InputError for an unknown expert, a negative number or a sum of 0.
    """
    weights: Weights = {}
    for part in text.split(","):
        name, _, number = part.strip().partition("=")
        try:
            value = float(number)
        except ValueError:
            close = difflib.get_close_matches(part, SCHEMES, n=1)
            hint = f", did you mean {close[0]}?" if close else ""
            raise InputError(
                f"--weights {text!r}: {part!r} is not expert=number{hint} (schemes: {', '.join(SCHEMES)}, or "
                f"FILE.json[:SCHEME] of `mmkd-cache weigh`; experts: {', '.join(experts)})"
            ) from None
        if name not in experts or name in weights:
            raise InputError(f"--weights {text!r}: {name!r} is unknown or repeated; experts: {', '.join(experts)}")
        if not (np.isfinite(value) and value >= 0):
            raise InputError(f"--weights {text!r}: the weight of {name} must be a finite number, 0 or more")
        weights[name] = value
    total = sum(weights.values())
    if not 0 < total < np.inf:
        raise InputError(f"--weights {text!r}: the weights must have a positive, finite sum")
    return {name: value / total for name, value in weights.items() if value > 0}


def softmin_weights(mean_cross_entropy: Mapping[str, float], weights_temperature: float) -> Weights:
    """Return softmax(-CE / weights_temperature) over the experts; larger temperatures are more uniform.

    An expert whose weight vanishes in float64 is left out.
    """
    names = list(mean_cross_entropy)
    scores = -np.array([mean_cross_entropy[name] for name in names], np.float64) / weights_temperature
    weights = zip(names, np.exp(log_softmax(scores)).tolist(), strict=True)
    return {name: weight for name, weight in weights if weight > 0}


def mean_cross_entropy(logits: Float32Array, labels: IntArray, usable: Mask) -> float:
    """Return the mean cross-entropy in nats of (rows, views, classes) logits over usable, labelled views."""
    counted = usable & (labels >= 0)[:, None]
    if not counted.any():
        raise InputError("no held-out clip has both a label and usable logits; use uniform weights")
    rows, views = np.nonzero(counted)
    log_p = log_softmax(logits[rows, views].astype(np.float64))
    return float(-log_p[np.arange(len(rows)), labels[rows]].mean())


def cross_entropies(logits: Float32Array, labels: IntArray, usable: Mask) -> Float64Array:
    """Return the cross-entropy in nats of each row and view (rows, views); infinite where not usable.

    Rows without a label (-1) hold any number.
    """
    result = np.full(usable.shape, np.inf)
    for start in range(0, len(labels), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        own = np.broadcast_to(labels[rows, None].clip(0), usable[rows].shape)[usable[rows]]
        log_p = log_softmax(logits[rows][usable[rows]].astype(np.float64))
        result[rows][usable[rows]] = -log_p[np.arange(len(own)), own]
    return result


def sample_weights(
    logits: Mapping[str, Float32Array], usable: Mapping[str, Mask], labels: IntArray, *, mixture: Mixture
) -> dict[str, Float32Array]:
    """Return expert -> float32 (rows, views): each row and view's own weights, from its label.

    They are the softmin of the cross-entropies of the experts that are present, over the mixture's
    `sample_temperature`; where there is no label or no expert they are the mixture's weights.
    """
    if mixture.sample_temperature is None:
        raise ValueError("the mixture has no sample_temperature")
    errors = np.stack([cross_entropies(logits[name], labels, usable[name]) for name in mixture.weights], -1)
    known = (labels >= 0)[:, None] & np.isfinite(errors).any(-1)
    weights = np.broadcast_to(np.array(list(mixture.weights.values())), errors.shape).copy()
    weights[known] = np.exp(log_softmax(-errors[known] / mixture.sample_temperature))
    return {name: weights[..., i].astype(np.float32) for i, name in enumerate(mixture.weights)}


def mix(
    logits: Mapping[str, Float32Array],
    usable: Mapping[str, Mask],
    *,
    weights: Mapping[str, float | Float32Array],
    missing: Missing,
    temperatures: Mapping[str, float] | None = None,
) -> tuple[Float32Array, Mask]:
    """Return the teacher's logits (rows, views, classes) and where they exist (rows, views).

    Each expert's logits are divided by its temperature (default 1) and weighted, by a number or by its own
    (rows, views). Under `renormalise` the weights of the experts that are present are scaled to sum to 1; under
    `drop` and `label-only` a view has a teacher only when every weighted expert is present. Elsewhere the logits
    are NaN.
    """
    first = logits[next(iter(weights))]
    total = np.zeros(first.shape, np.float32)
    present = np.zeros(first.shape[:2], np.float64)
    for expert, weight in weights.items():
        factor = np.asarray(weight / (temperatures or {}).get(expert, 1.0), np.float32)[..., None]
        total += np.where(usable[expert][..., None], logits[expert] * factor, np.float32(0))
        present += np.where(usable[expert], weight, 0.0)
    whole = np.logical_and.reduce([usable[expert] for expert in weights])
    valid = mixable(usable, weights=weights, missing=missing)
    # A complete view is not rescaled: its weights sum to 1 only up to rounding.
    scale = np.where(whole, 1.0, present)
    with np.errstate(divide="ignore", invalid="ignore"):
        mixed = (total / scale[..., None]).astype(np.float32)
    mixed[~valid] = np.nan
    return mixed, valid


def mixable(usable: Mapping[str, Mask], *, weights: Mapping[str, float | Float32Array], missing: Missing) -> Mask:
    """Return (rows, views) where `mix` finds a teacher: all weighted experts, or under `renormalise` any."""
    join = np.logical_or if missing == "renormalise" else np.logical_and
    mask: Mask = join.reduce([usable[expert] for expert, weight in weights.items() if np.any(weight > 0)])
    return mask


def mix_head(
    logits: Mapping[str, Float32Array],
    usable: Mapping[str, Mask],
    mixture: Mixture,
    *,
    missing: Missing,
    labels: IntArray | None = None,
) -> tuple[Float32Array, Mask]:
    """Return what `mix` returns, for a mixture; one with a `sample_temperature` needs the `labels` (rows,)."""
    weights: Mapping[str, float | Float32Array] = mixture.weights
    if mixture.sample_temperature is not None:
        if labels is None:
            raise ValueError("weights per sample need labels")
        weights = sample_weights(logits, usable, labels, mixture=mixture)
    return mix(logits, usable, weights=weights, missing=missing, temperatures=mixture.temperatures)
