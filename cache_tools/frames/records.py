"""What travels between the parts of both stages: frozen, checked records, one line per field.

Frame indices count the decoded frames of a *video* in presentation order, from 0. Times are seconds from the
container's start, as players and `ffmpeg -ss` count: where the sound starts first, the first frame's is above 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
Float64Array = npt.NDArray[np.float64]
Float32Array = npt.NDArray[np.float32]
UInt8Array = npt.NDArray[np.uint8]
UInt64Array = npt.NDArray[np.uint64]
FactsTable = npt.NDArray[np.int32]
"""(rows, 4) the fields of `ClipFacts`, in their order; zeros for a clip whose video is unreadable."""


@dataclass(frozen=True, slots=True)
class VideoFacts:
    """What the probe of one video found, without decoding it."""

    width: int
    """Width of a decoded frame as it is shown (after a rotation flag), in pixels."""
    height: int
    """Height likewise, in pixels."""
    times_seconds: Float64Array
    """(frames,) presentation time of each frame from the container's start, ascending, the first one 0 or later."""
    decoder: str
    """What reads it: `decord` or `pyav`, as the rule table chose and the probe tried, or a kind of stills."""
    identity: str
    """Hash of packet count, time stamps and sizes: changes when the video is re-encoded or cut."""

    def __post_init__(self) -> None:
        """Raise ValueError for impossible facts."""
        if self.width < 1 or self.height < 1 or self.times_seconds.ndim != 1 or not len(self.times_seconds):
            raise ValueError(f"impossible video facts: {self.width} x {self.height}, {self.frame_count} frames")

    @property
    def frame_count(self) -> int:
        """Number of frames that decoding yields."""
        return len(self.times_seconds)


@dataclass(frozen=True, slots=True)
class ClipFacts:
    """What a view needs to know of a clip: its frames within the video, and their size."""

    width: int
    """Frame width in pixels."""
    height: int
    """Frame height in pixels."""
    first_frame: int
    """Index in the video of the clip's first frame."""
    frame_count: int
    """Number of frames in the clip, at least 1."""


def facts_table(facts: Sequence[ClipFacts | None]) -> FactsTable:
    """Return (rows, 4) width, height, first frame, frame count; zeros where there are no facts."""
    table = np.zeros((len(facts), 4), np.int32)
    for row, clip in enumerate(facts):
        if clip is not None:
            table[row] = clip.width, clip.height, clip.first_frame, clip.frame_count
    return table


@dataclass(frozen=True)
class ClipFrames:
    """The union of all frames of one clip that any view or flow pair needs, decoded once."""

    frames: UInt8Array
    """(N, H, W, 3) RGB, 0..255."""
    frame_indices: IntArray
    """(N,) strictly ascending indices in the video."""
    times_seconds: Float64Array
    """(N,) their times in the video, in seconds."""

    def __post_init__(self) -> None:
        """Raise ValueError when shapes, dtype or order are not as documented."""
        n = len(self.frame_indices)
        if self.frames.dtype != np.uint8 or self.frames.ndim != 4 or self.frames.shape[0::3] != (n, 3):
            raise ValueError(f"frames must be uint8 ({n}, H, W, 3), got {self.frames.dtype} {self.frames.shape}")
        if self.times_seconds.shape != (n,) or (np.diff(self.frame_indices) <= 0).any():
            raise ValueError("frame_indices must ascend strictly, with one time each")

    def select(self, frame_indices: IntArray) -> UInt8Array:
        """Return frames (T, H, W, 3) for `frame_indices` (T,), which may repeat; KeyError if one is absent."""
        positions = np.searchsorted(self.frame_indices, frame_indices).clip(0, len(self.frame_indices) - 1)
        if not np.array_equal(self.frame_indices[positions], frame_indices):
            raise KeyError(f"frames {frame_indices} are not all among {self.frame_indices}")
        selected: UInt8Array = self.frames[positions]
        return selected
