"""A manifest of two heads with groups and an absent label, for tests of metrics and tables."""

import numpy as np

from mmkd.data_manifests.manifest import Clip, Head, Manifest

HEADS = (Head("verb", tuple("abc")), Head("noun", tuple("defghi")))


def make_manifest(rows: int) -> Manifest:
    """Return splits `train` and `test` of so many clips each; clip 1 has no noun, odd ones are `unseen`."""
    draw = np.random.default_rng(3)
    clips = [
        Clip(
            f"{split}-{row}",
            f"{row}.webm",
            split,
            {"verb": int(draw.integers(3)), "noun": None if row == 1 else int(draw.integers(6))},
            groups=("unseen",) if row % 2 else (),
        )
        for split in ("train", "test")
        for row in range(rows)
    ]
    return Manifest("demo", HEADS, tuple(clips))
