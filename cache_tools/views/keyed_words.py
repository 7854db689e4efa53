"""Random words that depend on a key alone: on no library's distribution, rank, order or epoch."""

import hashlib
import itertools
import json
import struct
from collections.abc import Iterator

import numpy as np

from mmkd.cache_tools.frames.records import Float64Array, IntArray, UInt64Array


class KeyedWords:
    """An endless stream of 64-bit words that is a function of its key alone (BLAKE2b in counter mode)."""

    def __init__(self, *key: object) -> None:
        """Start the stream of `key`, whose parts must be JSON values."""
        self._words = self._stream(json.dumps(key, sort_keys=True, ensure_ascii=False))

    @staticmethod
    def _stream(key: str) -> Iterator[int]:
        words = stream_bytes(key)
        while True:
            yield from struct.unpack("<8Q", next(words))

    def below(self, n: int) -> int:
        """Return a whole number in 0..n-1 (bias below n / 2^64)."""
        return (next(self._words) * n) >> 64

    def unit(self) -> float:
        """Return a number in [0, 1) with 53 random bits."""
        return (next(self._words) >> 11) * 2.0**-53


BLOCK_WORDS = 8


def stream_bytes(key: str) -> Iterator[bytes]:
    """Yield the stream of a key, the JSON of what it is a function of, in blocks of 8 little-endian words."""
    # Hashed first, since a key of BLAKE2b has at most 64 bytes.
    digest = hashlib.blake2b(key.encode(), digest_size=64).digest()
    for counter in itertools.count():
        yield hashlib.blake2b(counter.to_bytes(8, "little"), key=digest, digest_size=64).digest()


def below(words: UInt64Array, n: IntArray) -> IntArray:
    """Return `KeyedWords.below` of arrays: (word * n) >> 64 for n below 2^32, in halves of 32 bits."""
    n = n.astype(np.uint64)
    # word * n needs up to 96 bits; the product with a half fits into 64.
    high, low = (words >> 32) * n, (words & 0xFFFFFFFF) * n
    return ((high + (low >> 32)) >> 32).astype(np.int64)


def unit(words: UInt64Array) -> Float64Array:
    """Return `KeyedWords.unit` of an array."""
    return (words >> 11).astype(np.float64) * 2.0**-53  # 53 bits: with more, rounding could give 1.0
