"""Where a trainer's views come from: replayed from a cache, or drawn fresh by the same rules."""

import threading
from collections.abc import Sequence
from functools import partial
from typing import Protocol

from mmkd.cache_tools.cache.split_table import SplitTable
from mmkd.cache_tools.frames.records import ClipFacts, facts_table
from mmkd.cache_tools.views.drawing import ClipTimes, ViewPolicy, random_view_table
from mmkd.cache_tools.views.view import View, ViewTable


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
    """Views drawn on demand, of all clips at once; the first V of them are those that a cache of V views holds."""

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
        times: ClipTimes | None = None,
    ) -> None:
        """Draw for clips with these facts and ids; `views` limits the numbers (None: a new one each epoch).

        Views by seconds need the `times` of each clip's frames.
        """
        self._draw = partial(
            random_view_table,
            facts_table(facts),
            policy,
            dataset=dataset,
            clip_ids=clip_ids,
            seed=seed,
            flip_allowed=flip_allowed,
            times=times,
        )
        self.views = views
        self._lock = threading.Lock()
        self._drawn: tuple[range, ViewTable | None] = (range(0), None)

    def view(self, row: int, number: int) -> View:
        """Return view `number` of the clip."""
        numbers, table = self._table(number)
        return table.view(row, number - numbers.start)

    def _table(self, number: int) -> tuple[range, ViewTable]:
        with self._lock:  # reading threads ask at once: one draws, the others wait and take what it drew
            numbers, table = self._drawn
            if table is None or number not in numbers:
                # Of all clips at once: drawing is vectorised, and an epoch asks for one number of every clip.
                numbers = range(self.views) if self.views is not None else range(number, number + 1)
                table = self._draw(numbers=numbers)
                self._drawn = numbers, table
            return numbers, table
