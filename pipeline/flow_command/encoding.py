"""Flow of consecutive pairs as a layout stores it: codes in grey JPEGs, or the floats of I3D."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from mmkd.cache_tools.frames.records import Float32Array, UInt8Array
from mmkd.pipeline.flow.conventions import codes_of_flow, i3d_of_flow, jpeg_of_codes

CODED_AT_ONCE = 4_000_000
"""Values turned into codes at once: their double precision takes 8 bytes each."""


@dataclass(frozen=True)
class EncodedFlow:
    """Consecutive pairs of one video as a layout stores them."""

    jpegs: Sequence[tuple[bytes, bytes]] = ()
    """(P,) grey JPEGs of x and y; empty for I3D."""
    floats: Float32Array | None = None
    """(P, H, W, 2) of I3D."""

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.jpegs) if self.floats is None else len(self.floats)


def stored_values(flow: Tensor, *, layout: str, bound_px: int) -> UInt8Array | Float32Array:
    """Return flow (P, 2, H, W) in pixels as codes (P, 2, H, W), for I3D as floats (P, H, W, 2)."""
    if layout == "i3d":
        return i3d_of_flow(flow).permute(0, 2, 3, 1).contiguous().cpu().numpy()
    count = max(1, CODED_AT_ONCE // flow[0].numel())
    parts = (flow[start : start + count] for start in range(0, len(flow), count))
    return np.concatenate([codes_of_flow(part, bound_px=bound_px).cpu().numpy() for part in parts])


def encode_values(values: UInt8Array | Float32Array, *, layout: str) -> EncodedFlow:
    """Encode what `stored_values` made; threads may share this work, since OpenCV lets others run meanwhile."""
    if layout == "i3d":
        return EncodedFlow(floats=values.astype(np.float32, copy=False))
    codes = values.astype(np.uint8, copy=False)
    return EncodedFlow([(jpeg_of_codes(x), jpeg_of_codes(y)) for x, y in codes])
