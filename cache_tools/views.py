"""Views: deterministic looks at a clip, drawn from a keyed hash and from nothing else.

A random view is a pure function of (data set, clip id, view number, policy, seed) and the clip's facts. It
depends on no rank, order, epoch or number of tasks, and on no library's random distribution, since those change
between versions. Evaluation views are fixed by the facts alone. Both follow the sampling of Radevski et al.
(one frame from each of T equal segments, random when training, the middle one when testing; or strided), and
their scale rule: short side to S·U(a, b), then an S x S crop. We crop first and resize once, which is the same
window and reads fewer pixels.
"""

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from mmkd.cache_tools.recipes import Recipe
from mmkd.cache_tools.records import ClipFacts, IntArray, View, ViewTable

VIEW_RULES = "views-1"
"""Name of the drawing rules in this file; part of every fingerprint."""


class ViewPolicy(Recipe):
    """How views look at a clip; the same for teacher and student."""

    sampling: Literal["uniform", "dense"] = Field(
        "uniform", description="uniform: one frame from each of T equal segments; dense: T frames, strided"
    )
    frames: int = Field(16, ge=1, le=256, description="T, frames in a view")
    stride: int = Field(2, ge=1, description="dense only: distance of neighbouring frames, in native frames")
    size_px: int = Field(224, ge=8, le=1024, description="S, side of the square view in pixels")
    scale: tuple[float, float] = Field(
        (1.15, 1.43), description="(a, b): the short side is scaled to S times a factor drawn from U(a, b)"
    )
    evaluation_crops: Literal[1, 3] = Field(1, description="windows along the long side when testing")
    evaluation_clips: int = Field(1, ge=1, le=32, description="temporal positions when testing")

    @model_validator(mode="after")
    def _scale_is_a_range(self) -> Self:
        if not 1 <= self.scale[0] <= self.scale[1] <= 8:
            raise ValueError("scale must be (a, b) with 1 <= a <= b <= 8")
        return self

    @property
    def evaluation_views(self) -> int:
        """Number of evaluation views of each clip."""
        return self.evaluation_clips * self.evaluation_crops


class KeyedWords:
    """An endless stream of 64-bit words that is a function of its key alone (BLAKE2b in counter mode)."""

    def __init__(self, *key: object) -> None:
        """Start the stream of `key`, whose parts must be JSON values."""
        self._words = self._stream(hash_key(json.dumps(key, sort_keys=True, ensure_ascii=False)))

    @staticmethod
    def _stream(key: bytes) -> Iterator[int]:
        counter = 0
        while True:
            yield from word_block(key, counter)
            counter += 1

    def below(self, n: int) -> int:
        """Return a whole number in 0..n-1 (bias below n / 2^64)."""
        return below(next(self._words), n)

    def unit(self) -> float:
        """Return a number in [0, 1) with 53 random bits."""
        return unit(next(self._words))


BLOCK_WORDS = 8


def hash_key(text: str) -> bytes:
    """Return the 64-byte key of a stream, from the canonical JSON of what it is a function of."""
    return hashlib.blake2b(text.encode(), digest_size=64).digest()


def word_block(key: bytes, counter: int) -> tuple[int, ...]:
    """Return words 8·counter to 8·counter + 7 of the key's stream."""
    return struct.unpack("<8Q", hashlib.blake2b(counter.to_bytes(8, "little"), key=key, digest_size=64).digest())


def below(word: int, n: int) -> int:
    """Return a whole number in 0..n-1 made of a word (bias below n / 2^64)."""
    return (word * n) >> 64


def unit(word: int) -> float:
    """Return a number in [0, 1) with 53 random bits made of a word."""
    return (word >> 11) * 2.0**-53


def random_views(
    facts: ClipFacts,
    policy: ViewPolicy,
    *,
    dataset: str,
    clip_id: str,
    seed: int,
    flip_allowed: bool,
    numbers: Iterable[int],
) -> tuple[View, ...]:
    """Return the training views of a clip with the given view numbers."""
    drawn = _draw(facts, policy, dataset=dataset, clip_id=clip_id, seed=seed, numbers=numbers)
    return tuple(
        View(_frame_indices(offsets, facts, policy), crop, mirrored and flip_allowed)
        for offsets, crop, mirrored in drawn
    )


def random_view_table(
    facts: Sequence[ClipFacts | None],
    policy: ViewPolicy,
    *,
    dataset: str,
    clip_ids: Sequence[str],
    seed: int,
    flip_allowed: bool,
    views: int,
) -> ViewTable:
    """Return views 0..views-1 of all clips, those of `random_views`; zeros for a clip without facts."""
    table = ViewTable.zeros(len(facts), views, policy.frames)
    for row, (clip, clip_id) in enumerate(zip(facts, clip_ids, strict=True)):
        if clip is None:
            continue
        drawn = _draw(clip, policy, dataset=dataset, clip_id=clip_id, seed=seed, numbers=range(views))
        for number, (offsets, crop, mirrored) in enumerate(drawn):
            table.frame_index[row, number] = _frame_indices(offsets, clip, policy)
            table.crop_xywh[row, number] = crop
            table.flip[row, number] = mirrored and flip_allowed
    return table


def evaluation_view_table(facts: Sequence[ClipFacts | None], policy: ViewPolicy) -> ViewTable:
    """Return the views of all clips, those of `evaluation_views`; zeros for a clip without facts."""
    table = ViewTable.zeros(len(facts), policy.evaluation_views, policy.frames)
    for row, clip in enumerate(facts):
        for number, view in enumerate(() if clip is None else evaluation_views(clip, policy)):
            table.frame_index[row, number] = view.frame_indices
            table.crop_xywh[row, number] = view.crop_xywh
    return table


def _draw(
    facts: ClipFacts, policy: ViewPolicy, *, dataset: str, clip_id: str, seed: int, numbers: Iterable[int]
) -> Iterator[tuple[list[int], tuple[int, int, int, int], bool]]:
    """Yield frame offsets, crop and the toss of the flip of each view."""
    ranges = _frame_ranges(facts.frame_count, policy)  # dense: one range for the start
    count = len(ranges) + 4
    low, high = policy.scale
    head, tail = f"[{_encode(dataset)}, {_encode(clip_id)}, ", _key_tail(policy, seed)
    for number in numbers:
        key = hash_key(f"{head}{number}{tail}")  # of the JSON [dataset, clip id, number, policy, seed]
        words = [word for block in range(-(-count // BLOCK_WORDS)) for word in word_block(key, block)]
        offsets = [start + below(word, stop - start) for word, (start, stop) in zip(words, ranges, strict=False)]
        of_scale, of_left, of_top, of_flip = words[len(ranges) : count]
        side = max(1, round(min(facts.width, facts.height) / (low + (high - low) * unit(of_scale))))
        left, top = below(of_left, facts.width - side + 1), below(of_top, facts.height - side + 1)
        yield offsets, (left, top, side, side), bool(below(of_flip, 2))


_encode = json.JSONEncoder(sort_keys=True, ensure_ascii=False).encode


@lru_cache(maxsize=8)
def _key_tail(policy: ViewPolicy, seed: int) -> str:
    fields = policy.model_dump(mode="json", exclude={"evaluation_crops", "evaluation_clips"})
    return f", {_encode(fields)}, {seed}]"


def evaluation_views(facts: ClipFacts, policy: ViewPolicy) -> tuple[View, ...]:
    """Return the fixed views of a clip: temporal positions x windows (centre, or start, centre and end)."""
    side = min(facts.width, facts.height)
    slack_x, slack_y = facts.width - side, facts.height - side
    places = (1,) if policy.evaluation_crops == 1 else (0, 1, 2)
    crops = [(slack_x * place // 2, slack_y * place // 2, side, side) for place in places]
    views = []
    for position in range(policy.evaluation_clips):
        part, parts = 2 * position + 1, 2 * policy.evaluation_clips
        offsets = [low + (high - low) * part // parts for low, high in _frame_ranges(facts.frame_count, policy)]
        views += [View(_frame_indices(offsets, facts, policy), crop, False) for crop in crops]
    return tuple(views)


@lru_cache(maxsize=4096)
def _frame_ranges(frame_count: int, policy: ViewPolicy) -> list[tuple[int, int]]:
    """Return the half-open ranges from which frame offsets are drawn: one a segment, or one for the start."""
    if policy.sampling == "dense":
        span = (policy.frames - 1) * policy.stride + 1
        return [(0, max(1, frame_count - span + 1))]
    t = policy.frames
    bounds = [(i * frame_count // t, (i + 1) * frame_count // t) for i in range(t)]
    return [(low, max(low + 1, high)) for low, high in bounds]


def _frame_indices(offsets: list[int], facts: ClipFacts, policy: ViewPolicy) -> IntArray:
    if policy.sampling == "dense":
        offsets = [offsets[0] + i * policy.stride for i in range(policy.frames)]
    return facts.first_frame + np.minimum(np.array(offsets, np.int64), facts.frame_count - 1)
