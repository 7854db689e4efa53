"""Median filter by minima and maxima alone, for the flow in OpenCV's CPU mode.

Each column of the window is sorted once and shared by the windows that contain it; then a network of
exchanges, pruned to what can still reach the median, runs over rows of pixels at a time. Exact for any
values, and elementwise, so the same bits in any batch. `torch.median` over unfolded windows takes 20 times
as long on a CPU.
"""

import torch
import torch.nn.functional as functional
from torch import Tensor

# Devillard's sorting networks for three and five values.
SORT_COLUMN: dict[int, tuple[tuple[int, int], ...]] = {
    3: ((0, 1), (1, 2), (0, 1)),
    5: ((0, 1), (3, 4), (2, 4), (2, 3), (1, 4), (0, 3), (0, 2), (1, 3), (1, 2)),
}
# Exchanges of elements, size * row + column, of a window with sorted columns. Found from "sort
# the rows, then sort what can be the median" by dropping, one at a time, each exchange without which all 0-1
# inputs with sorted columns still give their median; by the zero-one principle so do all inputs then.
WINDOW_3 = "0-1 1-2 3-4 4-5 3-4 7-8 6-7 2-4 2-6 4-6"
WINDOW_5 = (
    "0-1 3-4 2-4 2-3 1-4 0-3 1-3 5-6 8-9 7-9 7-8 6-9 5-8 6-8 6-7 10-11 13-14 12-14 12-13 11-14 10-13 10-12 "
    "11-13 11-12 15-16 18-19 17-18 16-19 15-18 15-17 16-18 16-17 20-21 23-24 22-24 22-23 20-23 20-22 21-22 "
    "3-7 11-15 4-8 12-16 20-9 13-17 7-15 4-12 8-16 20-13 8-12 15-8 13-21 15-4 8-12 9-13 4-20 8-9 12-20 8-12"
)


def median_filter(planes: Tensor, *, size: int, chunk_pixels: int) -> Tensor:
    """Return the size x size median of (..., H, W), borders repeated, as `cv::medianBlur` does.

    `procOneScale` of optflow/src/tvl1flow.cpp calls it for both flow components at each outer iteration.
    `size` is 3 or 5; about `chunk_pixels` pixels are worked on at a time.
    """
    height, width = planes.shape[-2:]
    reach = size // 2
    flat = planes.reshape(-1, height, width)
    padded = functional.pad(flat[:, None], (reach,) * 4, mode="replicate")[:, 0]
    result = torch.empty_like(flat)
    rows = max(1, chunk_pixels // width)
    for plane, out in zip(padded, result, strict=True):
        for top in range(0, height, rows):
            count = min(rows, height - top)
            lines = [plane[top + i : top + i + count] for i in range(size)]
            out[top : top + count] = _median_of_lines(lines, width=width)
    return result.view(planes.shape)


def _median_of_lines(lines: list[Tensor], *, width: int) -> Tensor:
    """Return the medians (R, W) of windows over `lines`, one (R, W + size - 1) for each row of a window."""
    size = len(lines)
    for low, high in SORT_COLUMN[size]:
        one, two = lines[low], lines[high]
        lines[low], lines[high] = torch.minimum(one, two), torch.maximum(one, two)
    window = {size * i + j: line[:, j : j + width] for i, line in enumerate(lines) for j in range(size)}
    for low, high, keep_low, keep_high in _PROGRAMS[size]:
        one, two = window[low], window[high]
        if keep_low:
            window[low] = torch.minimum(one, two)
        if keep_high:
            window[high] = torch.maximum(one, two)
    return window[size * size // 2]


def _program(text: str, *, size: int) -> list[tuple[int, int, bool, bool]]:
    """Return each exchange with whether its minimum and its maximum are read later."""
    read = {size * size // 2}
    steps = []
    for exchange in reversed(text.split()):
        low, high = map(int, exchange.split("-"))
        steps.append((low, high, low in read, high in read))
        read |= {low, high}
    return steps[::-1]


_PROGRAMS = {3: _program(WINDOW_3, size=3), 5: _program(WINDOW_5, size=5)}


def _exchanges(size: int, window: str) -> tuple[int, ...]:
    columns = [(size * low + i, size * high + i) for i in range(size) for low, high in SORT_COLUMN[size]]
    rest = [tuple(map(int, exchange.split("-"))) for exchange in window.split()]
    return tuple(place for exchange in (*columns, *rest) for place in exchange)


WINDOWS_AS_EXCHANGES = {3: _exchanges(3, WINDOW_3), 5: _exchanges(5, WINDOW_5)}
"""The same for a whole window of its own: places 2i and 2i + 1 are exchanged, then the middle is the median."""
