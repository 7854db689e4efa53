"""One split of a cache as a table: its clips, labels, views and thumbprints."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mmkd.cache_tools.frames.records import ClipFacts, IntArray
from mmkd.cache_tools.views.view import View, ViewTable


@dataclass(frozen=True)
class SplitTable:
    """What init wrote of one split: which clips, which views."""

    name: str
    """Name of the split."""
    clip_ids: tuple[str, ...]
    """(rows,) ids in row order."""
    labels: Mapping[str, IntArray]
    """Head -> int64 (rows,), -1 where absent."""
    facts: IntArray
    """(rows, 4) width, height, first frame, frame count; all 0 where the video could not be read."""
    drawn: ViewTable
    """The views of each clip."""

    @property
    def rows(self) -> int:
        """Number of clips."""
        return len(self.clip_ids)

    @property
    def views(self) -> int:
        """Number of views of each clip."""
        return int(self.drawn.flip.shape[1])

    @property
    def readable(self) -> npt.NDArray[np.bool_]:
        """(rows,) whether the probe could read the clip's video."""
        mask: npt.NDArray[np.bool_] = self.facts[:, 3] > 0
        return mask

    def view(self, row: int, number: int) -> View:
        """Return a stored view."""
        return self.drawn.view(row, number)

    def clip_facts(self, row: int) -> ClipFacts:
        """Return the facts from which the clip's views were drawn."""
        return ClipFacts(*(int(value) for value in self.facts[row]))
