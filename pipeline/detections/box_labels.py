"""One video's annotation in the published Something-Else form, as arrays.

The form: `[{"name": "id/0001.jpg", "labels": [{"box2d": {x1, y1, x2, y2}, "standard_category": ...}]}]`:
frames named from 1, boxes in float pixels of the video. `standard_category` is the track ("hand", or "0000",
"0001", ... for objects), and two hands share one. A detector's boxes may add "score" to a label. Whatever is
malformed raises a ValueError whose text is the reason that the build stores with the clip's status.
"""

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

from mmkd.cache_tools.frames.records import Float32Array, IntArray, UInt8Array

EMPTY, HAND, OBJECT = 0, 1, 2
Slot = tuple[str, int]
"""A track's name and, where several boxes of a frame share it (two hands), the position among them."""


class VideoBoxes(NamedTuple):
    """Arrays of one video; see `BoxTrack` for their meaning."""

    frame_numbers: IntArray
    """(F,) ascending, from 1."""
    boxes_px: Float32Array
    """(F, N, 4)."""
    categories: UInt8Array
    """(F, N)."""
    scores: Float32Array
    """(F, N)."""


def parse_video(frames: Any, max_boxes: int) -> VideoBoxes:
    """Return one video's boxes in at most `max_boxes` slots; ValueError where they cannot be used."""
    if not isinstance(frames, list) or not frames:
        raise ValueError("no frame is annotated")
    by_number: dict[int, dict[Slot, tuple[float, ...]]] = {}
    for frame in frames:
        number = _frame_number(frame)
        if number in by_number:
            raise ValueError(f"frame {number} is annotated twice")
        by_number[number] = _frame_boxes(frame, number)
    slots = _slots(by_number.values(), max_boxes)
    numbers = sorted(by_number)
    boxes_px = np.zeros((len(numbers), len(slots), 4), np.float32)
    scores = np.zeros(boxes_px.shape[:2], np.float32)
    categories = np.full(boxes_px.shape[:2], EMPTY, np.uint8)
    for row, number in enumerate(numbers):
        for column, slot in enumerate(slots):
            if slot in by_number[number]:
                *corners, scores[row, column] = by_number[number][slot]
                boxes_px[row, column] = corners
                categories[row, column] = HAND if slot[0] == "hand" else OBJECT
    return VideoBoxes(np.array(numbers, np.int64), boxes_px, categories, scores)


def _frame_number(frame: Any) -> int:
    name = frame.get("name") if isinstance(frame, dict) else None
    match = re.fullmatch(r"(?:.*/)?([0-9]{1,9})\.\w+", name) if isinstance(name, str) else None
    if match is None or int(match[1]) < 1:
        raise ValueError(f"frame name {str(name)[:60]!r} is not of the form id/0001.jpg, from 1 on")
    return int(match[1])


def _frame_boxes(frame: Mapping[str, Any], number: int) -> dict[Slot, tuple[float, ...]]:
    """Return (x1, y1, x2, y2, score) per slot; corners in the wrong order are swapped, as the authors do."""
    labels = frame.get("labels")
    if not isinstance(labels, list):
        raise ValueError(f"frame {number} has no list of labels")
    boxes: dict[Slot, tuple[float, ...]] = {}
    seen: Counter[str] = Counter()
    for label in labels:
        try:
            track, box = label["standard_category"], label["box2d"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"frame {number} has a malformed box ({error!r})") from error
        if not isinstance(track, str):
            raise ValueError(f"frame {number} has a box whose standard_category is no text")
        boxes[track, seen[track]] = corners_of(box, label, number)
        seen[track] += 1
    return boxes


def corners_of(box: Any, label: Any, number: int) -> tuple[float, ...]:
    """Return (x1, y1, x2, y2, score) in order of a box and of a label that may have a score; ValueError else."""
    try:
        x1, y1, x2, y2 = (float(box[key]) for key in ("x1", "y1", "x2", "y2"))
        score = float(label.get("score", 1.0))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ValueError(f"frame {number} has a malformed box ({error!r})") from error
    if not all(map(math.isfinite, (x1, y1, x2, y2))) or not 0 <= score <= 1:
        raise ValueError(f"frame {number} has a box that is not finite, or a score outside 0..1")
    return min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2), score


def _slots(frames: Collection[Mapping[Slot, Any]], max_boxes: int) -> list[Slot]:
    """Return at most `max_boxes` slots, hands first, then by track name.

    Where there are more, those present in most frames stay (in a tie the earlier ones).
    """
    counts = Counter(slot for frame in frames for slot in frame)
    ordered = sorted(counts, key=lambda slot: (slot[0] != "hand", slot))
    kept = sorted(ordered, key=lambda slot: -counts[slot])[:max_boxes]
    return [slot for slot in ordered if slot in kept]
