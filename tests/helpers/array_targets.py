"""Soft targets that lie in memory as arrays: for a loop without a cache."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mmkd.cache_tools.frames.records import Float32Array, IntArray


@dataclass(frozen=True)
class ArrayTargets:
    """Targets in memory, as a `TargetSource`."""

    logits: Mapping[str, Float32Array]
    """Head -> float32 (rows, views, classes); NaN where there is none."""

    def targets(self, rows: IntArray, views: IntArray) -> dict[str, Float32Array]:
        """Return the logits of rows (B,) under views (B,)."""
        return {head: array[rows, views] for head, array in self.logits.items()}

    def valid(self, rows: IntArray, views: IntArray) -> npt.NDArray[np.bool_]:
        """Return whether all of a row's logits are finite."""
        finite = [np.isfinite(value).all(1) for value in self.targets(rows, views).values()]
        mask: npt.NDArray[np.bool_] = np.logical_and.reduce(finite)
        return mask
