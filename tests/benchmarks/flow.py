"""TV-L1 side by side in one run: OpenCV's CPU class, our torch path, our native path, milliseconds per pair.

    python tests/benchmarks/flow.py [--frames N] [--iterations N] [--repetitions N] [--only TEXT]

Per core: one thread, CPU time of the process, the least of the repetitions, which take turns, so that other work
on the machine disturbs little. For `opencv-cuda` parameters too OpenCV is its CPU class, without median: its CUDA
class needs a GPU. The clips run on two threads, one pair each, CPU time of both and wall time; pairs are real
frames of ../shared/data where that folder is present, else the table is of a moving synthetic texture.
"""

import argparse
import os
import platform
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import torch

from mmkd.pipeline.tvl1 import TVL1Params, chosen_path, tvl1_clip_flow
from mmkd.pipeline.tvl1.dispatch import Path as FlowPath

DATA = Path(os.environ.get("MMKD_TEST_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
CLIPS = (
    ("videos/mmaction_demo.mp4", 40),
    ("videos/flipping_a_pancake.mkv", 100),
    ("videos/v_GGSY1Qvo990.mp4", 30),
    ("videos/mmaction_test.avi", 20),
    ("videos/rubber-whale.mp4", 2),
    ("something_something/2.webm", 10),
    ("something_something/151201.webm", 10),
    ("something_something/57082.webm", 10),
)
"""Eight real clips and the frame at which to start."""
Run = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    name: str
    """What is computed."""
    frames: np.ndarray
    """(N, H, W) uint8, consecutive."""
    params: TVL1Params
    """Ours, and OpenCV's as far as it has them."""

    def runs(self) -> dict[str, Run]:
        """Return name of an implementation -> its run over all pairs."""
        images = torch.from_numpy(self.frames)
        found: dict[str, Run] = {}
        if hasattr(cv2, "optflow"):
            found["OpenCV"] = lambda: [opencv_flow(*pair, self.params) for pair in pairwise(self.frames)]
        for path in our_paths():
            found[path] = lambda path=path: tvl1_clip_flow(images, params=self.params, path=path)
        return found


def our_paths() -> tuple[FlowPath, ...]:
    """Return the CPU paths that run here."""
    return ("torch", "native") if chosen_path("cpu") == "native" else ("torch",)


def read_frames(count: int, size: tuple[int, int], clip: int = 0) -> np.ndarray:
    """Return (count, height, width) uint8 grey frames of `size` (width, height)."""
    name, start = CLIPS[clip]
    if not (DATA / name).exists():
        y, x = np.mgrid[: size[1], : size[0]]
        shifts = 1.5 * np.arange(count)[:, None, None]
        waves = np.sin((x - shifts) / 5) + np.sin((x + y - shifts) / 11) + np.cos((2 * y - x + shifts) / 7)
        return (127.5 + 42 * waves).astype(np.uint8)
    capture = cv2.VideoCapture(str(DATA / name))
    frames = [capture.read()[1] for _ in range(start + count)][start:]
    capture.release()
    return np.stack([cv2.resize(cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY), size) for frame in frames])


def opencv_flow(first: np.ndarray, second: np.ndarray, params: TVL1Params) -> np.ndarray:
    """Run OpenCV's CPU class with the same parameters; a new object each time, as it keeps state."""
    inner = min(params.median_every, params.iterations)
    solver = cv2.optflow.DualTVL1OpticalFlow_create(
        nscales=params.scales,
        scaleStep=params.zoom,
        warps=params.warps,
        epsilon=params.epsilon,
        innnerIterations=inner,
        outerIterations=params.iterations // inner,
        medianFiltering=max(1, params.median),
    )
    return solver.calc(first, second, None)


def cases(frame_count: int, iterations: int) -> Iterator[Case]:
    """Yield the rows."""
    fixed = {"iterations": iterations, "epsilon": 0}
    frames = read_frames(frame_count, (340, 256))
    yield Case(f"opencv, {iterations} iterations, no median", frames, TVL1Params(mode="opencv", **fixed))
    yield Case(f"opencv, {iterations} iterations, median 5", frames, TVL1Params(mode="opencv", median=5, **fixed))
    yield Case(f"opencv-cuda, {iterations} iterations", frames, TVL1Params(**fixed))
    yield Case("preset default, early stop", frames, TVL1Params.default())
    yield Case("preset opencv, early stop", frames, TVL1Params.opencv())
    yield Case("preset accurate, early stop", frames, TVL1Params.accurate())
    yield Case("preset fast at 96x72, 24 pairs", read_frames(25, (96, 72)), TVL1Params.fast())


def least_milliseconds(runs: dict[str, Run], *, pairs: int, repetitions: int) -> dict[str, float]:
    """Return the least CPU time per pair of each, after one run that does not count."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repetitions + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            times[name].append(time.process_time() - start)
    return {name: 1000 * min(found[1:]) / pairs for name, found in times.items()}


def clips_on_two_cores(params: TVL1Params, *, frame_count: int) -> dict[str, tuple[float, float]]:
    """Return name -> CPU and wall milliseconds per pair over eight clips at 340x256, two threads."""
    clips = [read_frames(frame_count, (340, 256), i) for i in range(len(CLIPS))]
    pairs = [pair for frames in clips for pair in pairwise(frames)]
    images = [torch.from_numpy(frames) for frames in clips]

    def opencv() -> None:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda pair: opencv_flow(*pair, params), pairs))

    runs: dict[str, Run] = {"OpenCV": opencv} if hasattr(cv2, "optflow") else {}
    for path in our_paths():
        runs[path] = lambda path=path: [tvl1_clip_flow(clip, params=params, path=path) for clip in images]
    found = {}
    for name, run in runs.items():
        # Two OpenMP threads on a busy machine wait for each other: torch is given one.
        torch.set_num_threads(1 if name == "torch" else 2)
        cpu, wall = time.process_time(), time.perf_counter()
        run()
        used = time.process_time() - cpu, time.perf_counter() - wall
        found[name] = (1000 * used[0] / len(pairs), 1000 * used[1] / len(pairs))
    torch.set_num_threads(1)
    return found


def print_row(name: str, times: dict[str, float]) -> None:
    """Print a row: times, and ratios to OpenCV."""
    cells = [f"{times[key]:10.2f}" if key in times else f"{'-':>10}" for key in ("OpenCV", "torch", "native")]
    base = times.get("OpenCV")
    ratios = [f"{base / times[key]:10.1f}" if base and key in times else "" for key in ("torch", "native")]
    print(f"{name:42}{''.join(cells)}{''.join(ratios)}", flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description="TV-L1 side by side")
    parser.add_argument("--frames", type=int, default=3, help="frames at 340x256, so one pair less")
    parser.add_argument("--iterations", type=int, default=30, help="fixed iterations per warp, 30 or a multiple")
    parser.add_argument("--repetitions", type=int, default=2, help="the least of so many counts")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, OpenCV {cv2.__version__}")
    columns = ("OpenCV ms", "torch ms", "native ms", "torch x", "native x")
    print(f"{'per core, 340x256':42}{''.join(f'{column:>10}' for column in columns)}")
    for case in cases(options.frames, options.iterations):
        if options.only in case.name:
            pairs = len(case.frames) - 1
            print_row(case.name, least_milliseconds(case.runs(), pairs=pairs, repetitions=options.repetitions))
    for preset in ("default", "opencv"):
        if options.only in (name := f"8 clips on 2 cores, {preset}"):
            found = clips_on_two_cores(getattr(TVL1Params, preset)(), frame_count=options.frames)
            print_row(f"{name}, CPU", {key: times[0] for key, times in found.items()})
            print_row(f"{name}, wall", {key: times[1] for key, times in found.items()})


if __name__ == "__main__":
    main()
