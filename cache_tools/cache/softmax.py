"""Softmax in float64, and how far two distributions lie apart: the measure of every storage error."""

import numpy as np
import numpy.typing as npt

from mmkd.cache_tools.frames.records import Float32Array


def kl_divergence(
    reference: Float32Array, other: Float32Array, temperature: float = 1.0
) -> npt.NDArray[np.float64]:
    """Return KL(softmax(reference/T) || softmax(other/T)) in nats for each row: float64 (...)."""
    log_p = log_softmax(reference.astype(np.float64) / temperature)
    log_q = log_softmax(other.astype(np.float64) / temperature)
    divergence: npt.NDArray[np.float64] = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    return np.maximum(divergence, 0.0)


def log_softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return log softmax over the last axis in float64."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result
