"""How the parameters of a file and those of a network compare, by name and shape, and the words for what
differs."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

SHOWN = 3
COMPUTED = (".num_batches_tracked", ".relative_position_index")
"""Ends of buffers that a network computes itself; files of old versions of torch lack the first."""


@dataclass(frozen=True)
class Fit:
    """How a file's parameters and a network's compare, by our names."""

    missing: tuple[str, ...]
    """Of the network, and not in the file."""
    unexpected: tuple[str, ...]
    """In the file, and not of the network."""
    misshapen: tuple[str, ...]
    """In both, with other sizes."""
    computed: tuple[str, ...]
    """Buffers that the file lacks and the network computes."""

    @property
    def problems(self) -> str:
        """What does not fit, in words; empty where all does."""
        groups = (
            ("missing", self.missing),
            ("unexpected", self.unexpected),
            ("of another shape", self.misshapen),
        )
        return "; ".join(
            f"{len(names)} {what} ({', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''})"
            for what, names in groups
            if names
        )


def fit_of(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> Fit:
    """Compare a file's parameters with a network's state."""
    absent = sorted(set(wanted) - set(state))
    return Fit(
        missing=tuple(name for name in absent if not name.endswith(COMPUTED)),
        unexpected=tuple(sorted(set(state) - set(wanted))),
        misshapen=tuple(name for name in wanted if name in state and state[name].shape != wanted[name].shape),
        computed=tuple(name for name in absent if name.endswith(COMPUTED)),
    )
