"""Object boxes from files in the Something-Else form or tables of detections, looked up at a clip's frame times.

Frames are matched by time, never by list position (the published loader's way, off where frames are not
annotated). Boxes come out as parts of the frame, in a fixed number of slots, ready for the boxes expert. A
video whose annotation is absent or malformed is no error of the file: asking for its track raises
`BoxesMissingError` with the reason, so that the build records `boxes missing` and continues.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from mmkd.cache_tools.cache.fingerprints import file_sha256
from mmkd.cache_tools.frames.records import Float32Array, Float64Array, IntArray, UInt8Array
from mmkd.data_manifests.errors import InputError
from mmkd.pipeline.detections.box_labels import EMPTY, parse_video
from mmkd.pipeline.detections.json_members import iterate_members
from mmkd.pipeline.detections.table import DetectionTable, is_table
from mmkd.pipeline.inputs.stored_track import StoredTrack
from mmkd.pipeline.missing import BoxesMissingError
from mmkd.pipeline.recipe import BoxesRecipe

ANNOTATED_FPS = 12.0
"""Frame rate of the published annotations."""
MAX_BOXES = 14
"""Boxes of a frame that the authors' layout transformer sees at most."""
OUTSIDE_TOLERANCE = 0.05
"""Part of the frame's side by which a box may reach past the frame and still be clipped to it."""
TIME_TOLERANCE_SECONDS = 1e-6


@dataclass(frozen=True)
class BoxTrack:
    """All annotated boxes of one video; a slot holds the same track in every frame."""

    times_seconds: Float64Array
    """(F,) time of each annotated frame, ascending: (frame number - 1) / fps."""
    boxes_px: Float32Array
    """(F, N, 4) x1, y1, x2, y2 in pixels of the video, x1 <= x2 and y1 <= y2; 0 where there is no box."""
    categories: UInt8Array
    """(F, N) 0 no box, 1 hand, 2 object."""
    scores: Float32Array
    """(F, N) detection score, 0..1; 1 where the file states none (a person's annotation)."""
    period_seconds: float
    """Time between annotated frames at the annotation's frame rate."""
    max_boxes: int
    """Slots that a look-up returns, at least N."""
    sides: UInt8Array | None = None
    """(F, N) 0 unknown, 1 left hand, 2 right hand; None: all unknown."""
    states: UInt8Array | None = None
    """(F, N) 0 unknown, 1 to 5 a hand's contact state; None: all unknown."""


Track = BoxTrack | StoredTrack
"""A video's boxes, in memory or in a table."""


@dataclass(frozen=True)
class FrameBoxes:
    """Boxes of a clip's sampled frames, ready for the boxes expert."""

    boxes: Float32Array
    """(T, N, 4) x1, y1, x2, y2 as parts of the frame's width and height, 0..1; 0 for no box."""
    categories: IntArray
    """(T, N) 0 no box, 1 hand, 2 object."""
    scores: Float32Array
    """(T, N) 0..1; 0 for no box."""
    annotated: npt.NDArray[np.bool_]
    """(T,) whether an annotated frame lies within half its period of the frame's time."""
    sides: IntArray
    """(T, N) 0 unknown or no hand, 1 left, 2 right."""
    states: IntArray
    """(T, N) 0 unknown or no hand, else what it touches; see mmkd.pipeline.detections.records."""


@dataclass(frozen=True)
class BoxFile:
    """The tracks of all videos of one or several annotation files."""

    tracks: Mapping[str, Track | str]
    """Per video id its track, or the reason why its annotation cannot be used."""

    def track(self, video: str) -> Track:
        """Return the track of a video id or file name (`80962.webm`), or raise BoxesMissingError."""
        found = self.tracks.get(video, self.tracks.get(PurePosixPath(video).stem))
        if found is None:
            raise BoxesMissingError("the video is not in the box file")
        if isinstance(found, str):
            raise BoxesMissingError(found)
        return found


def load_boxes(
    paths: Sequence[Path],
    videos: Collection[str] | None = None,
    *,
    fps: float = ANNOTATED_FPS,
    max_boxes: int = MAX_BOXES,
) -> BoxFile:
    """Read annotation files (the published one comes in parts), keeping only `videos` (ids) where given.

    One pass over the text with one video's JSON in memory at a time. Measured on one core with real
    annotations repeated: 26 s per GB of text and 2.2 kB per video kept; videos not wanted cost 10 s per GB.
    """
    if not (math.isfinite(fps) and fps > 0 and max_boxes >= 1):
        raise InputError(f"boxes need fps > 0 and max_boxes >= 1, got {fps} and {max_boxes}")
    wanted = None if videos is None else {PurePosixPath(video).stem for video in videos} | set(videos)
    tracks: dict[str, Track | str] = {}
    for path in paths:
        for video, frames in _members(path):
            if wanted is not None and video not in wanted:
                continue
            if video in tracks:
                raise InputError(f"{path}: video {video!r} is annotated in an earlier file, too")
            if isinstance(frames, DetectionTable):
                tracks[video] = StoredTrack(frames, video, max_boxes)
                continue
            try:
                parsed = parse_video(frames, max_boxes)
            except ValueError as error:
                tracks[video] = f"its boxes cannot be used: {error}"
                continue
            times_seconds = (parsed.frame_numbers - 1) / fps
            tracks[video] = BoxTrack(times_seconds, *parsed[1:], 1 / fps, max_boxes)
    return BoxFile(tracks)


def _members(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (video, its frames as JSON) of an annotation file, (video, the table) of a table."""
    if not is_table(path):
        return iterate_members(path)
    table = DetectionTable(path)
    return ((video, table) for video in table.rows)


def boxes_at(track: Track, times_seconds: Float64Array, *, width: int, height: int) -> FrameBoxes:
    """Return the boxes (T, max_boxes) at frame times (T,), normalised by the video's own width and height.

    A frame takes the nearest annotated frame at most half a period away (the earlier one on a tie), else it
    has no boxes. Boxes are clipped to the frame, and dropped when nothing of them is inside (the authors
    keep a one-pixel box there). One that reaches past it by more than 5 % raises BoxesMissingError: then the
    video was most likely resized after it was annotated, and all its boxes would be wrong.
    """
    if isinstance(track, StoredTrack):
        near = track.near(times_seconds)
        width = height = 1  # its boxes are parts of the frame already
        track = BoxTrack(
            *(near.times_seconds, near.boxes, near.categories, near.scores, near.period_seconds, track.max_boxes),
            sides=near.sides,
            states=near.states,
        )
    last = len(track.times_seconds) - 1
    right = np.searchsorted(track.times_seconds, times_seconds).clip(0, last)
    left = (right - 1).clip(0)
    to_left = np.abs(times_seconds - track.times_seconds[left])
    to_right = np.abs(times_seconds - track.times_seconds[right])
    nearest = np.where(to_left <= to_right, left, right)
    annotated = np.minimum(to_left, to_right) <= track.period_seconds / 2 + TIME_TOLERANCE_SECONDS
    present = (track.categories[nearest] != EMPTY) & annotated[:, None]
    boxes = track.boxes_px[nearest] / np.array([width, height, width, height], np.float32)
    beyond = np.maximum(-boxes, boxes - 1)[present]
    if beyond.size and beyond.max() > OUTSIDE_TOLERANCE:
        raise BoxesMissingError(
            f"a box lies {100 * float(beyond.max()):.0f} % of the side outside the {width} x {height} frame; "
            "was the video resized after its annotation?"
        )
    shape = (len(times_seconds), track.max_boxes)
    found = FrameBoxes(
        np.zeros((*shape, 4), np.float32),
        np.zeros(shape, np.int64),
        np.zeros(shape, np.float32),
        annotated,
        *(np.zeros(shape, np.int64) for _ in range(2)),
    )
    slots = boxes.shape[1]
    found.boxes[:, :slots] = boxes
    found.categories[:, :slots] = np.where(present, track.categories[nearest], EMPTY)
    found.scores[:, :slots] = track.scores[nearest]
    for values, known in ((found.sides, track.sides), (found.states, track.states)):
        if known is not None:
            values[:, :slots] = known[nearest]
    return _clipped(found)


def _clipped(found: FrameBoxes) -> FrameBoxes:
    boxes = found.boxes.clip(0, 1)
    area = (boxes[..., 2] > boxes[..., 0]) & (boxes[..., 3] > boxes[..., 1])
    present = (found.categories != EMPTY) & area
    return FrameBoxes(
        np.where(present[..., None], boxes, np.float32(0)),
        np.where(present, found.categories, EMPTY),
        np.where(present, found.scores, np.float32(0)),
        found.annotated,
        np.where(present, found.sides, 0),
        np.where(present, found.states, 0),
    )


def boxes_fields(recipe: BoxesRecipe) -> dict[str, Any]:
    """Return everything that could change a box: hashes of the annotation files, frame rate, slots."""
    if not recipe.files:
        raise InputError("a boxes expert needs annotations; give them with --boxes FILE")
    for path in recipe.files:
        if not path.is_file():
            raise InputError(f"the box annotations {path} do not exist; give them with --boxes FILE")
    return {"sha256": sorted(file_sha256(path) for path in recipe.files)} | boxes_form(recipe)


def boxes_form(recipe: BoxesRecipe) -> dict[str, Any]:
    """Return what an expert needs to be alike in all annotations; their content may be extended or corrected."""
    return {"fps": recipe.fps, "max_boxes": recipe.max_boxes}


def open_boxes(recipe: BoxesRecipe, videos: Collection[str]) -> BoxFile:
    """Read the boxes of the given videos (paths or ids)."""
    boxes_fields(recipe)
    return load_boxes(recipe.files, videos, fps=recipe.fps, max_boxes=recipe.max_boxes)
