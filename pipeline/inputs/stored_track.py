"""Boxes of one video in a table of detections, near a clip's frame times, in slots.

Where boxes have tracks, a slot holds the same track in every frame. A detector's have none: each slot of a frame
holds its next best box, hands before objects.
"""

from dataclasses import dataclass

import numpy as np

from mmkd.cache_tools.frames.records import Float32Array, Float64Array, IntArray, UInt8Array
from mmkd.pipeline.detections.records import VideoDetections
from mmkd.pipeline.detections.table import DetectionTable


@dataclass(frozen=True)
class NearFrames:
    """The frames of a video that were looked at next to some times, as `BoxTrack` has them."""

    times_seconds: Float64Array
    """(K,) ascending."""
    boxes: Float32Array
    """(K, N, 4) x1, y1, x2, y2 as parts of the frame; 0 for no box."""
    categories: UInt8Array
    """(K, N) 0 no box, 1 hand, 2 object."""
    scores: Float32Array
    """(K, N) 0..1."""
    sides: UInt8Array
    """(K, N) 0 unknown, 1 left, 2 right."""
    states: UInt8Array
    """(K, N) 0 unknown, 1 to 5 as EPIC's `HandState` + 1."""
    period_seconds: float
    """Time between frames."""


@dataclass(frozen=True)
class StoredTrack:
    """One video of a table, of which nothing is in memory yet."""

    table: DetectionTable
    """Where it stands."""
    video: str
    """Its id there."""
    max_boxes: int
    """N, boxes of a frame that are used."""

    def near(self, times_seconds: Float64Array) -> NearFrames:
        """Return the frames just before and after each of the times; VerificationError for a damaged table."""
        found = self.table.read(self.video)
        right = np.searchsorted(found.times_seconds, times_seconds).clip(0, len(found.times_seconds) - 1)
        rows = np.unique(np.concatenate([right, (right - 1).clip(0)]))
        shape = (len(rows), self.max_boxes)
        near = NearFrames(
            times_seconds=found.times_seconds[rows],
            boxes=np.zeros((*shape, 4), np.float32),
            categories=np.zeros(shape, np.uint8),
            scores=np.zeros(shape, np.float32),
            sides=np.zeros(shape, np.uint8),
            states=np.zeros(shape, np.uint8),
            period_seconds=found.period_seconds,
        )
        for place, row in enumerate(rows.tolist()):
            chosen, slots = self._chosen(found, row)
            for name in ("boxes", "categories", "scores", "sides", "states"):
                getattr(near, name)[place, slots] = getattr(found, name)[chosen]
        return near

    def _chosen(self, found: VideoDetections, row: int) -> tuple[IntArray, IntArray]:
        """Return the rows of a frame's boxes and the slots that they go to."""
        first, last = found.offsets[row : row + 2].tolist()
        if found.tracks is not None:
            kept = kept_tracks(found.tracks, self.max_boxes)
            rows = first + np.flatnonzero(np.isin(found.tracks[first:last], kept))
            return rows, np.searchsorted(kept, found.tracks[rows])
        order = np.lexsort((-found.scores[first:last], found.categories[first:last]))[: self.max_boxes]
        return first + order, np.arange(len(order))


def kept_tracks(tracks: IntArray, max_boxes: int) -> IntArray:
    """Return the (at most `max_boxes`) tracks that are in most frames, ascending; in a tie the earlier ones."""
    present, counts = np.unique(tracks, return_counts=True)
    kept: IntArray = np.sort(present[np.argsort(-counts, kind="stable")[:max_boxes]])
    return kept
