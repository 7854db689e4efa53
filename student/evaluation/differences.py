"""How sure a difference between two models is: the paired bootstrap, over the clips that both of them have.

Clips are drawn with replacement, each with what both models make of it, and the middle 95 % of the differences in
top-1 are the interval (Efron, 1979; the percentile interval of Efron and Tibshirani, 1993, chapter 13). Of several
seeds, which share the clips, a clip's difference is the mean over seeds: the interval tells what other clips would
change, the spread over seeds what other seeds would. What it gives up: clips count as independent, so where many
come from one video the interval is too narrow.
"""

import hashlib
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mmkd.cache_tools.frames.records import IntArray
from mmkd.data_manifests.manifest import Clip
from mmkd.data_manifests.typed_json import STRICT
from mmkd.student.evaluation.evaluate import SplitScores

RESAMPLES = 10_000
LEVEL = 0.95
SEED = 0
"""Of the resamples: the same clips give the same interval."""


@dataclass(frozen=True)
class Pair:
    """A model beside the baseline, of one seed, on the clips of one part and head that count for both."""

    __pydantic_config__ = STRICT
    model: str
    """The model's row in the table."""
    baseline: str
    """That which it is compared with."""
    part: str
    """Split, or split/group."""
    head: str
    """Head."""
    count: int
    """Number n of clips."""
    clips: str
    """Hash of their ids, in order."""
    gained: str
    """Hexadecimal, a bit for each clip, most significant first: the model alone is right on it."""
    lost: str
    """As `gained`: the baseline alone is right."""

    def signs(self) -> IntArray:
        """Return (n,) 1 where the model alone is right, -1 where the baseline alone is, else 0; ValueError for
        other bits than n."""
        gained, lost = (_bits(text, self.count) for text in (self.gained, self.lost))
        return gained.astype(np.int64) - lost

    def key(self) -> tuple[str, str, str, str]:
        """Return what pairs of several seeds share."""
        return self.model, self.baseline, self.part, self.head


@dataclass(frozen=True)
class Difference:
    """How much larger a model's top-1 is than the baseline's, as fractions."""

    model: str
    """The model's row in the table."""
    baseline: str
    """That which it is compared with."""
    part: str
    """Split, or split/group."""
    head: str
    """Head."""
    counts: list[int]
    """Clips that both have, of each seed."""
    top1: float | None
    """Mean over seeds; None without a clip."""
    spread: float | None
    """Sample standard deviation over seeds; None for one."""
    low: float | None
    """Lower end of the interval; None without a clip, and for seeds over different clips."""
    high: float | None
    """Upper end."""
    resamples: int = RESAMPLES
    """How often the clips were drawn."""
    level: float = LEVEL
    """Share of the resamples within the interval."""
    seed: int = SEED
    """Seed of the resamples."""


def pairs_of(
    model: str,
    baseline: str,
    scores: Sequence[SplitScores],
    clips: Sequence[Clip],
    among: Mapping[str, set[str]] | None,
) -> Iterator[Pair]:
    """Yield the pairs of two models' scores (model, baseline) on the same split, of each part of `clips` and head.

    `among` (head -> clip ids) narrows down which clips count.
    """
    own, other = scores
    parts, other_parts = own.parts(clips), other.parts(clips)
    for part, members in parts.items():
        for head in own.heads_of(part):
            if head not in other.heads or (among is not None and head not in among):
                continue
            ours = own.right(head, members)
            theirs = other.right(head, other_parts[part])
            both = ours.keys() & theirs.keys() if among is None else ours.keys() & theirs.keys() & among[head]
            ids = sorted(both)
            signs = np.array([int(ours[clip]) - int(theirs[clip]) for clip in ids], np.int64)
            digest = hashlib.sha256("\n".join(ids).encode()).hexdigest()[:16]
            yield Pair(model, baseline, part, head, len(ids), digest, _hex(signs > 0), _hex(signs < 0))


def differences(pairs: Iterable[Pair]) -> list[Difference]:
    """Return the differences of pairs of one or several seeds, in the order of the first seed's."""
    groups: dict[tuple[str, str, str, str], list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(pair.key(), []).append(pair)
    return [_difference(own) for own in groups.values()]


def paired_bootstrap(
    signs: IntArray, *, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = SEED
) -> tuple[float, float]:
    """Return the ends of the percentile interval of the mean of integers (n,), n > 0, when n of them are drawn with
    replacement.

    How often each value comes up among n draws is multinomial, so that a resample costs as many numbers as there
    are different values, however many clips there are.
    """
    values, counts = np.unique(signs, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(signs), counts / len(signs), size=resamples)
    means = drawn @ values / len(signs)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _difference(seeds: Sequence[Pair]) -> Difference:
    signs = [pair.signs() for pair in seeds]
    means = [float(own.mean()) for own in signs if len(own)]
    low = high = None
    if len(means) == len(seeds) and len({(pair.count, pair.clips) for pair in seeds}) == 1:
        low, high = (end / len(seeds) for end in paired_bootstrap(np.sum(signs, axis=0)))
    return Difference(
        *seeds[0].key(),
        counts=[pair.count for pair in seeds],
        top1=statistics.fmean(means) if len(means) == len(seeds) else None,
        spread=statistics.stdev(means) if len(means) == len(seeds) > 1 else None,
        low=low,
        high=high,
    )


def _hex(values: npt.NDArray[np.bool_]) -> str:
    return np.packbits(values).tobytes().hex()


def _bits(text: str, count: int) -> npt.NDArray[np.uint8]:
    data = np.frombuffer(bytes.fromhex(text), np.uint8)
    if len(data) != -(-count // 8):
        raise ValueError(f"{len(data)} bytes hold what clips gained or lost, and {count} clips need another number")
    return np.unpackbits(data, count=count)
