"""Runs the CUDA path of TV-L1 on the CPU and saves what it finds: `python tests/tvl1_interpreted.py FOLDER`.

A process of its own, as Triton must be told to interpret before it is loaded. The Triton kernels run in Triton's
interpreter, the CUDA kernel in cuda_emulation.h where g++ is found. FOLDER holds frames.npy and cases.json.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import ctypes
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from mmkd.pipeline.tvl1 import TVL1Params, tvl1_flow
from mmkd.pipeline.tvl1 import triton_kernels as kernels
from mmkd.pipeline.tvl1 import triton_level as tvl1_level
from mmkd.pipeline.tvl1 import triton_path as tvl1_triton
from mmkd.pipeline.tvl1.blocked import SOURCE, Blocked, Shape
from mmkd.pipeline.tvl1.median import WINDOWS_AS_EXCHANGES

SIZES = ((1, 1), (3, 2), (5, 131), (33, 1))
SMALL_SHAPE = Shape(warps=4, rows=4)
CPU = torch.device("cpu")


def emulated(shape: Shape, folder: Path, *, blocks: int, late: bool) -> Blocked:
    """Compile the CUDA kernel for the CPU."""
    library = folder / f"blocked-{shape.warps}.so"
    header = Path(__file__).with_name("cuda_emulation.h")
    if not library.exists():
        definitions = (*shape.definitions, f'-DKERNEL_FILE="{SOURCE}"')
        options = ("-std=c++17", "-O2", "-w", "-ffp-contract=off", "-fPIC", "-shared")
        subprocess.run(["g++", *options, *definitions, "-x", "c++", header, "-o", library], check=True)
    run = ctypes.CDLL(str(library)).emulate
    return Blocked(shape, blocks, lambda task, count: run(ctypes.byref(task), count, int(late)))


def flows(frames: torch.Tensor, cases: dict[str, TVL1Params], which: list[str]) -> dict[str, np.ndarray]:
    """Run all cases with each kernel, counting the iterations of each warp."""
    found = {}
    counts: list[list[int]] = []
    iterate = tvl1_level.Level._iterate

    def counted(level: tvl1_level.Level) -> None:
        iterate(level)
        counts.append(level.control.done[:2].tolist())

    tvl1_level.Level._iterate = counted
    for kernel in which:
        for name in ("cuda", "opencv"):
            params = cases[name]
            counts.clear()
            flow = tvl1_triton.tvl1_flow_triton(frames[:-1], frames[1:], params=params, kernel=kernel)
            found[f"{kernel} {name} flow"], found[f"{kernel} {name} counts"] = flow.numpy(), np.array(counts)
    tvl1_level.Level._iterate = iterate
    params, large = cases["cuda"], cases["large"]
    # The second pair in another place, with a finished one before it, and as the last frames of a clip.
    order = torch.tensor([1, 1, 0])
    first, second = frames[:-1][order], frames[1:][order]
    found["other batch"] = tvl1_triton.tvl1_flow_triton(first, second, params=params, kernel=which[-1]).numpy()
    clip = tvl1_triton.tvl1_clip_flow_triton(frames.to(torch.uint8), step=1, params=large, kernel=which[-1])
    apart = tvl1_flow(frames[1:2].to(torch.uint8), frames[2:].to(torch.uint8), params=large, path="torch")
    found["clip"], found["clip reference"] = clip[1:].numpy(), apart.numpy()
    for height, width in SIZES:
        images = frames[:2].repeat(1, 1, 3)[:, :height, :width].contiguous()
        found[f"{width}x{height}"] = tvl1_triton.tvl1_flow_triton(
            images[:1], images[1:], params=large, kernel=which[-1]
        ).numpy()
        wanted = tvl1_flow(images[:1], images[1:], params=large, path="torch")
        found[f"{width}x{height} reference"] = wanted.numpy()
    return found


def decisions() -> dict[str, np.ndarray]:
    """Let `decide_kernel` stop 64 pairs whose sums decay at random rates; return sums and where each stopped."""
    random = np.random.default_rng(0)
    n = np.arange(40)
    sums = np.exp(random.uniform(0, 5, (64, 1)) - random.uniform(0.05, 0.6, (64, 1)) * n) * random.uniform(
        0.7, 1.4, (64, 40)
    )
    sums[0] = 1e-6
    found = {"sums": sums}
    for every in (1, 2):
        for slots in (1, 6):
            control = tvl1_level.Control.on(CPU, threshold=1.0, factor=0.5)
            state = (control.done, control.steps, control.final, control.previous)
            kernels.begin_kernel[(1,)](*state, control.listed, control.count, slots, 64)
            partials = torch.zeros(64, slots, 35)
            while int(control.count):
                done, steps = control.done.numpy(), control.steps.numpy()
                assert sorted(control.listed[: int(control.count)].tolist()) == np.flatnonzero(steps).tolist()
                partials.fill_(float("nan"))
                for pair in range(64):
                    for slot in range(steps[pair]):
                        partials[pair, slot] = 2 * sums[pair, done[pair] + slot] / 35
                kernels.decide_kernel[(1,)](
                    partials, control.limits, *state, control.side, control.listed, control.count, 35, 40, 40,
                    EVERY=every, SLOTS=slots, CHUNKS=2,
                )  # fmt: skip
            found[f"stops {every} {slots}"] = control.done.numpy().copy()
    return found


def medians() -> dict[str, np.ndarray]:
    """Filter noise with both sizes; the middle pair of three has stopped."""
    state = torch.from_numpy(np.random.default_rng(1).normal(size=(2, 3, 6, 20, 24)).astype(np.float32))
    found = {"noise": state.numpy().copy()}
    integers = torch.zeros(3, 64, dtype=torch.int32)
    side, steps, final = integers
    side[2], steps[0], steps[2] = 1, 3, 3
    for size, network in WINDOWS_AS_EXCHANGES.items():
        filtered, copy = torch.zeros(3, 2, 20, 24), state.clone()
        common = side, steps, final, 3
        kernels.median_kernel[(1, 3, 2)](
            copy, filtered, *common, 20, 22, 24, SIZE=size, NETWORK=network, EXCHANGES=len(network) // 2, BLOCK=512
        )
        kernels.replace_kernel[(1, 3)](copy, filtered, *common, 20, 24, BLOCK=1024)
        found[f"median {size}"] = copy.numpy()
    return found


def main() -> None:
    """Write FOLDER/found.npz."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    frames = torch.from_numpy(np.load(folder / "frames.npy"))
    # The interpreter's time goes by the program, not by the pixel.
    tvl1_level.FUSED_ROWS, tvl1_level.PIXELS_PER_PROGRAM = 32, 4096
    tvl1_triton.PIXELS_PER_PROGRAM = 4096
    which = ["fused"]
    if shutil.which("g++"):
        tvl1_triton._BLOCKED[CPU] = emulated(SMALL_SHAPE, folder, blocks=3, late=True)
        which.append("blocked")
    cases = {name: TVL1Params(**fields) for name, fields in json.loads((folder / "cases.json").read_text()).items()}
    large = cases["large"]
    found = flows(frames, cases, which) | decisions() | medians()
    if "blocked" in which:
        tvl1_triton.release_memory()
        tvl1_triton._BLOCKED[CPU] = emulated(Shape(), folder, blocks=2, late=False)
        found["large"] = tvl1_triton.tvl1_flow_triton(
            frames[:-1], frames[1:], params=large, kernel="blocked"
        ).numpy()
    np.savez(folder / "found.npz", **found)


if __name__ == "__main__":
    main()
