"""Boxes in pixels as detections: Something-Else's annotations, and the authors' own detections with scores.

Something-Else states no size of a video, the authors' file does. Frames are at 12 a second, as the videos are. A
track keeps its slot; the authors' detections have no tracks. See `mmkd.pipeline.detections.box_labels`.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mmkd.cache_tools.frames.records import Float32Array
from mmkd.data_manifests.errors import InputError, VideoError
from mmkd.pipeline.detections.box_labels import EMPTY, corners_of, parse_video
from mmkd.pipeline.detections.json_members import iterate_items, iterate_members
from mmkd.pipeline.detections.records import HAND, OBJECT, Unusable, VideoDetections

OUTSIDE_TOLERANCE = 0.05
"""Part of the frame's side by which a box may reach past the frame and still be clipped to it."""
ALL_BOXES = 1 << 30
Sizes = Callable[[str], tuple[int, int] | None]
"""Video id -> (width, height) in pixels, None for a video that is not wanted; VideoError where it is not known."""


def read_something_else(path: Path, *, fps: float, sizes: Sizes) -> Iterator[VideoDetections | Unusable]:
    """Yield the videos of an annotation file of Something-Else; InputError for a file that is not of the form."""
    for video, frames in iterate_members(path):
        try:
            if (size := sizes(video)) is not None:
                yield _annotated(video, frames, size, fps)
        except (VideoError, ValueError) as error:
            yield Unusable(video, str(error))


def _annotated(video: str, frames: Any, size: tuple[int, int], fps: float) -> VideoDetections:
    parsed = parse_video(frames, ALL_BOXES)
    rows, slots = np.nonzero(parsed.categories != EMPTY)
    none = np.zeros(len(rows), np.uint8)
    return VideoDetections(
        video=video,
        times_seconds=(parsed.frame_numbers - 1) / fps,
        offsets=np.searchsorted(rows, np.arange(len(parsed.frame_numbers) + 1)).astype(np.int64),
        boxes=parts_of_frame(parsed.boxes_px[rows, slots], size),
        categories=parsed.categories[rows, slots],
        scores=parsed.scores[rows, slots],
        sides=none,
        states=none,
        period_seconds=1 / fps,
        tracks=slots.astype(np.int64),
    )


def read_authors(path: Path, *, fps: float, sizes: Sizes | None) -> Iterator[VideoDetections | Unusable]:
    """Yield the videos of the authors' detections; InputError for a file that is not of the form.

    The file states each video's size; `sizes`, where given, says which videos are wanted.
    """
    for position, entry in enumerate(iterate_items(path), 1):
        if not isinstance(entry, dict) or not isinstance(entry.get("id"), str | int) or "frames" not in entry:
            raise InputError(f"{path}: entry {position} is no video with `id`, `size` and `frames`")
        video = str(entry["id"])
        try:
            if sizes is None or sizes(video) is not None:
                yield _detected(video, entry, fps)
        except (VideoError, ValueError) as error:
            yield Unusable(video, str(error))


def _detected(video: str, entry: dict[str, Any], fps: float) -> VideoDetections:
    size, frames = entry.get("size"), entry["frames"]
    if not isinstance(size, list) or len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
        raise ValueError(f"its size {str(size)[:40]} is not [width, height] in pixels")
    if not isinstance(frames, list) or not all(isinstance(frame, list) for frame in frames):
        raise ValueError("its frames are not lists of boxes")
    rows = [_box(label, number) for number, frame in enumerate(frames, 1) for label in frame]
    values = np.array(rows, np.float32).reshape(-1, 6)
    none = np.zeros(len(rows), np.uint8)
    return VideoDetections(
        video=video,
        times_seconds=np.arange(len(frames)) / fps,
        offsets=np.cumsum([0, *map(len, frames)], dtype=np.int64),
        boxes=parts_of_frame(values[:, :4], (size[0], size[1])),
        categories=values[:, 5].astype(np.uint8),
        scores=values[:, 4],
        sides=none,
        states=none,
        period_seconds=1 / fps,
    )


def _box(label: Any, number: int) -> tuple[float, ...]:
    """Return x1, y1, x2, y2, score, category; as for the authors, a hand is what has "hand" in its category."""
    corners = corners_of(label, label, number)
    if not isinstance(category := label.get("category"), str):
        raise ValueError(f"frame {number} has a box without a category")
    return (*corners, HAND if "hand" in category else OBJECT)


def parts_of_frame(boxes_px: Float32Array, size: tuple[int, int]) -> Float32Array:
    """Return boxes (B, 4) as parts of the frame's sides, clipped; ValueError where one is 5 % of a side outside."""
    boxes = boxes_px / np.array([*size, *size], np.float32)
    beyond = float(np.maximum(-boxes, boxes - 1).max(initial=0))
    if beyond > OUTSIDE_TOLERANCE:
        raise ValueError(
            f"a box lies {100 * beyond:.0f} % of the side outside the {size[0]} x {size[1]} frame; "
            "was the video resized after its annotation?"
        )
    clipped: Float32Array = boxes.clip(0, 1).astype(np.float32)
    return clipped


def one_size(width: int, height: int) -> Sizes:
    """Return the sizes of videos that all have one."""
    return lambda video: (width, height)
