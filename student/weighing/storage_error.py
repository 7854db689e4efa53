"""How far the stored format can move a *mixed* teacher: a bound, since the exact logits are not in the cache.

A format says by how much each computed logit may differ from the decoded one (`StorageFormat.error_bound`). Mixed
with coefficients c_e = weight / temperature, class c of the teacher is off by h_c = sum_e c_e h_ec at most (and the
float32 roundings of mixing). For stored logits z, computed ones z + d, |d_c| <= h_c, q = softmax(z / T), t = 1 / T

    KL(softmax((z + d) / T) || q) = int_0^1 u Var_{p_u}(t d) du  <=  1/2 max_u E_{p_u}[(t d)^2]
                                  <= 1/2 sum_c q_c exp(t h_c) (t h_c)^2 / sum_c q_c exp(-t h_c)

where p_u is proportional to q exp(u t d). It is a bound for the worst case, in which every error is as large as it
can be and adds up over the experts; errors as they fall are several times smaller.
"""

from collections.abc import Mapping

import numpy as np

from mmkd.cache_tools.cache.logit_formats import StorageFormat
from mmkd.cache_tools.cache.softmax import log_softmax
from mmkd.cache_tools.frames.records import Float32Array, Float64Array
from mmkd.student.teacher.mixing import Mixture

FLOAT32_ROUNDING = 2.0**-24
"""Largest relative error of one operation in float32."""


def kl_bound(stored: Float64Array, half_widths: Float64Array, temperature: float) -> Float64Array:
    """Return (...) the largest KL(computed || stored) in nats for logits (..., C) off by `half_widths` at most."""
    log_q, h = log_softmax(stored / temperature), half_widths / temperature
    with np.errstate(over="ignore"):  # an error that large has no bound: infinity
        above = (np.exp(log_q + h) * h**2).sum(-1)
        below = np.exp(log_q - h).sum(-1)
        with np.errstate(divide="ignore", invalid="ignore"):
            bound: Float64Array = np.nan_to_num(0.5 * above / below, nan=np.inf, posinf=np.inf)
    return bound


def mixture_kl_bound(
    decoded: Mapping[str, Float32Array],
    half_widths: Mapping[str, Float64Array],
    mixture: Mixture,
    *,
    temperature: float,
) -> Float64Array:
    """Return (...) the bound for a mixture of experts' decoded logits (..., C), none of which is missing.

    Raises ValueError for weights per sample: they depend on the stored logits themselves.
    """
    if mixture.sample_temperature is not None:
        raise ValueError("weights per sample have no bound")
    shape = decoded[next(iter(mixture.weights))].shape
    mixed, half, size = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    for expert, weight in mixture.weights.items():
        coefficient = weight / mixture.temperatures.get(expert, 1.0)
        part = coefficient * decoded[expert].astype(np.float64)
        mixed += part
        size += np.abs(part)
        half += coefficient * half_widths[expert]
    # In float32: the coefficient, its product, and the sum over the experts.
    half += (len(mixture.weights) + 2) * FLOAT32_ROUNDING * size
    return kl_bound(mixed, half, temperature)


def half_widths(
    decoded: Mapping[str, Float32Array], formats: Mapping[str, StorageFormat]
) -> dict[str, Float64Array]:
    """Return expert -> (..., C) by how much each computed logit may differ from the decoded one."""
    return {expert: formats[expert].error_bound(value) for expert, value in decoded.items()}
