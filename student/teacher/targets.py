"""Where soft targets come from: one small protocol, so that the loop sees no store and no teacher."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mmkd.cache_tools.frames.records import Float32Array, IntArray


class TargetSource(Protocol):
    """The teacher's logits of clips under views: what the loop needs of `CachedTargets`."""

    def targets(self, rows: IntArray, views: IntArray) -> Mapping[str, Float32Array]:
        """Return head -> float32 (B, classes) for data-set rows (B,) under view numbers (B,).

        They are mixed and calibrated, before any temperature; a row without target may hold anything.
        """
        ...

    def valid(self, rows: IntArray, views: IntArray) -> npt.NDArray[np.bool_]:
        """Return (B,) whether there is a target."""
        ...


@dataclass(frozen=True)
class Targets:
    """The teacher's word on one batch, on the network's device."""

    logits: dict[str, Tensor]
    """Head -> float32 (B, classes), before the temperature; any value where not valid."""
    valid: Tensor
    """bool (B,): whether the row has a target."""

    def __post_init__(self) -> None:
        """Raise ValueError unless every head has one row of logits for each entry of `valid`."""
        if self.valid.dtype != torch.bool or self.valid.ndim != 1:
            raise ValueError(f"valid must be bool (B,), got {self.valid.dtype} {tuple(self.valid.shape)}")
        for head, logits in self.logits.items():
            if logits.ndim != 2 or logits.shape[0] != self.valid.shape[0]:
                raise ValueError(
                    f"targets of {head!r} must be ({self.valid.shape[0]}, C), got {tuple(logits.shape)}"
                )


def fetch_targets(source: TargetSource, rows: IntArray, views: IntArray, *, device: torch.device) -> Targets:
    """Return the targets of a batch on a device."""
    logits = {head: torch.from_numpy(value).to(device) for head, value in source.targets(rows, views).items()}
    return Targets(logits, torch.from_numpy(source.valid(rows, views)).to(device))
