"""TV-L1 side by side in one run: ours, OpenCV's CPU class, and the presets, milliseconds per pair.

    python tests/benchmarks/flow.py [--frames N] [--iterations N]

All on one thread. The CPU time of the process is what counts, the least of the repetitions, so that other
work on the machine disturbs little. Pairs are real frames of ../shared/data/videos where that folder is
present, else a moving synthetic texture.
"""

import argparse
import platform
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import torch

from mmkd.pipeline.tvl1 import TVL1Params, tvl1_clip_flow, tvl1_flow

VIDEO = Path(__file__).resolve().parents[3] / "shared" / "data" / "videos" / "mmaction_demo.mp4"
START_FRAME = 40


def read_frames(count: int, size: tuple[int, int]) -> np.ndarray:
    """Return (count, height, width) uint8 grey frames of `size` (width, height)."""
    if not VIDEO.exists():
        y, x = np.mgrid[: size[1], : size[0]]
        shifts = 1.5 * np.arange(count)[:, None, None]
        waves = np.sin((x - shifts) / 5) + np.sin((x + y - shifts) / 11) + np.cos((2 * y - x + shifts) / 7)
        return (127.5 + 42 * waves).astype(np.uint8)
    capture = cv2.VideoCapture(str(VIDEO))
    frames = [capture.read()[1] for _ in range(START_FRAME + count)][START_FRAME:]
    capture.release()
    return np.stack([cv2.resize(cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY), size) for frame in frames])


def best_milliseconds(run: Callable[[], object], *, pairs: int, repetitions: int) -> float:
    """Return the least CPU time per pair over the repetitions, after one that does not count."""
    run()
    times = []
    for _ in range(repetitions):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return 1000 * min(times) / pairs


def run_opencv(frames: np.ndarray, params: TVL1Params) -> list[np.ndarray]:
    """Run OpenCV's CPU class on consecutive pairs with the same parameters."""
    inner = min(params.median_every, params.iterations)
    flows = []
    for first, second in pairwise(frames):
        solver = cv2.optflow.DualTVL1OpticalFlow_create(
            nscales=params.scales,
            epsilon=params.epsilon,
            innnerIterations=inner,
            outerIterations=params.iterations // inner,
            medianFiltering=max(1, params.median),
        )
        flows.append(solver.calc(first, second, None).transpose(2, 0, 1))
    return flows


def rows(frame_count: int, iterations: int) -> list[tuple[str, float, float | None]]:
    """Measure; each row is a name, milliseconds per pair, and those of OpenCV at equal parameters."""
    frames = read_frames(frame_count, (340, 256))
    images, pairs = torch.from_numpy(frames), frame_count - 1
    table: list[tuple[str, float, float | None]] = []
    cases = {
        f"opencv, {iterations} iterations, no median": TVL1Params(mode="opencv", iterations=iterations, epsilon=0),
        f"opencv, {iterations} iterations, median 5": TVL1Params(
            mode="opencv", median=5, iterations=iterations, epsilon=0
        ),
        f"opencv-cuda, {iterations} iterations": TVL1Params(iterations=iterations, epsilon=0),
        "opencv (early stop)": TVL1Params.opencv(),
        "default (opencv-cuda, early stop)": TVL1Params.default(),
    }
    for name, params in cases.items():

        def ours(params: TVL1Params = params) -> torch.Tensor:
            return tvl1_flow(images[:-1], images[1:], params=params)

        def theirs(params: TVL1Params = params) -> list[np.ndarray]:
            return run_opencv(frames, params)

        oracle = best_milliseconds(theirs, pairs=pairs, repetitions=2) if hasattr(cv2, "optflow") else None
        table.append((f"340x256 {name}", best_milliseconds(ours, pairs=pairs, repetitions=3), oracle))
    small = torch.from_numpy(read_frames(33, (96, 72)))
    fast = TVL1Params.fast()
    flow = best_milliseconds(lambda: tvl1_flow(small[:-1], small[1:], params=fast), pairs=32, repetitions=5)
    clip = best_milliseconds(lambda: tvl1_clip_flow(small, params=fast), pairs=32, repetitions=5)
    return [*table, ("96x72 fast, 32 pairs", flow, None), ("96x72 fast, clip of 33 frames", clip, None)]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="TV-L1 side by side, one thread")
    parser.add_argument("--frames", type=int, default=3, help="frames at 340x256, so one pair less")
    parser.add_argument("--iterations", type=int, default=30, help="fixed iterations per warp, 30 or a multiple")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, OpenCV {cv2.__version__}")
    print(f"{'':48}{'ours ms':>10}{'OpenCV ms':>12}{'ratio':>8}")
    for name, ours, theirs in rows(options.frames, options.iterations):
        other = f"{theirs:12.0f}{theirs / ours:8.2f}" if theirs else f"{'-':>12}{'-':>8}"
        print(f"{name:48}{ours:10.1f}{other}")


if __name__ == "__main__":
    main()
