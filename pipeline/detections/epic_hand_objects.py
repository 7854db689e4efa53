"""EPIC-KITCHENS-100's published hand-object detections: a pickle of protobuf messages per video.

The form (repository epic-kitchens-100-hand-object-bboxes, types.proto): a list of `Detections`, one a frame; frame
numbers count from 1 in the *video* at its nominal rate; boxes are parts of the frame's sides. The authors' own
files of these index from 0 in the segment, which is not copied.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmkd.data_manifests.errors import InputError, VideoError
from mmkd.pipeline.detections.pickled_bytes import NotBytesError, read_pickled_bytes
from mmkd.pipeline.detections.records import HAND, OBJECT, UNKNOWN, VideoDetections
from mmkd.pipeline.detections.wire import Fields, float_field, int_field, message_fields, parse_message

OUTSIDE_TOLERANCE = 0.05
"""Part of the frame's side by which a box may reach past the frame and still be clipped to it."""
LARGEST_FRAME_NUMBER = 10**8
Row = tuple[float, float, float, float, int, float, int, int]
"""x1, y1, x2, y2, category, score, side, state."""


@dataclass(frozen=True)
class Thresholds:
    """Which detections are kept."""

    hand: float = 0.1
    """Lowest score of a hand; published with 0.1, its authors suggest 0.5."""
    object: float = 0.01
    """Lowest score of an object; published with 0.01, its authors suggest 0.5."""


def nominal_fps(video: str) -> float:
    """Return the rate that a video's frame numbers count: 60 of `P01_01`, 50 of `P01_101`; InputError otherwise."""
    if not (match := re.fullmatch(r"P\d\d_(\d{2,3})", video)):
        raise InputError(f"{video!r} is no video id of EPIC-KITCHENS, so its frame rate is unknown; give --fps")
    return 60.0 if len(match[1]) == 2 else 50.0


def read_epic_video(path: Path, *, fps: float | None, thresholds: Thresholds) -> VideoDetections:
    """Return the detections of one pickle.

    Raises VideoError, with the file's name and the fault, for detections that are not of the form and for a file
    that is no pickled list of byte strings: of that nothing ran.
    """
    frames: dict[int, list[Row]] = {}
    videos: set[str] = set()
    try:
        messages = read_pickled_bytes(path)
    except NotBytesError as error:
        raise VideoError(str(error)) from error
    for place, message in enumerate(messages, 1):
        try:
            fields = parse_message(message)
            videos.add(_text(fields))
            number = _frame_number(fields)
            if number in frames:
                raise ValueError(f"frame {number} stands there twice")
            frames[number] = list(_rows(fields, thresholds))
        except ValueError as error:
            raise VideoError(f"{path.name}: message {place}: {error}") from error
    videos.discard("")
    if not frames or len(videos) > 1:
        raise VideoError(f"{path.name}: {'detections of several videos' if frames else 'no frame is in it'}")
    video = videos.pop() if videos else path.stem
    return _flat(video, frames, fps or nominal_fps(video))


def _text(fields: Fields) -> str:
    value = fields.get(1, [b""])[-1]
    if not isinstance(value, bytes):
        raise ValueError("video_id is no text")
    return value.decode()  # a UnicodeDecodeError is a ValueError


def _frame_number(fields: Fields) -> int:
    number = int_field(fields, 2)
    if not 1 <= number <= LARGEST_FRAME_NUMBER:
        raise ValueError(f"frame number {number}; they count from 1")
    return number


def _rows(fields: Fields, thresholds: Thresholds) -> Iterator[Row]:
    for hand in message_fields(fields, 3):
        state, side = int_field(hand, 3), int_field(hand, 5)
        if state > 4 or side > 1:
            raise ValueError(f"hand state {state} or side {side} is not one of the form's")
        yield from _row(hand, HAND, threshold=thresholds.hand, facts=(side + 1, state + 1))
    for thing in message_fields(fields, 4):
        yield from _row(thing, OBJECT, threshold=thresholds.object, facts=(UNKNOWN, UNKNOWN))


def _row(fields: Fields, category: int, *, threshold: float, facts: tuple[int, int]) -> Iterator[Row]:
    """Yield the box, clipped, unless its score is too low or nothing of it is inside."""
    found = message_fields(fields, 1)
    box = found[-1] if found else {}
    corners = [float_field(box, number) for number in (1, 2, 3, 4)]
    score = float_field(fields, 2)
    if not all(map(math.isfinite, corners)) or not 0 <= score <= 1 + 1e-6:
        raise ValueError("a box is not finite, or its score is not within 0..1")
    if min(corners) < -OUTSIDE_TOLERANCE or max(corners) > 1 + OUTSIDE_TOLERANCE:
        raise ValueError(f"a box lies outside the frame: {[round(value, 3) for value in corners]}")
    if score < threshold:
        return
    x1, y1, x2, y2 = (min(max(value, 0.0), 1.0) for value in corners)
    x1, x2, y1, y2 = min(x1, x2), max(x1, x2), min(y1, y2), max(y1, y2)
    if x2 > x1 and y2 > y1:
        yield (x1, y1, x2, y2, category, min(score, 1.0), *facts)


def _flat(video: str, frames: dict[int, list[Row]], fps: float) -> VideoDetections:
    numbers = sorted(frames)
    rows = [row for number in numbers for row in frames[number]]
    values = np.array(rows, np.float64).reshape(-1, 8)
    return VideoDetections(
        video=video,
        times_seconds=(np.array(numbers, np.float64) - 1) / fps,
        offsets=np.cumsum([0, *(len(frames[number]) for number in numbers)], dtype=np.int64),
        boxes=values[:, :4].astype(np.float32),
        categories=values[:, 4].astype(np.uint8),
        scores=values[:, 5].astype(np.float32),
        sides=values[:, 6].astype(np.uint8),
        states=values[:, 7].astype(np.uint8),
        period_seconds=1 / fps,
    )
