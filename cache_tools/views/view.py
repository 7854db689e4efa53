"""A view as a record, and the table of all views of a split."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mmkd.cache_tools.frames.records import IntArray


@dataclass(frozen=True)
class View:
    """One deterministic look at a clip."""

    frame_indices: IntArray
    """(T,) ascending indices in the video; a short clip repeats frames."""
    crop_xywh: tuple[int, int, int, int]
    """Left, top, width, height of the square crop in source pixels, before resizing."""
    flip: bool
    """Whether the crop is mirrored horizontally."""


@dataclass(frozen=True)
class ViewTable:
    """All views of the clips of one split: 16 + 4·T + 1 bytes a view."""

    frame_index: npt.NDArray[np.int32]
    """(rows, views, T) frame indices in the video."""
    crop_xywh: npt.NDArray[np.int32]
    """(rows, views, 4) crops in source pixels."""
    flip: npt.NDArray[np.bool_]
    """(rows, views) mirrored or not."""

    @classmethod
    def zeros(cls, rows: int, views: int, frames: int) -> "ViewTable":
        """Return a table to be filled."""
        index, crop = np.zeros((rows, views, frames), np.int32), np.zeros((rows, views, 4), np.int32)
        return cls(index, crop, np.zeros((rows, views), np.bool_))

    def view(self, row: int, number: int) -> View:
        """Return one view."""
        left, top, width, height = self.crop_xywh[row, number].tolist()
        indices = self.frame_index[row, number].astype(np.int64)
        return View(indices, (left, top, width, height), bool(self.flip[row, number]))
