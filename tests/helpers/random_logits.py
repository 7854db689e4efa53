"""Manifests of labels, and logits, drawn at random for `small_cache.write_cache`: the test gives the sizes."""

from collections.abc import Mapping, Sequence

import numpy as np

from mmkd.data_manifests.manifest import Clip, Head, Manifest

Logits = dict[str, dict[str, dict[str, np.ndarray]]]
"""logits[split][expert][head] (rows, views, classes)"""


def draw_manifest(heads: Sequence[Head], rows: Mapping[str, int]) -> Manifest:
    """Clips `SPLIT-ROW` of each split; row 1, 11, 21, ... has no noun, every second one of `test` is `unseen`."""
    random = np.random.default_rng(1)
    clips = []
    for split, count in rows.items():
        for row in range(count):
            labels: dict[str, int | None] = {head.name: int(random.integers(len(head.classes))) for head in heads}
            if row % 10 == 1:
                labels["noun"] = None
            groups = ("unseen",) if split == "test" and row % 2 else ()
            clips.append(Clip(f"{split}-{row}", f"{split}-{row}.webm", split, labels, groups=groups))
    return Manifest("demo", tuple(heads), tuple(clips))


def draw_logits(
    manifest: Manifest, scales: Mapping[str, float], views: Mapping[str, int], *, known: float = 0.0
) -> Logits:
    """Draw logits of experts (name -> scale), to which the label's is added `known` before scaling."""
    random, found = np.random.default_rng(2), {}
    for split, count in views.items():
        clips = manifest.split(split)
        found[split] = {}
        for expert, scale in scales.items():
            heads = {}
            for head in manifest.heads:
                z = random.standard_normal((len(clips), count, len(head.classes)))
                z[np.arange(len(clips)), :, [clip.labels[head.name] or 0 for clip in clips]] += known
                heads[head.name] = (scale * z).astype(np.float32)
            found[split][expert] = heads
    return found
