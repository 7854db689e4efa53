"""Views: deterministic looks at a clip, drawn from a keyed hash and from nothing else.

A random view is a pure function of (data set, clip id, view number, policy, seed) and the clip's facts. It
depends on no rank, order, epoch or number of tasks, and on no library's random distribution, since those change
between versions. Evaluation views are fixed by the facts alone. Both follow the sampling of Radevski et al.
(one frame from each of T equal segments, random when training, the middle one when testing; or strided), and
their scale rule: short side to S·U(a, b), then an S x S crop. We crop first and resize once, which is the same
window and reads fewer pixels.
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from mmkd.cache_tools.frames.records import ClipFacts, FactsTable, Float64Array, IntArray, UInt64Array, facts_table
from mmkd.cache_tools.recipes.recipe import Recipe
from mmkd.cache_tools.views.keyed_words import BLOCK_WORDS, below, stream_bytes, unit
from mmkd.cache_tools.views.timed import start_counts, timed_offsets
from mmkd.cache_tools.views.view import View, ViewTable

ClipTimes = Sequence[Float64Array | None]
"""(rows,) the times of each clip's frames in seconds, ascending; None for a clip without facts."""

VIEW_RULES = "views-1"
"""Name of the drawing rules in this file; part of every fingerprint."""


class ViewPolicy(Recipe):
    """How views look at a clip; the same for teacher and student."""

    sampling: Literal["uniform", "dense"] = Field(
        "uniform", description="uniform: one frame from each of T equal segments; dense: T frames, strided"
    )
    frames: int = Field(16, ge=1, le=256, description="T, frames in a view")
    stride: int = Field(
        2,
        ge=1,
        le=100_000,
        description="dense only: distance of neighbouring frames, in native frames, so another time at each rate",
    )
    seconds_between_frames: float | None = Field(
        None,
        gt=0,
        le=3600,
        description="dense only: distance of neighbouring frames in seconds, in place of stride",
    )
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

    @model_validator(mode="after")
    def _one_distance(self) -> Self:
        if self.seconds_between_frames is None:
            return self
        if self.sampling != "dense":
            raise ValueError(
                "seconds_between_frames needs sampling: dense; uniform views spread over the whole clip"
            )
        if "stride" in self.model_fields_set:
            raise ValueError("give stride or seconds_between_frames, not both: each is the distance of the frames")
        return self

    @property
    def is_timed(self) -> bool:
        """Whether the frames' distance is stated in seconds, so that drawing needs their times."""
        return self.seconds_between_frames is not None

    def identity(self) -> dict[str, Any]:
        """Return all that could change a view, as JSON; what existed before a field did stays as it was."""
        absent = {"seconds_between_frames"} if self.seconds_between_frames is None else {"stride"}
        return self.model_dump(mode="json", exclude=absent)

    @property
    def evaluation_views(self) -> int:
        """Number of evaluation views of each clip."""
        return self.evaluation_clips * self.evaluation_crops


TABLE_ROWS = 4096
"""Clips whose views are drawn together: larger is no faster and takes more memory."""


def random_views(
    facts: ClipFacts,
    policy: ViewPolicy,
    *,
    dataset: str,
    clip_id: str,
    seed: int,
    flip_allowed: bool,
    numbers: Sequence[int],
    times_seconds: Float64Array | None = None,
) -> tuple[View, ...]:
    """Return the training views of a clip with the given view numbers.

    `times_seconds` (frames,) are those of the clip's frames; views by seconds need them.
    """
    table = random_view_table(
        facts_table([facts]),
        policy,
        dataset=dataset,
        clip_ids=[clip_id],
        seed=seed,
        flip_allowed=flip_allowed,
        numbers=numbers,
        times=[times_seconds],
    )
    return tuple(table.view(0, column) for column in range(len(numbers)))


def evaluation_views(
    facts: ClipFacts, policy: ViewPolicy, times_seconds: Float64Array | None = None
) -> tuple[View, ...]:
    """Return the fixed views of a clip: temporal positions x windows (centre, or start, centre and end).

    `times_seconds` (frames,) are those of the clip's frames; views by seconds need them.
    """
    table = evaluation_view_table(facts_table([facts]), policy, [times_seconds])
    return tuple(table.view(0, column) for column in range(policy.evaluation_views))


def random_view_table(
    facts: FactsTable,
    policy: ViewPolicy,
    *,
    dataset: str,
    clip_ids: Sequence[str],
    seed: int,
    flip_allowed: bool,
    numbers: Sequence[int],
    times: ClipTimes | None = None,
) -> ViewTable:
    """Return the training views of all clips with the given view numbers; zeros for a clip without facts.

    Views by seconds need the clips' `times`.
    The words of a view's stream are, in order: one for each range of frames, scale, left, top, flip.
    """
    table = ViewTable.zeros(len(facts), len(numbers), policy.frames)
    blocks = -(-(_range_count(policy) + 4) // BLOCK_WORDS)
    name, tail = _encode(dataset), _key_tail(policy, seed)
    for rows, clips in _readable_blocks(facts, policy, times):
        heads = [f"[{name}, {_encode(clip_ids[row])}, " for row in rows.tolist()]
        streams = [stream_bytes(f"{head}{number}{tail}") for head in heads for number in numbers]
        drawn = b"".join(block for stream in streams for block in itertools.islice(stream, blocks))
        words = np.frombuffer(drawn, "<u8").reshape(len(rows), len(numbers), blocks * BLOCK_WORDS)
        frames, crops, tossed = _draw(words.astype(np.uint64), clips, policy)
        table.frame_index[rows] = frames
        table.crop_xywh[rows] = crops
        table.flip[rows] = tossed & flip_allowed
    return table


def evaluation_view_table(facts: FactsTable, policy: ViewPolicy, times: ClipTimes | None = None) -> ViewTable:
    """Return the views of all clips, those of `evaluation_views`; zeros for a clip without facts.

    Views by seconds need the clips' `times`.
    """
    table = ViewTable.zeros(len(facts), policy.evaluation_views, policy.frames)
    parts, places = 2 * np.arange(policy.evaluation_clips) + 1, np.arange(3)
    if policy.evaluation_crops == 1:
        places = places[1:2]
    for rows, clips in _readable_blocks(facts, policy, times):
        low, high = _frame_ranges(clips, policy)
        offsets = low + (high - low) * parts[:, None] // (2 * policy.evaluation_clips)  # (rows, positions, ranges)
        side = np.minimum(clips.width, clips.height)
        left, top = ((length - side) * places // 2 for length in (clips.width, clips.height))
        crops = np.stack(np.broadcast_arrays(left, top, side, side), axis=-1)  # (rows, windows, 4)
        table.frame_index[rows] = np.repeat(_frame_indices(offsets, clips, policy), len(places), axis=1)
        table.crop_xywh[rows] = np.tile(crops, (1, policy.evaluation_clips, 1))
    return table


@dataclass(frozen=True)
class _Clips:
    """The fields of `ClipFacts` as columns (rows, 1)."""

    width: IntArray
    height: IntArray
    first_frame: IntArray
    frame_count: IntArray
    times: Sequence[Float64Array] = ()
    """(rows,) times of each clip's frames; for views by seconds alone."""


def _readable_blocks(
    facts: FactsTable, policy: ViewPolicy, times: ClipTimes | None
) -> Iterator[tuple[IntArray, _Clips]]:
    """Yield the rows of clips with facts, and those facts, in blocks that bound the memory."""
    readable = np.flatnonzero(facts[:, 3])
    for start in range(0, len(readable), TABLE_ROWS):
        rows = readable[start : start + TABLE_ROWS]
        width, height, first_frame, frame_count = np.split(facts[rows].astype(np.int64), 4, axis=1)
        own = () if policy.seconds_between_frames is None else _times_of(rows, times)
        yield rows, _Clips(width, height, first_frame, frame_count, own)


def _times_of(rows: IntArray, times: ClipTimes | None) -> list[Float64Array]:
    found = [None if times is None else times[row] for row in rows.tolist()]
    known = [own for own in found if own is not None]
    if len(known) < len(found):
        raise ValueError("views by seconds need the times of every clip's frames")
    return known


def _draw(
    words: UInt64Array, clips: _Clips, policy: ViewPolicy
) -> tuple[IntArray, IntArray, npt.NDArray[np.bool_]]:
    """Turn words (rows, views, N) into frame indices (rows, views, T), crops (rows, views, 4) and tosses."""
    low, high = _frame_ranges(clips, policy)
    ranges = low.shape[-1]
    offsets = low + below(words[..., :ranges], high - low)
    of_scale, of_left, of_top, of_flip = (words[..., ranges + i] for i in range(4))
    smallest, largest = policy.scale
    factor = smallest + (largest - smallest) * unit(of_scale)
    # At least 1: by the largest scale, 8, a short side of 4 px or less rounds to a window of 0.
    side = np.maximum(1, np.rint(np.minimum(clips.width, clips.height) / factor)).astype(np.int64)
    left, top = below(of_left, clips.width - side + 1), below(of_top, clips.height - side + 1)
    tossed = below(of_flip, np.array(2)).astype(np.bool_)
    return _frame_indices(offsets, clips, policy), np.stack([left, top, side, side], axis=-1), tossed


_encode = json.JSONEncoder(sort_keys=True, ensure_ascii=False).encode


@lru_cache(maxsize=8)
def _key_tail(policy: ViewPolicy, seed: int) -> str:
    """Return the end of the key, the JSON [dataset, clip id, number, policy, seed]."""
    # Without the evaluation settings: to change them must not draw other training views.
    fields = policy.identity()
    del fields["evaluation_crops"], fields["evaluation_clips"]
    return f", {_encode(fields)}, {seed}]"


def _range_count(policy: ViewPolicy) -> int:
    return 1 if policy.sampling == "dense" else policy.frames


def _frame_ranges(clips: _Clips, policy: ViewPolicy) -> tuple[IntArray, IntArray]:
    """Return the half-open ranges (rows, 1, ranges) of frame offsets: one a segment, or one for the start."""
    frame_count = clips.frame_count
    if policy.seconds_between_frames is not None:
        seconds = policy.seconds_between_frames
        high = start_counts(clips.times, frames=policy.frames, seconds_between_frames=seconds)[:, None, None]
        return np.zeros_like(high), high
    if policy.sampling == "dense":
        span = (policy.frames - 1) * policy.stride + 1
        high = np.maximum(1, frame_count - span + 1)[:, None]
        return np.zeros_like(high), high
    bounds = (np.arange(policy.frames + 1) * frame_count // policy.frames)[:, None]
    low = bounds[..., :-1]
    # A clip of fewer frames than T has empty segments: each takes the frame that it begins at.
    return low, np.maximum(low + 1, bounds[..., 1:])


def _frame_indices(offsets: IntArray, clips: _Clips, policy: ViewPolicy) -> IntArray:
    """Return indices (rows, views, T) in the video from offsets (rows, views, ranges); the end repeats frames."""
    if policy.seconds_between_frames is not None:
        seconds = policy.seconds_between_frames
        offsets = np.stack(
            [
                timed_offsets(own, starts[:, 0], frames=policy.frames, seconds_between_frames=seconds)
                for own, starts in zip(clips.times, offsets, strict=True)
            ]
        )
        return clips.first_frame[:, None] + offsets
    if policy.sampling == "dense":
        offsets = offsets + policy.stride * np.arange(policy.frames)
    return clips.first_frame[:, None] + np.minimum(offsets, clips.frame_count[:, None] - 1)
