"""What a student costs on this machine: multiplications, parameters, time and memory of each form of it.

Times are of one process that has the machine to itself, or not: who measures knows. Memory is how much the process
grew at its peak beyond what it held before the form was loaded (VmHWM of Linux; of CUDA, what torch allocated), so
what a library keeps from an earlier form is not counted again.
"""

import ctypes
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mmkd.cache_tools.frames.records import UInt8Array

BATCHES = (1, 8)
WARM_UP = 2
"""Runs before the clock starts: kernels are chosen and memory is taken."""
LEAST_RUNS, MOST_RUNS, ENOUGH_SECONDS = 5, 200, 3.0
"""Runs that are timed: until enough seconds have passed, within these bounds."""
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Timing:
    """One form of a student at one batch."""

    form: str
    """Which: `eager fp32`, `ONNX int8` and so on."""
    batch: int
    """Views in a batch."""
    median_ms: float
    """Median time of a batch, in milliseconds."""
    p95_ms: float
    """Of 95 in 100 batches no more."""
    clips_per_second: float
    """Views a second, by the median."""
    runs: int
    """Batches that were timed."""
    peak_mib: float | None
    """Growth of memory at its peak while it ran, in MiB; None where the system does not tell."""


def gmac(network: nn.Module, frames: Tensor) -> float:
    """Return billion multiply-accumulates of a network for uint8 views (1, T, S, S, 3), wherever they lie.

    Convolutions, matrix products and attention count, as torch's FlopCounterMode counts them, over 2: one
    multiplication and one addition are one.
    """
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        network({"rgb": frames})
    return float(counter.get_total_flops()) / 2e9


def million_parameters(network: nn.Module) -> float:
    """Return millions of parameters, which training moves, without running statistics."""
    return sum(value.numel() for value in network.parameters()) / 1e6


def timed(
    form: str,
    run: Callable[[UInt8Array], object],
    *,
    shape: tuple[int, ...],
    peak_mib: Callable[[], float | None],
    advance: Callable[[], None],
) -> list[Timing]:
    """Time a form at each of `BATCHES` on noise of `shape` (T, S, S, 3); `peak_mib` is asked after each."""
    found = []
    for batch in BATCHES:
        frames = np.random.default_rng(0).integers(0, 256, (batch, *shape), dtype=np.uint8)
        seconds = run_seconds(lambda frames=frames: run(frames))  # type: ignore[misc]
        median = float(np.median(seconds))
        p95 = float(np.percentile(seconds, 95))
        found.append(Timing(form, batch, 1e3 * median, 1e3 * p95, batch / median, len(seconds), peak_mib()))
        advance()
    return found


def run_seconds(call: Callable[[], object], *, clock: Callable[[], float] = time.perf_counter) -> list[float]:
    """Return the seconds of each run of `call`, after `WARM_UP` runs that are not timed."""
    for _ in range(WARM_UP):
        call()
    seconds: list[float] = []
    while len(seconds) < LEAST_RUNS or (sum(seconds) < ENOUGH_SECONDS and len(seconds) < MOST_RUNS):
        start = clock()
        call()
        seconds.append(clock() - start)
    return seconds


@contextmanager
def growth() -> Iterator[Callable[[], float | None]]:
    """Yield what tells by how many MiB this process has grown at its peak since; None where that is not known."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)  # what was freed goes back to the system, so that taking it again counts
    try:
        CLEAR.write_text("5")  # Linux: the peak begins again at what is held now
        before = memory_mib("VmRSS")
    except OSError:
        before = None
    yield lambda: None if before is None else max(0.0, (memory_mib("VmHWM") or 0.0) - before)


def memory_mib(field: str) -> float | None:
    """Return a field of this process's status in MiB; None where there is none."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    return None


def machine() -> dict[str, str | int]:
    """Return what ran: processor, threads, torch and, where there is one, the GPU."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    found: dict[str, str | int] = {
        "processor": names[0].partition(":")[2].strip() if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found
