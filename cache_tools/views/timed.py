"""Dense views by the clock: frames a stated time apart, whatever rate the video has.

EPIC-KITCHENS' videos have 29.97 to 90 frames a second, so that a stride in native frames means another time in
each. Here each frame is the one nearest in time; of two that are equally near, the earlier. The rules are those of
the authors' strided sampling (Radevski et al.: offsets in (L - T * stride + 1) // clips, and a short clip repeats
its last *sampled* frame), with seconds in the place of frames; at a constant rate they give the authors' frames.
"""

from collections.abc import Sequence

import numpy as np

from mmkd.cache_tools.frames.records import Float64Array, IntArray

TIE_SECONDS = 1e-6
"""By how much a time is moved to the earlier frame: rounding of time stamps then decides no tie."""


def median_interval_seconds(times_seconds: Float64Array) -> float:
    """Return the median time between neighbouring frames (N,); 0 for a single frame."""
    return float(np.median(np.diff(times_seconds))) if len(times_seconds) > 1 else 0.0


def start_count(times_seconds: Float64Array, *, frames: int, seconds_between_frames: float) -> int:
    """Return with how many of a clip's first frames (N,) a view may begin so that it ends in it; at least 1."""
    interval = median_interval_seconds(times_seconds)
    last_start = times_seconds[-1] + interval - frames * seconds_between_frames
    # A quarter of a frame more: containers round their time stamps, and recipes their seconds.
    return max(1, int(np.searchsorted(times_seconds, last_start + interval / 4, side="right")))


def timed_offsets(
    times_seconds: Float64Array, starts: IntArray, *, frames: int, seconds_between_frames: float
) -> IntArray:
    """Return frame offsets (..., T) in the clip of views that begin at the offsets `starts` (...).

    `times_seconds` (N,) are the times of the clip's frames, ascending. Times behind the clip's end repeat the last
    frame that was sampled.
    """
    steps = np.arange(frames)
    wanted = times_seconds[starts][..., None] + seconds_between_frames * steps
    middles = (times_seconds[:-1] + times_seconds[1:]) / 2
    nearest = np.searchsorted(middles, wanted - TIE_SECONDS)
    end = times_seconds[-1] + median_interval_seconds(times_seconds) / 2
    # The first one is always inside: its time is a frame's.
    inside = np.maximum(1, (wanted <= end - TIE_SECONDS).sum(-1, keepdims=True))
    return np.take_along_axis(nearest, np.minimum(steps, inside - 1), axis=-1).astype(np.int64)


def start_counts(times: Sequence[Float64Array], *, frames: int, seconds_between_frames: float) -> IntArray:
    """Return (rows,) `start_count` of each clip, given the times of its frames."""
    counts = [start_count(own, frames=frames, seconds_between_frames=seconds_between_frames) for own in times]
    return np.array(counts, np.int64)
