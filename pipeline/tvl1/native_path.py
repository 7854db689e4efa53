"""The native path of TV-L1: one pair per core through the C library of native.c.

The library is an optional extension without Python in it, loaded by ctypes, which releases the interpreter's
lock: pairs run on as many threads as torch has. What it gives up: a single pair uses one core.
"""

import ctypes
import functools
import importlib.util
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

import torch
from torch import Tensor

from mmkd.pipeline.tvl1.params import TVL1Params
from mmkd.pipeline.tvl1.steps import pyramid_sizes

EXTENSION = "mmkd.pipeline.tvl1._native"
INTERFACE = 1
"""Of native.c: an editable install may hold a library from before a change."""
# Iterations per sweep over the image; more gain little, fewer read the planes from the third cache more often
# (tests/benchmarks/RESULTS.md). At most MAX_BLOCK of native.c.
BLOCK = 16


class _Options(ctypes.Structure):
    """`Options` of native.c."""

    _fields_ = (
        *((name, ctypes.c_double) for name in ("tau", "lambda_", "theta", "zoom", "epsilon")),
        *((name, ctypes.POINTER(ctypes.c_int32)) for name in ("heights", "widths")),
        *((name, ctypes.c_int32) for name in ("levels", "warps", "iterations", "median", "median_every")),
        *((name, ctypes.c_int32) for name in ("opencv", "block")),
    )


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the loaded library, None where it is not built, is outdated, or the processor lacks multiply-add."""
    spec = importlib.util.find_spec(EXTENSION)
    if spec is None or spec.origin is None:
        return None
    return open_library(spec.origin)


def open_library(path: str) -> ctypes.CDLL | None:
    """Return the library in a file, None where it cannot be used here."""
    try:
        loaded = ctypes.CDLL(path)
    except OSError:  # built for another machine
        return None
    if not hasattr(loaded, "tvl1_interface") or loaded.tvl1_interface() != INTERFACE:
        return None
    pointer, options = ctypes.c_void_p, ctypes.POINTER(_Options)
    loaded.tvl1_pyramid_floats.argtypes = loaded.tvl1_workspace_floats.argtypes = [options]
    loaded.tvl1_pyramid_floats.restype = loaded.tvl1_workspace_floats.restype = ctypes.c_size_t
    loaded.tvl1_pyramid.argtypes = [options, pointer, ctypes.c_int, pointer, pointer]
    loaded.tvl1_pair.argtypes = [options, *[pointer] * 5]
    loaded.tvl1_pyramid.restype = loaded.tvl1_pair.restype = None
    return loaded


class NativePairs:
    """Pairs of one size and their parameters, computed on a few threads."""

    def __init__(self, height: int, width: int, *, params: TVL1Params, budget_bytes: int = 0) -> None:
        """Prepare; RuntimeError without a library."""
        found = library()
        if found is None:
            raise RuntimeError("the native TV-L1 library is not built")
        self._library = found
        self.size = height, width
        sizes = pyramid_sizes(height, width, scales=params.scales, zoom=params.zoom)
        side = ctypes.c_int32 * len(sizes)
        self._options = _Options(
            params.tau, params.lambda_, params.theta, params.zoom, params.epsilon,
            side(*(size[0] for size in sizes)), side(*(size[1] for size in sizes)), len(sizes), params.warps,
            params.iterations, params.median, params.median_every, params.mode == "opencv", BLOCK,
        )  # fmt: skip
        self._pyramid_floats: int = found.tvl1_pyramid_floats(self._options)
        self._scratch_floats: int = found.tvl1_workspace_floats(self._options)
        self._warps = len(sizes) * params.warps
        self._budget = budget_bytes

    def flow(self, frames: Sequence[Tensor], pairs: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Return the flow (P, 2, H, W) of pairs of frames (H, W), given by position, and iterations.

        The iterations, int32 (P, levels · warps), are those of each warp, coarse to fine. Frames that later pairs
        use again keep their pyramid, so pairs in ascending order of frames cost one pyramid for each frame.
        """
        result = torch.empty(len(pairs), 2, *self.size)
        counts = torch.zeros(len(pairs), self._warps, dtype=torch.int32)
        threads, group = self._threads_and_group(len(pairs))
        held: dict[int, Tensor] = {}
        with _Workers(threads, self._scratch_floats) as workers:
            for start in range(0, len(pairs), group):
                places = range(start, min(start + group, len(pairs)))
                used = sorted({i for place in places for i in pairs[place]})
                # A frame that the group before used keeps its pyramid; the others' memory is free again.
                missing = [i for i in used if i not in held]
                held = {i: held[i] if i in held else torch.empty(self._pyramid_floats) for i in used}
                workers.run(missing, functools.partial(self._pyramid, frames, held))
                out = result, counts
                workers.run(places, functools.partial(self._pair, pairs, held, out))
        return result, counts

    def pair_bytes(self) -> int:
        """Return the memory for one pair on one thread: scratch and pyramids, those of the group before too."""
        return 4 * (self._scratch_floats + 4 * self._pyramid_floats)

    def _threads_and_group(self, pairs: int) -> tuple[int, int]:
        """Return the threads, and how many pairs have their pyramids at one time, within the budget."""
        threads = max(1, min(torch.get_num_threads(), pairs, self._budget // self.pair_bytes()))
        # 4 pyramids of 4 bytes a value for each pair: of its two frames, and of as many of the group before.
        free = self._budget - 4 * threads * self._scratch_floats
        return threads, max(threads, free // (16 * self._pyramid_floats))

    def _pyramid(self, frames: Sequence[Tensor], held: dict[int, Tensor], i: int, scratch: Tensor) -> None:
        image = frames[i] if frames[i].dtype == torch.uint8 else frames[i].to(torch.float32)
        # The library is given an address, and no strides.
        image = image.contiguous()
        is_bytes = image.dtype == torch.uint8
        self._library.tvl1_pyramid(
            self._options, image.data_ptr(), is_bytes, held[i].data_ptr(), scratch.data_ptr()
        )

    def _pair(
        self,
        pairs: Sequence[tuple[int, int]],
        held: dict[int, Tensor],
        out: tuple[Tensor, Tensor],
        i: int,
        scratch: Tensor,
    ) -> None:
        tensors = (*(held[frame] for frame in pairs[i]), *(tensor[i] for tensor in out), scratch)
        self._library.tvl1_pair(self._options, *(tensor.data_ptr() for tensor in tensors))


class _Workers:
    """Threads that each have scratch of their own; one thread is the caller's."""

    def __init__(self, threads: int, scratch_floats: int) -> None:
        self._scratch: SimpleQueue[Tensor] = SimpleQueue()
        for _ in range(threads):
            self._scratch.put(torch.empty(scratch_floats))
        self._pool = ThreadPoolExecutor(threads, "tvl1") if threads > 1 else None

    def __enter__(self) -> "_Workers":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def run(self, items: Sequence[int], work: Callable[[int, Tensor], None]) -> None:
        """Call `work(item, scratch)` for each item, in any order, and wait; an exception is raised here."""

        def one(item: int) -> None:
            scratch = self._scratch.get()
            try:
                work(item, scratch)
            finally:
                self._scratch.put(scratch)

        if self._pool is None:
            for item in items:
                one(item)
        else:
            list(self._pool.map(one, items))  # reading the results raises what a thread raised


def pair_bytes(height: int, width: int, *, params: TVL1Params) -> int:
    """Return the memory that one pair needs beyond images and result."""
    return NativePairs(height, width, params=params).pair_bytes()


def flow_of_pairs(first: Tensor, second: Tensor, *, params: TVL1Params, budget_bytes: int) -> Tensor:
    """Return the flow of each pair of (B, H, W), checked by the caller, float32 (B, 2, H, W)."""
    height, width = first.shape[1:]
    count = len(first)
    frames = [*first, *second]
    pairs = NativePairs(height, width, params=params, budget_bytes=budget_bytes)
    return pairs.flow(frames, [(i, count + i) for i in range(count)])[0]


def flow_of_clip(frames: Tensor, *, step: int, params: TVL1Params, budget_bytes: int) -> Tensor:
    """Return the flow from each frame of (N, H, W) to the one `step` later, with one pyramid for each frame."""
    height, width = frames.shape[1:]
    pairs = NativePairs(height, width, params=params, budget_bytes=budget_bytes)
    return pairs.flow(list(frames), [(i, i + step) for i in range(len(frames) - step)])[0]
