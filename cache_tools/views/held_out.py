"""The held-out part of train: clips on which no expert trains, so that weights can be fitted on them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mmkd.cache_tools.views.keyed_words import KeyedWords
from mmkd.data_manifests.typed_json import STRICT


@dataclass(frozen=True)
class HeldOut:
    """A seeded share of a split; which clips belong to it depends on their ids alone."""

    __pydantic_config__ = STRICT
    fraction: float
    """Expected share of the clips, 0..1; 0 means that nothing is held out."""
    seed: int
    """Seed of the draw."""

    def __post_init__(self) -> None:
        """Raise ValueError for a share that is none."""
        if not 0 <= self.fraction <= 1:
            raise ValueError(f"a share of {self.fraction} is not between 0 and 1")

    def mask(self, dataset: str, clip_ids: Sequence[str]) -> npt.NDArray[np.bool_]:
        """Return (rows,) whether each clip is held out."""
        draws = [KeyedWords("held-out", dataset, clip_id, self.seed).unit() for clip_id in clip_ids]
        return np.array(draws) < self.fraction


def common_held_out(parts: Iterable[HeldOut]) -> HeldOut | None:
    """Return the part that all experts left out, given each one's; None where there is none."""
    found = set(parts)
    common = found.pop() if len(found) == 1 else None
    return common if common and common.fraction else None
