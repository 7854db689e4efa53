# The interpreter and the namespace of a plain checkout come before what they are for.
# ruff: noqa: E402
"""First contact with a GPU: checks of TV-L1's CUDA path, then timings as markdown, within 8 minutes.

    python tests/benchmarks/flow_gpu.py --make-clips build/clips      # where OpenCV and the videos are
    python tests/benchmarks/flow_gpu.py --clips build/clips           # on the GPU: torch, Triton and numpy suffice
    python tests/benchmarks/flow_gpu.py --dry-run                     # anywhere: the script itself, interpreted

Works from a plain checkout. Without clips, moving textures stand for them. Run it under the Triton of torch 2.11
and under the newest. Each part is left out once the minutes are used up, the most important come first.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

DRY = "--dry-run" in sys.argv
if DRY:
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
if "mmkd" not in sys.modules and not __import__("importlib.util").util.find_spec("mmkd"):
    package = ModuleType("mmkd")
    package.__path__ = [str(ROOT)]
    sys.modules["mmkd"] = package

from mmkd.pipeline.tvl1 import (
    blocked as tvl1_blocked,
)
from mmkd.pipeline.tvl1 import (
    torch_path as tvl1_torch,
)
from mmkd.pipeline.tvl1 import (
    triton_level as tvl1_level,
)
from mmkd.pipeline.tvl1 import (
    triton_path as tvl1_triton,
)
from mmkd.pipeline.tvl1.blocked import Blocked, Shape
from mmkd.pipeline.tvl1.nvrtc import Kernel, NvrtcError
from mmkd.pipeline.tvl1.params import TVL1Params
from mmkd.pipeline.tvl1.triton_level import Level

DEVICE = torch.device("cpu" if DRY else "cuda:0")
WIDTH, HEIGHT = (40, 30) if DRY else (340, 256)
FRAMES = 3 if DRY else 65
RUNS = 1 if DRY else 5
SHORT = {"iterations": 4, "warps": 1, "scales": 2} if DRY else {}
DEFAULT = TVL1Params(**SHORT)
FULL = replace(DEFAULT, epsilon=0)
OPENCV = replace(TVL1Params.opencv(), **SHORT, **({"median": 3, "median_every": 2} if DRY else {}))
SHAPES = [Shape(), Shape(warps=8, rows=8), Shape(rows=5), Shape(warps=8)]


@dataclass(frozen=True)
class Check:
    """One check and how it ended."""

    name: str
    """What was checked."""
    good: bool
    """Whether it held."""
    detail: str
    """The figures."""


def texture_clip(*, speed: float, count: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Return (count, height, width) uint8: 24 waves that move by `speed` pixels per frame, with noise."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    clip = np.full((count, height, width), 127.5, np.float32)
    for _ in range(24):
        angle, phase, length = random.uniform(0, 2 * np.pi), random.uniform(0, 2 * np.pi), random.uniform(8, 60)
        wave = (x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / length + phase
        shift = speed * np.cos(angle) * 2 * np.pi / length
        clip += 20 * np.cos(wave - shift * np.arange(count, dtype=np.float32)[:, None, None])
    return (clip + random.normal(0, 1, clip.shape)).clip(0, 255).astype(np.uint8)


def load_clips(folder: Path | None) -> dict[str, torch.Tensor]:
    """Return clips by name, (N, H, W) uint8 on the host."""
    if folder is not None:
        return {path.stem: torch.from_numpy(np.load(path)) for path in sorted(folder.glob("*.npy"))}
    speeds = (0.3, 2.0) if DRY else (0.0, 0.3, 2.0, 8.0)
    made = {
        f"texture, {speed} px": texture_clip(speed=speed, count=FRAMES, height=HEIGHT, width=WIDTH)
        for speed in speeds
    }
    return {name: torch.from_numpy(clip) for name, clip in made.items()}


def make_clips(folder: Path) -> None:
    """Write 65 grey frames of 340x256 of each video of the local data folder."""
    import cv2

    folder.mkdir(parents=True, exist_ok=True)
    for video in sorted((ROOT.parent / "shared" / "data" / "videos").iterdir()):
        capture, frames = cv2.VideoCapture(str(video)), []
        while len(frames) < FRAMES and (read := capture.read())[0]:
            frames.append(cv2.resize(cv2.cvtColor(read[1], cv2.COLOR_BGR2GRAY), (WIDTH, HEIGHT)))
        if len(frames) > 1:
            np.save(folder / f"{video.stem}.npy", np.stack(frames))


def wait() -> None:
    """Wait for the device."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def seconds(run: Callable[[], object], *, repeats: int = 3, warm: int = 2) -> float:
    """Return the median wall time of `run`, its first runs (which compile and record graphs) not counted."""
    times = []
    for i in range(1 if DRY else warm + repeats):
        wait()
        start = time.perf_counter()
        run()
        wait()
        if DRY or i >= warm:
            times.append(time.perf_counter() - start)
    return float(np.median(times))


def table(title: str, head: list[str], rows: Iterator[list[str]] | list[list[str]]) -> None:
    """Print a markdown table, row by row."""
    print(f"\n**{title}**\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True)
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


def kernels_here() -> list[str]:
    """Return the iteration kernels that run here."""
    return ["fused", "blocked"] if tvl1_triton._blocked(DEVICE) is not None else ["fused"]


def difference(one: torch.Tensor, two: torch.Tensor) -> tuple[float, float]:
    """Return mean and 99th percentile of the endpoint difference."""
    distance = (one - two).square().sum(1).sqrt().flatten().cpu().numpy()
    return float(distance.mean()), float(np.percentile(distance, 99))


def checks(clips: dict[str, torch.Tensor]) -> Iterator[Check]:
    """Check the kernels against the torch path on the same device, and that a pair's bits are its own."""
    first = torch.cat([clip[:-1][:: max(1, len(clip) // 2)][:2] for clip in clips.values()]).to(DEVICE)
    second = torch.cat([clip[1:][:: max(1, len(clip) // 2)][:2] for clip in clips.values()]).to(DEVICE)
    fixed = replace(FULL, iterations=4 if DRY else 30)
    for label, params in {"default": DEFAULT, "fixed iterations": fixed, "opencv": OPENCV}.items():
        wanted = tvl1_torch.flow_of_pairs(first, second, params=params, budget_bytes=2**32)
        for kernel in kernels_here():
            found = tvl1_triton.tvl1_flow_triton(first, second, params=params, kernel=kernel)
            mean, high = difference(found, wanted)
            finite = bool(found.isfinite().all())
            yield Check(
                f"{kernel} follows torch, {label}",
                finite and mean < 0.01 and high < 0.1,
                f"mean {mean:.5f}, p99 {high:.4f} px",
            )
    for kernel in kernels_here():
        yield from own_bits(first, second, kernel)


def own_bits(first: torch.Tensor, second: torch.Tensor, kernel: str) -> Iterator[Check]:
    """Check exact zeros, repeatability, and independence of the batch, for one kernel."""

    def flow(one: torch.Tensor, two: torch.Tensor, params: TVL1Params = DEFAULT) -> torch.Tensor:
        return tvl1_triton.tvl1_flow_triton(one, two, params=params, kernel=kernel)

    yield Check(f"{kernel}: identical frames", not flow(first, first.clone()).any(), "exactly zero")
    for label, params in {"default": DEFAULT, "opencv": OPENCV}.items():
        batch = flow(first, second, params)
        again = all(torch.equal(flow(first, second, params), batch) for _ in range(RUNS))
        yield Check(f"{kernel}: the same in each run, {label}", again, "bits of each run; else a race")
        order = torch.randperm(len(first), generator=torch.Generator().manual_seed(0)).to(DEVICE)
        order = torch.cat([order, order[:1]])
        mixed = torch.equal(flow(first[order], second[order], params), batch[order])
        alone = all(
            torch.equal(flow(first[i : i + 1], second[i : i + 1], params), batch[i : i + 1])
            for i in range(min(RUNS, len(first)))
        )
        yield Check(
            f"{kernel}: the same in any batch, {label}", mixed and alone, f"{len(order)} pairs permuted, some alone"
        )
    fused = tvl1_triton.tvl1_flow_triton(first, second, params=DEFAULT, kernel="fused")
    yield Check(
        f"{kernel} and fused",
        difference(flow(first, second), fused)[0] < 0.01,
        "mean {:.5f}, p99 {:.4f} px".format(*difference(flow(first, second), fused)),
    )


def copy_bandwidth() -> float:
    """Return bytes per second of a device copy, reads and writes counted."""
    source = torch.rand(2**10 if DRY else 2**29, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source), repeats=10)


def count_iterations(run: Callable[[], object]) -> list[float]:
    """Return the mean iterations of a pair's warps, level by level from coarse to fine; slows `run` down."""
    found: dict[int, list[float]] = {}
    iterate = Level._iterate

    def counted(level: Level) -> None:
        iterate(level)
        done = level.control.done[: level.pairs].float()
        found.setdefault(level.height, []).append(float(done[done > 0].mean()) if bool((done > 0).any()) else 0.0)

    Level._iterate = counted
    try:
        run()
    finally:
        Level._iterate = iterate
    return [float(np.mean(found[height])) for height in sorted(found)]


def clip_rows(clips: dict[str, torch.Tensor], kernel: str) -> Iterator[list[str]]:
    """Time each clip: resident on the device, and from uint8 on the host to 8-bit flow on the host."""
    for name, clip in clips.items():
        pairs, resident = len(clip) - 1, clip.to(DEVICE)
        host = clip.pin_memory() if DEVICE.type == "cuda" else clip

        def flow(images: torch.Tensor, params: TVL1Params) -> torch.Tensor:
            return tvl1_triton.tvl1_clip_flow_triton(images, step=1, params=params, kernel=kernel)

        def whole(host: torch.Tensor = host) -> torch.Tensor:
            flow_px = flow(host.to(DEVICE, non_blocking=True), DEFAULT)
            return flow_px.add_(20).mul_(255 / 40).round_().clamp_(0, 255).to(torch.uint8).cpu()

        default = seconds(lambda images=resident: flow(images, DEFAULT))
        full = seconds(lambda images=resident: flow(images, FULL), repeats=1)
        iterations = count_iterations(lambda images=resident: flow(images, DEFAULT))
        yield [
            name,
            kernel,
            f"{pairs / default:,.0f}",
            f"{pairs / seconds(whole):,.0f}",
            f"{pairs / full:,.0f}",
            " ".join(f"{n:.0f}" for n in iterations),
        ]


def level_of(blocked: Blocked | None, *, pairs: int, params: TVL1Params = DEFAULT) -> Level:
    """Return the finest level, all pairs about to iterate on noise."""
    level = Level(pairs, (HEIGHT, WIDTH), params=params, device=DEVICE, blocked=blocked)
    images = torch.rand(2, pairs, HEIGHT, WIDTH, device=DEVICE) * 255
    level.start(None, pairs=pairs)
    level.run(*images)
    level.control.steps[:pairs] = level.slots
    level.control.listed[:pairs] = torch.arange(pairs, device=DEVICE, dtype=torch.int32)
    level.control.count.fill_(pairs)
    level.control.done.zero_()
    return level


def kernel_rows(bandwidth: float) -> Iterator[list[str]]:
    """Time the iteration kernels alone: bytes that must move, and their share of the copy bandwidth."""
    pairs, launches = (2, 1) if DRY else (64, 20)
    for kernel in kernels_here():
        level = level_of(tvl1_triton._blocked(DEVICE) if kernel == "blocked" else None, pairs=pairs)

        def run(level: Level = level) -> None:
            for _ in range(launches):
                level.launch_iterations()

        taken = seconds(run, repeats=5) / launches
        done = pairs * HEIGHT * WIDTH * level.slots
        least = 60 / level.slots
        yield [
            kernel,
            f"{1e6 * taken:.0f}",
            f"{done / taken / 1e9:.0f}",
            f"{least:.1f}",
            f"{least * done / taken / 1e9:.0f}",
            f"{least * done / taken / bandwidth:.2f}",
        ]
        decided = seconds(lambda level=level: [level._decide() for _ in range(launches)], repeats=5) / launches
        yield [f"decide, {level.slots} slots", f"{1e6 * decided:.0f}", "", "", "", ""]


def shape_rows() -> Iterator[list[str]]:
    """Time the blocked kernel cut in other ways."""
    for shape in SHAPES:
        try:
            major, minor = torch.cuda.get_device_capability(DEVICE)
            code = tvl1_blocked.cubin(shape, architecture=f"sm_{major}{minor}")
            kernel = Kernel.load(code, "tvl1_blocked", threads=shape.threads, shared_bytes=shape.shared_bytes)
        except NvrtcError as error:
            yield [str(shape), str(error)[:60], ""]
            continue
        blocks = torch.cuda.get_device_properties(DEVICE).multi_processor_count

        def launch(work: tvl1_blocked.Work, count: int, kernel: Kernel = kernel) -> None:
            kernel.launch(work, blocks=count)

        halos = tvl1_blocked.HALOS
        for halo in halos:
            tvl1_blocked.HALOS = (halo,)
            level = level_of(Blocked(shape, blocks, launch), pairs=64)
            taken = seconds(lambda level=level: [level.launch_iterations() for _ in range(20)], repeats=5) / 20
            rate = 64 * HEIGHT * WIDTH * halo / taken
            yield [f"{shape.warps} warps x {shape.rows} rows, halo {halo}", f"{rate / 1e9:.0f}", str(level.tiles)]
        tvl1_blocked.HALOS = halos


def scaling_rows(clip: torch.Tensor) -> Iterator[list[str]]:
    """Time batches and image sizes of one clip's pairs."""
    batches, sizes = (
        ((1, 3), ((30, 40),)) if DRY else ((1, 4, 16, 64, 256), ((128, 170), (256, 340), (512, 680), (720, 1280)))
    )
    for height, width in sizes:
        for batch in batches if (height, width) == (HEIGHT, WIDTH) else batches[-2:-1]:
            frames = clip[torch.arange(batch + 1) % len(clip)].to(DEVICE).float()
            images = torch.nn.functional.interpolate(frames[:, None], (height, width), mode="bilinear")[
                :, 0
            ].contiguous()
            rates = []
            for params in (DEFAULT, FULL):
                taken = seconds(
                    lambda p=params, i=images: tvl1_triton.tvl1_flow_triton(i[:-1], i[1:], params=p), repeats=2
                )
                rates.append(f"{batch / taken:,.0f}")
            tvl1_triton.release_memory()
            yield [f"{width}x{height}", str(batch), *rates]


def report(clips: dict[str, torch.Tensor], minutes: float) -> bool:
    """Print all parts for which there is time; return whether all checks held."""
    import triton

    start, good = time.monotonic(), True
    device = "interpreter" if DRY else torch.cuda.get_device_name(DEVICE)
    kernel = tvl1_triton.iteration_kernel(DEVICE)
    print(f"{device}, torch {torch.__version__}, Triton {triton.__version__}, iterations by the {kernel} kernel")
    for check in checks(clips):
        good &= check.good
        print(f"{'ok  ' if check.good else 'FAIL'} {check.name}: {check.detail}", flush=True)
    bandwidth = copy_bandwidth()
    print(f"copy: {bandwidth / 1e12:.2f} TB/s")
    rates = ["default, frames/s", "all iterations, frames/s"]
    clip_head = ["clip", "kernel", rates[0], "host to host", rates[1], "iterations per warp, coarse to fine"]
    kernel_head = ["kernel", "us", "G pixel-iterations/s", "bytes each", "GB/s", "of copy"]
    shape_head = ["shape", "G pixel-iterations/s", "tiles"]
    one_clip = next(iter(clips.values()))
    parts: list[Callable[[], None]] = [
        lambda: table(f"Clips at {WIDTH}x{HEIGHT}", clip_head, clip_rows(clips, kernel)),
        lambda: table("Kernels at the finest level", kernel_head, kernel_rows(bandwidth)),
        lambda: table("Blocked kernel, cut otherwise", shape_head, shape_rows() if kernel == "blocked" else []),
        lambda: table("Batch and size", ["size", "pairs", *rates], scaling_rows(one_clip)),
        lambda: table("Clips, fused kernel", clip_head, clip_rows(clips, "fused")),
    ]
    for part in parts:
        if time.monotonic() - start < 60 * minutes:
            part()
        else:
            print("\n(no time left for the next part)")
    print(f"\n{time.monotonic() - start:.0f} s in all; checks {'held' if good else 'FAILED'}")
    return good


def main() -> None:
    """Parse, then make clips or report; exit status 1 if a check failed."""
    parser = argparse.ArgumentParser(description="TV-L1 on a GPU: checks and timings")
    parser.add_argument("--clips", type=Path, help="folder of .npy clips, (N, 256, 340) uint8")
    parser.add_argument("--make-clips", type=Path, metavar="FOLDER", help="write such clips from the local videos")
    parser.add_argument("--minutes", type=float, default=7.0, help="start no further part after these")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, interpreted, tiny")
    options = parser.parse_args()
    if options.make_clips:
        make_clips(options.make_clips)
        return
    if not DRY and not torch.cuda.is_available():
        print("no CUDA device here: nothing measured (--dry-run tries the script itself)")
        return
    if DRY:
        tvl1_level.FUSED_ROWS, tvl1_level.PIXELS_PER_PROGRAM, tvl1_triton.PIXELS_PER_PROGRAM = 32, 2048, 2048
    sys.exit(0 if report(load_clips(options.clips), options.minutes) else 1)


if __name__ == "__main__":
    main()
