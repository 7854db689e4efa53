"""What a key map is: how one project's names for parameters become those of our networks.

A map renames, and may reorder values where the projects count differently; it never drops a parameter. A
classifier's weight and bias are kept by the name of its head, since its classes are somebody's own.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor


def as_it_is(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return parameters unchanged."""
    return state


@dataclass(frozen=True, kw_only=True)
class KeyMap:
    """The names of one project."""

    name: str
    """What recipes and commands call it."""
    source: str
    """Whose files have such names, in a few words."""
    networks: tuple[str, ...] = ()
    """Networks that such a file may be; empty: any."""
    marks: tuple[str, ...] = ()
    """Expressions, each of which some name fits, by which such a file is recognised."""
    renames: tuple[tuple[str, str], ...] = ()
    """(expression, replacement), applied to a backbone's name one after the other."""
    classifier: str
    """Expression of a classifier's parameters, with groups `part` (weight or bias) and, where named, `head`."""
    rows: Mapping[int, Mapping[str, int]] = field(default_factory=dict)
    """Rows of a classifier that is several in one -> name and rows of each, in order."""
    layout: Mapping[str, float | bool] = field(default_factory=dict)
    """Boxes only: fields of the layout's recipe that such a network always has."""
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]] = as_it_is
    """What is done to a renamed backbone's values."""

    def fits(self, names: set[str]) -> bool:
        """Return whether a file with these bare names is this project's."""
        return all(any(re.search(mark, name) for name in names) for mark in self.marks)

    def rename(self, name: str) -> str:
        """Return the name in our backbone."""
        for expression, replacement in self.renames:
            name = re.sub(expression, replacement, name)
        return name


@dataclass(frozen=True)
class Classifier:
    """A linear layer from features to classes, as it was in the file."""

    weight: Tensor
    """Floating (classes, features)."""
    bias: Tensor | None
    """Floating (classes,); None where the layer has none."""


@dataclass(frozen=True)
class MappedWeights:
    """A checkpoint by our networks' names."""

    map: KeyMap
    """The map that was used."""
    backbone: dict[str, Tensor]
    """Our name -> parameter or buffer."""
    classifiers: dict[str, Classifier]
    """Head's name in the file (`head` where it has none) -> its layer."""
    names: dict[str, str]
    """Our name, or `head.weight` and `head.bias` for a classifier's head -> name in the file."""
