"""One video's detections as flat arrays, as every reader gives them and the table stores them."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np

from mmkd.cache_tools.frames.records import Float32Array, Float64Array, IntArray, UInt8Array
from mmkd.data_manifests.errors import InputError

HAND, OBJECT = 1, 2
UNKNOWN = 0
"""A side or contact state that is not stated."""


@dataclass(frozen=True)
class VideoDetections:
    """All detections of one video, frame after frame."""

    video: str
    """Its id: the file's name without folder and ending."""
    times_seconds: Float64Array
    """(F,) time of each frame that was looked at, ascending, from the video's start."""
    offsets: IntArray
    """(F + 1,) frame i has the boxes offsets[i] to offsets[i + 1] - 1; it may have none."""
    boxes: Float32Array
    """(B, 4) x1, y1, x2, y2 as parts of the frame's width and height, 0..1."""
    categories: UInt8Array
    """(B,) 1 hand, 2 object."""
    scores: Float32Array
    """(B,) 0..1."""
    sides: UInt8Array
    """(B,) 0 unknown or no hand, 1 left, 2 right."""
    states: UInt8Array
    """(B,) 0 unknown or no hand; touches 1 nothing, 2 oneself, 3 another person, 4 a portable object, 5 a fixed."""
    period_seconds: float
    """Time between frames at the rate that their numbers count."""
    tracks: IntArray | None = None
    """(B,) the slot of each box's track among the video's, from 0; None where boxes have no tracks."""

    def fault(self) -> str | None:
        """Return what is wrong with the values, None where they are what the fields say."""
        frames, boxes = len(self.times_seconds), len(self.boxes)
        if not frames:
            return "it has no frame"
        if self.offsets.shape != (frames + 1,) or self.offsets[0] != 0 or self.offsets[-1] != boxes:
            return "its frames do not divide its boxes"
        if (np.diff(self.offsets) < 0).any() or not (np.diff(self.times_seconds) > 0).all():
            return "its frames are not in order"
        columns = (self.categories, self.scores, self.sides, self.states)
        if self.boxes.shape != (boxes, 4) or any(column.shape != (boxes,) for column in columns):
            return "its columns differ in length"
        if self.tracks is not None and (self.tracks.shape != (boxes,) or (self.tracks < 0).any()):
            return "its boxes are not divided into tracks"
        finite = np.isfinite(self.times_seconds).all() and np.isfinite(self.boxes).all()
        if not (finite and 0 < self.period_seconds < np.inf):
            return "a box or a time is not finite"
        if ((self.boxes < 0) | (self.boxes > 1)).any() or not ((self.scores >= 0) & (self.scores <= 1)).all():
            return "a box or a score lies outside 0..1"
        if not np.isin(self.categories, (HAND, OBJECT)).all() or (self.sides > 2).any() or (self.states > 5).any():
            return "a category, side or state has no meaning"
        return None


@dataclass(frozen=True)
class Unusable:
    """A video whose detections cannot be used."""

    video: str
    """Its id."""
    reason: str
    """Why; it names no folder."""

    def fault(self) -> str:
        """Return why, as `VideoDetections.fault` does."""
        return self.reason


def ids_of_videos(videos: Iterable[str]) -> dict[str, str]:
    """Return id -> path of videos, the id being the file's name without folder and ending, as in a table.

    Raises InputError where two videos would have one id.
    """
    ids: dict[str, str] = {}
    for video in videos:
        name = PurePosixPath(video).stem
        if ids.setdefault(name, video) != video:
            raise InputError(
                f"{ids[name]} and {video} of the manifest have one name, {name!r}; a table of boxes holds one"
            )
    return ids
