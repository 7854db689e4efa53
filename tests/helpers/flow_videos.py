"""Small videos with known motion for the tests of the flow command."""

from pathlib import Path

import numpy as np

from mmkd.data_manifests.demo.write import encode_video


def texture(frames: int, *, size=(64, 48), shift=(2, 1), seed=0) -> np.ndarray:
    """Return RGB frames (N, H, W, 3) of a smooth texture that moves by `shift` (x, y) pixels a frame."""
    width, height = size
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width].astype(np.float64)
    waves = [(*rng.uniform(-0.45, 0.45, 2), rng.uniform(0, 6.3), c) for c in range(3) for _ in range(4)]
    clip = np.zeros((frames, height, width, 3))
    for time in range(frames):
        for along, down, phase, channel in waves:
            clip[time, ..., channel] += np.sin(along * (x - shift[0] * time) + down * (y - shift[1] * time) + phase)
    return np.clip(128 + 30 * clip, 0, 255).astype(np.uint8)


def write_texture(path: Path, frames: int, *, fps: int = 12, **more) -> Path:
    """Write such a video as VP9 in WebM."""
    path.parent.mkdir(parents=True, exist_ok=True)
    encode_video(texture(frames, **more), path, fps)
    return path
