"""Random numbers of the demo data set: raw generator words only, so that they never change between versions.

NumPy promises a stable bit stream for a bit generator but not for its distributions, so nothing here uses one
beyond `random()` (a fixed function of one 64-bit word) and `bytes()`.
"""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

Item = TypeVar("Item")


class Draw:
    """A stream of random choices that is a pure function of its integer key."""

    def __init__(self, *key: int) -> None:
        """Start the stream of `key`; other keys give independent streams."""
        self._generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))

    def uniform(self, low: float, high: float) -> float:
        """Return a number in [low, high)."""
        return low + (high - low) * float(self._generator.random())

    def chance(self, probability: float) -> bool:
        """Return True with `probability`."""
        return float(self._generator.random()) < probability

    def sign(self) -> float:
        """Return -1.0 or 1.0."""
        return 1.0 if self.chance(0.5) else -1.0

    def pick(self, items: Sequence[Item]) -> Item:
        """Return one of `items`."""
        return items[int(float(self._generator.random()) * len(items))]

    def whole(self, low: int, high: int) -> int:
        """Return an integer in low..high, both included."""
        return low + int(float(self._generator.random()) * (high - low + 1))

    def shuffled(self, items: Sequence[Item]) -> list[Item]:
        """Return the items in random order."""
        keys = self._generator.random(len(items))
        return [items[i] for i in np.argsort(keys, kind="stable")]  # stable: no sort's whim between equal keys

    def noise(self, *shape: int) -> npt.NDArray[np.float32]:
        """Return triangular noise of mean 0 and standard deviation 1: two uniform bytes added and scaled."""
        count = int(np.prod(shape))
        words = np.frombuffer(self._generator.bytes(2 * count), np.uint8).reshape(2, *shape)
        # Two bytes have a sum of mean 255 and standard deviation sqrt((256^2 - 1) / 6), 104.5.
        return np.asarray((words.astype(np.float32).sum(axis=0) - 255.0) / 104.5, np.float32)
