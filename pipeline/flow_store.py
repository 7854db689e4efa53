"""The flow scratch store: every native pair of a clip, computed once for all epochs and for the build.

One file per clip, named by content (flow recipe, decoder rules, video identity, frame range), so that a changed
video or recipe never meets old fields and a moved data set still does. It is a cache of work, not a result:
delete it at will. Raw fields are large (a 45-frame clip at 427 x 256 is 19 MB in float16, half of that in
uint8); it gives up compression for random access through a memory map.
"""

import io
from pathlib import Path

import numpy as np

from mmkd.cache_tools.data import ClipVideo
from mmkd.cache_tools.fingerprints import fingerprint
from mmkd.cache_tools.frames import DECODER_RULES
from mmkd.cache_tools.records import Float32Array, IntArray
from mmkd.data_manifests.atomic import write_atomically
from mmkd.pipeline.flow import (
    FlowFields,
    all_pairs,
    decode_flow,
    encode_flow,
    flow_identity,
    flow_size,
    positions_of,
)
from mmkd.pipeline.recipe import FlowRecipe
from mmkd.pipeline.tvl1 import arithmetic


class FlowStore:
    """All native fields of clips, by content."""

    def __init__(self, directory: Path, recipe: FlowRecipe, device: str = "cpu") -> None:
        """Open the store below `directory` for one flow recipe and device (`cpu`, `cuda:0`).

        Devices and TV-L1's kernels on them round differently, so each has fields of its own: machines that share
        the store need not all have a compiler.
        """
        name = fingerprint(flow_identity(recipe) | {"decoder": DECODER_RULES})[:16]
        self._directory = directory / f"{name}-{arithmetic(device)}"
        self._recipe = recipe

    def path(self, item: ClipVideo) -> Path:
        """Return the file of a clip's fields."""
        name = fingerprint(
            {"video": item.video.identity, "first": item.facts.first_frame, "count": item.facts.frame_count}
        )
        return self._directory / name[:2] / f"{name[:32]}.npy"

    def has(self, item: ClipVideo) -> bool:
        """Return whether the clip's fields are there, whole."""
        path = self.path(item)
        if not path.is_file():
            return False
        height, width = flow_size(item.facts, self._recipe.short_side_px)
        pairs = len(all_pairs(item.facts, self._recipe.step))
        try:
            stored = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError):
            return False
        return bool(stored.shape == (pairs, 2, height, width) and stored.dtype == self._recipe.precision)

    def write(self, item: ClipVideo, flow: FlowFields) -> None:
        """Store the fields of every native pair of the clip."""
        if not np.array_equal(flow.starts, all_pairs(item.facts, self._recipe.step)):
            raise ValueError(f"clip {item.clip.clip_id!r}: the store takes every native pair, or none")
        buffer = io.BytesIO()
        np.save(buffer, encode_flow(flow.fields, self._recipe))
        write_atomically(self.path(item), buffer.getvalue())

    def read(self, item: ClipVideo, starts: IntArray) -> Float32Array:
        """Return the fields (T, 2, h, w) that begin at `starts`, which may repeat."""
        stored = np.load(self.path(item), mmap_mode="r", allow_pickle=False)
        positions = positions_of(starts, all_pairs(item.facts, self._recipe.step))
        return decode_flow(np.asarray(stored[positions]), self._recipe)
