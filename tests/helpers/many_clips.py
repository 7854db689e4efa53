"""Manifests and logits for caches without videos: drawn from clip ids alone, so that parts agree with the whole."""

import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from mmkd.data_manifests.manifest import Clip, Head, Manifest

HEADS = (Head("verb", ("öffnen", "shut", "lift")), Head("noun", tuple(f"noun {i}" for i in range(7))))
EXPERTS = ("rgb", "flow")
VIEWS = {"train": 4, "test": 1}


def manifest_of(numbers: Iterable[int], *, flip_allowed: bool = True) -> Manifest:
    """Clips of these numbers, every third one in `test`."""
    clips = tuple(
        Clip(
            f"clip-{number}",
            f"{number}.webm",
            "test" if number % 3 == 0 else "train",
            {"verb": number % 3, "noun": None if number % 5 == 0 else number % 7},
        )
        for number in numbers
    )
    return Manifest("demo", HEADS, clips, flip_allowed)


def logits_of(manifest: Manifest) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """logits[split][expert][head] (rows, views, classes); flow has nothing for every fourth clip, or for a view."""
    found = {}
    for split in manifest.splits:
        clips, views = manifest.split(split), VIEWS[split]
        found[split] = {
            expert: {
                head.name: np.stack([draw(clip, expert, head, views) for clip in clips]).astype(np.float32)
                for head in HEADS
            }
            for expert in EXPERTS
        }
        for row, clip in enumerate(clips):
            number = int(clip.clip_id.removeprefix("clip-"))
            for value in found[split]["flow"].values():
                if number % 4 == 0:
                    value[row] = np.nan
                if number % 7 == 1:
                    value[row, -1] = np.nan
    return found


def draw(clip: Clip, expert: str, head: Head, views: int) -> np.ndarray:
    seed = zlib.crc32(f"{clip.clip_id} {expert} {head.name}".encode())
    return 4 * np.random.default_rng(seed).standard_normal((views, len(head.classes)))


def files_of(root: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
