"""Calibrated mixtures: a temperature per expert and their weights, fitted to labels by negative log-likelihood.

The NLL of sum_e a_e z_e with a_e = w_e / T_e is that of a multinomial logistic model: convex in the a_e, so it has
one optimum, and it fixes the a_e alone: (w, T) and (w', T') with equal quotients are the same teacher. What tells
them apart is chosen here: T_e is proportional to the spread of the expert's logits, so w_e is its share of the
teacher's spread. (Temperatures that calibrate each expert alone, the obvious other choice, give one that knows
nothing a large temperature and with it any weight, which its absence from a view then hands to the others.)

A prior on the logarithm of the common temperature keeps the fit finite where the clips are told apart without a
fault; on hundreds of views it changes nothing that can be seen. It gives up mixtures with negative coefficients.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name that every torch user expects
from torch import Tensor

from mmkd.cache_tools.frames.records import Float32Array, Float64Array, IntArray
from mmkd.student.teacher.mixing import Mixture

PRIOR_STD = 2.0
"""Standard deviation of log T under the prior: e^2 times too large costs half a nat, over all views together."""
MIN_WEIGHT = 1e-3
"""An expert that weighs less is left out: it changes little, and views that lack it would count as incomplete."""
MAX_VALUES = 2**27
"""Logits that are fitted on (1 GiB in float64); of more views every n-th is taken."""


def fit_calibrated(logits: Mapping[str, Float32Array], labels: IntArray) -> Mixture:
    """Return the mixture with the smallest NLL on the experts' logits (N, C) and labels (N,), all of them known.

    Weights are on the simplex by a softmax, the common temperature is positive by an exponential; L-BFGS.
    """
    z, y = as_tensors(np.stack(list(logits.values())), labels)
    spreads = torch.from_numpy(spread(z.numpy()))
    parameters = torch.zeros(len(logits) + 1, dtype=torch.float64, requires_grad=True)

    def loss() -> Tensor:
        weights, log_t = torch.softmax(parameters[:-1], 0), parameters[-1]
        mixed = torch.einsum("e,enc->nc", weights / (spreads * torch.exp(log_t)), z)
        # log_t is relative to the spreads: their mean is added, so that the prior is about T itself.
        prior = (log_t + spreads.log().mean()).square() / (2 * PRIOR_STD**2 * len(y))
        return F.cross_entropy(mixed, y) + prior

    minimise(parameters, loss)
    found = parameters.detach()
    weights = torch.softmax(found[:-1], 0).numpy()
    temperatures = (spreads * found[-1].exp()).numpy()
    kept = weights >= MIN_WEIGHT
    # Both are divided by what is kept, so that the quotients stay.
    weights, temperatures = (value[kept] / weights[kept].sum() for value in (weights, temperatures))
    names = [name for name, keep in zip(logits, kept, strict=True) if keep]
    return Mixture(
        dict(zip(names, weights.tolist(), strict=True)), dict(zip(names, temperatures.tolist(), strict=True))
    )


def spread(logits: Float64Array) -> Float64Array:
    """Return (E,) the root mean square of logits (E, N, C) about each view's mean; 1 where it is 0."""
    values: Float64Array = np.sqrt(logits.var(-1).mean(-1))
    return np.where(values > 0, values, 1.0)  # an expert that never varies is divided by nothing


def minimise(parameters: Tensor, loss: Callable[[], Tensor]) -> None:
    """Minimise a loss in place by L-BFGS, until its gradient or its progress vanishes."""
    optimizer = torch.optim.LBFGS(
        [parameters],
        max_iter=500,
        tolerance_grad=1e-9,
        tolerance_change=1e-13,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        optimizer.zero_grad()
        value = loss()
        value.backward()  # type: ignore[no-untyped-call]  # torch leaves Tensor.backward unannotated
        return value.item()

    optimizer.step(closure)  # type: ignore[no-untyped-call]  # so is LBFGS.step


def as_tensors(logits: Float32Array, labels: IntArray) -> tuple[Tensor, Tensor]:
    """Return logits (E, N, C) in float64 and labels (N,), of every n-th view where there are too many."""
    step = max(1, -(-logits.size // MAX_VALUES))
    return torch.from_numpy(logits[:, ::step].astype(np.float64)), torch.from_numpy(labels[::step])
