"""Where a trainer's views come from: replayed from a cache, or drawn fresh by the same rules."""

from collections.abc import Sequence
from typing import Protocol

from mmkd.cache_tools.reader import SplitTable
from mmkd.cache_tools.records import ClipFacts, View
from mmkd.cache_tools.views import ViewPolicy, random_views


class ViewStream(Protocol):
    """Views by row and number."""

    views: int | None
    """How many view numbers there are; None when any number may be asked for."""

    def view(self, row: int, number: int) -> View:
        """Return one view."""
        ...


class StoredViews:
    """The views of one split of a cache, exactly as the teacher saw them."""

    def __init__(self, table: SplitTable, rows: Sequence[int]) -> None:
        """Serve the views of the table's `rows`, counted from 0."""
        self._table, self._rows = table, rows
        self.views: int | None = table.views

    def view(self, row: int, number: int) -> View:
        """Return stored view `number` of the clip."""
        return self._table.view(self._rows[row], number)


class DrawnViews:
    """Views drawn on demand; the first V of them are those that a cache of V views holds."""

    def __init__(
        self,
        facts: Sequence[ClipFacts],
        clip_ids: Sequence[str],
        policy: ViewPolicy,
        *,
        dataset: str,
        seed: int,
        flip_allowed: bool,
        views: int | None,
    ) -> None:
        """Draw for clips with these facts and ids; `views` limits the numbers (None: a new one each epoch)."""
        self._facts, self._clip_ids, self._policy = facts, clip_ids, policy
        self._dataset, self._seed, self._flip = dataset, seed, flip_allowed
        self.views = views

    def view(self, row: int, number: int) -> View:
        """Return view `number` of the clip."""
        (view,) = random_views(
            self._facts[row],
            self._policy,
            dataset=self._dataset,
            clip_id=self._clip_ids[row],
            seed=self._seed,
            flip_allowed=self._flip,
            numbers=(number,),
        )
        return view
