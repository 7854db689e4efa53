"""An expert's own look at a view: the same interval and crop rectangle at another number of frames.

The size of a look is an argument of `canonical_view`; this is the rule for its frames. It gives up frames that the
view did not span: nothing before the view's first sampled frame or after its last is seen.
"""

from dataclasses import dataclass, replace

import numpy as np

from mmkd.cache_tools.frames.records import IntArray
from mmkd.cache_tools.views.view import View

LOOK_RULE = "centres of equal parts of the view's frames, linear between them, half to even"
"""What `look_frames` does, in words; part of the fingerprint of every expert with frames of its own."""


@dataclass(frozen=True)
class Look:
    """What an expert sees of each view; the default is the canonical view, and one field a frame."""

    frames: int | None = None
    """T', frames in the view's interval; None: the view's own."""
    size_px: int | None = None
    """S', side of the view's crop; None: the canonical view's."""
    flow_stack: int = 1
    """Consecutive flow fields around each frame."""


CANONICAL_LOOK = Look()
"""What the student sees too."""


def look_frames(frame_indices: IntArray, frames: int) -> IntArray:
    """Return (T',) ascending frame indices in the interval of a view's (T,): frame j at (j + 1/2) T / T' - 1/2.

    Positions are clamped to 0..T-1, indices interpolated linearly and rounded half to even, in whole numbers
    throughout, so that no processor rounds otherwise. T' = T gives the view's own frames.
    """
    count = len(frame_indices)
    if count < 1 or frames < 1:
        raise ValueError(f"a look needs frames: {frames} of a view's {count}")
    parts = 2 * frames  # a position is a whole number of these parts of a step
    position = ((2 * np.arange(frames, dtype=np.int64) + 1) * count - frames).clip(0, parts * (count - 1))
    left, beyond = np.divmod(position, parts)
    right = np.minimum(left + 1, count - 1)
    whole, rest = np.divmod(frame_indices[left] * (parts - beyond) + frame_indices[right] * beyond, parts)
    up = (2 * rest > parts) | ((2 * rest == parts) & (whole % 2 == 1))
    found: IntArray = (whole + up).astype(np.int64)
    return found


def look_view(view: View, frames: int | None) -> View:
    """Return the view at a look's number of frames (None: its own), with its crop and flip."""
    return view if frames is None else replace(view, frame_indices=look_frames(view.frame_indices, frames))
