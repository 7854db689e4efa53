"""The processes that train one run together; so far this one alone."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Ranks:
    """This process among those of a run."""

    rank: int = 0
    """Number of this process, from 0."""
    count: int = 1
    """How many there are."""

    @property
    def is_first(self) -> bool:
        """Whether this process writes and reports."""
        return self.rank == 0


ALONE = Ranks()
