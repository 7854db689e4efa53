"""Where a trainer's views come from: replayed from a cache, or drawn fresh by the same rules."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from mmkd.cache_tools.cache.split_table import SplitTable
from mmkd.cache_tools.frames.clip_set import ClipVideo
from mmkd.cache_tools.views.drawing import ViewPolicy, random_views
from mmkd.cache_tools.views.view import View, ViewTable
from mmkd.student.data.packed_clips import PackedClips
from mmkd.student.data.shared_arrays import SharedArrays


class ViewStream(Protocol):
    """Views by row and number."""

    views: int | None
    """How many view numbers there are; None when any number may be asked for."""

    def view(self, row: int, number: int) -> View:
        """Return one view."""
        ...

    def packed(self, clips: PackedClips) -> "ViewStream":
        """Return the same views in a form that other processes share and do not copy."""
        ...


class StoredViews:
    """The views of one split of a cache, exactly as the teacher saw them."""

    def __init__(self, table: SplitTable, rows: Sequence[int]) -> None:
        """Serve the views of the table's `rows`, counted from 0."""
        self._drawn, self._rows = table.drawn, np.asarray(rows, np.int64)
        self.views: int | None = table.views

    def view(self, row: int, number: int) -> View:
        """Return stored view `number` of the clip."""
        return self._drawn.view(int(self._rows[row]), number)

    def packed(self, clips: PackedClips) -> ViewStream:
        """Return a copy of the rows' views that processes share."""
        drawn = self._drawn
        fields = {"frame_index": drawn.frame_index, "crop_xywh": drawn.crop_xywh, "flip": drawn.flip}
        return PackedViews(SharedArrays.of({name: value[self._rows] for name, value in fields.items()}))


class PackedViews:
    """Stored views that processes share."""

    def __init__(self, arrays: SharedArrays) -> None:
        """Serve the fields of a `ViewTable`."""
        self._arrays, self._table = arrays, ViewTable(**arrays)
        self.views: int | None = self._table.flip.shape[1]

    def __reduce__(self) -> tuple[Any, ...]:
        """Hand over the arrays' handle."""
        return PackedViews, (self._arrays,)

    def view(self, row: int, number: int) -> View:
        """Return stored view `number` of the clip."""
        return self._table.view(row, number)

    def packed(self, clips: PackedClips) -> ViewStream:
        """Return itself."""
        return self


class DrawnViews:
    """Views drawn on demand; the first V of them are those that a cache of V views holds."""

    def __init__(
        self,
        clips: Sequence[ClipVideo],
        policy: ViewPolicy,
        *,
        dataset: str,
        seed: int,
        flip_allowed: bool,
        views: int | None,
    ) -> None:
        """Draw for these clips; `views` limits the numbers (None: any may be asked for)."""
        self._clips, self._policy = clips, policy
        self._dataset, self._seed, self._flip_allowed = dataset, seed, flip_allowed
        self.views = views

    def view(self, row: int, number: int) -> View:
        """Return view `number` of the clip; drawing it takes some fifty microseconds."""
        item = self._clips[row]
        (view,) = random_views(
            item.facts,
            self._policy,
            dataset=self._dataset,
            clip_id=item.clip.clip_id,
            seed=self._seed,
            flip_allowed=self._flip_allowed,
            numbers=[number],
            times_seconds=item.times_seconds if self._policy.is_timed else None,
        )
        return view

    def packed(self, clips: PackedClips) -> ViewStream:
        """Return the same views, drawn from columns that processes share."""
        return DrawnViews(
            clips,
            self._policy,
            dataset=self._dataset,
            seed=self._seed,
            flip_allowed=self._flip_allowed,
            views=self.views,
        )
