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
from collections.abc import Iterable, Iterator
from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from mmkd.cache_tools.recipes import Recipe
from mmkd.cache_tools.records import ClipFacts, IntArray, View

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
        text = json.dumps(key, sort_keys=True, ensure_ascii=False)
        self._key = hashlib.blake2b(text.encode(), digest_size=64).digest()
        self._words = self._stream()

    def _stream(self) -> Iterator[int]:
        counter = 0
        while True:
            block = hashlib.blake2b(counter.to_bytes(8, "little"), key=self._key, digest_size=64).digest()
            yield from (int.from_bytes(block[i : i + 8], "little") for i in range(0, 64, 8))
            counter += 1

    def below(self, n: int) -> int:
        """Return a whole number in 0..n-1 (bias below n / 2^64)."""
        return (next(self._words) * n) >> 64

    def unit(self) -> float:
        """Return a number in [0, 1) with 53 random bits."""
        return (next(self._words) >> 11) * 2.0**-53


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
    return tuple(
        _random_view(
            facts, policy, words=KeyedWords(dataset, clip_id, number, _key(policy), seed), flip=flip_allowed
        )
        for number in numbers
    )


def _key(policy: ViewPolicy) -> dict[str, object]:
    return policy.model_dump(mode="json", exclude={"evaluation_crops", "evaluation_clips"})


def _random_view(facts: ClipFacts, policy: ViewPolicy, *, words: KeyedWords, flip: bool) -> View:
    offsets = [
        low + words.below(high - low) for low, high in _frame_ranges(facts.frame_count, policy)
    ]  # dense: one range for the start
    scale = policy.scale[0] + (policy.scale[1] - policy.scale[0]) * words.unit()
    side = max(1, round(min(facts.width, facts.height) / scale))
    left, top = words.below(facts.width - side + 1), words.below(facts.height - side + 1)
    mirrored = bool(words.below(2)) and flip
    return View(_frame_indices(offsets, facts, policy), (left, top, side, side), mirrored)


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
