"""From experts to a teacher: the weighted sum of raw logits, with weights chosen after the fact.

Source: the weighting schemes of Radevski et al.'s public code: uniform, or the softmin of each expert's mean
cross-entropy on held-out training clips over a weights temperature. Weights are per head and sum to 1.
"""

from collections.abc import Mapping
from typing import Literal

import numpy as np
import numpy.typing as npt

from mmkd.cache_tools.precision import log_softmax
from mmkd.cache_tools.records import Float32Array, IntArray
from mmkd.data_manifests.errors import InputError

Missing = Literal["renormalise", "drop", "label-only"]
Mask = npt.NDArray[np.bool_]
Weights = dict[str, float]
"""Expert -> weight; positive, summing to 1."""


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
            raise InputError(f"--weights {text!r}: {part!r} is not expert=number") from None
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


def mix(
    logits: Mapping[str, Float32Array], usable: Mapping[str, Mask], *, weights: Weights, missing: Missing
) -> tuple[Float32Array, Mask]:
    """Return the teacher's logits (rows, views, classes) and where they exist (rows, views).

    Under `renormalise` the weights of the experts that are present are scaled to sum to 1; under `drop` and
    `label-only` a view has a teacher only when every weighted expert is present. Elsewhere the logits are NaN.
    """
    first = logits[next(iter(weights))]
    total = np.zeros(first.shape, np.float32)
    present = np.zeros(first.shape[:2], np.float64)
    for expert, weight in weights.items():
        total += np.where(usable[expert][..., None], logits[expert] * np.float32(weight), np.float32(0))
        present += np.where(usable[expert], weight, 0.0)
    whole = np.logical_and.reduce([usable[expert] for expert in weights])
    valid = mixable(usable, weights=weights, missing=missing)
    # A complete view is not rescaled: its weights sum to 1 only up to rounding.
    scale = np.where(whole, 1.0, present)
    with np.errstate(divide="ignore", invalid="ignore"):
        mixed = (total / scale[..., None]).astype(np.float32)
    mixed[~valid] = np.nan
    return mixed, valid


def mixable(usable: Mapping[str, Mask], *, weights: Weights, missing: Missing) -> Mask:
    """Return (rows, views) where `mix` finds a teacher: all weighted experts, or under `renormalise` any."""
    join = np.logical_or if missing == "renormalise" else np.logical_and
    mask: Mask = join.reduce([usable[expert] for expert, weight in weights.items() if weight > 0])
    return mask
