# mypy: disable-error-code="import-untyped"
# Triton ships no type information.
"""One scale of TV-L1 for a group of pairs on a CUDA device: buffers, warps, and launches until all have stopped.

Nothing is asked of the device per iteration: `decide_kernel` follows OpenCV's stopping rule there, finished pairs
cost nothing, and the host reads one number per CHUNK_ITERATIONS iterations. On CUDA the launches of such a chunk
are recorded once as a CUDA graph. With TRITON_INTERPRET=1 the same code runs on the CPU.
"""

import ctypes
import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from mmkd.pipeline.tvl1 import triton_kernels as kernels
from mmkd.pipeline.tvl1.blocked import Blocked, Tiles, Work
from mmkd.pipeline.tvl1.median import WINDOWS_AS_EXCHANGES
from mmkd.pipeline.tvl1.params import TVL1Params
from mmkd.pipeline.tvl1.steps import linear_taps

Size = tuple[int, int]
MOST_PAIRS: int = kernels.MOST_PAIRS.value
CHUNK_ITERATIONS = 30
FUSED_ROWS, FUSED_COLUMNS = 4, 64
PIXELS_PER_PROGRAM = 256
PLANES_PER_PAIR = 17
"""float32 planes of a pair: twice U and p, the data, the gradient of I₁."""
# Triton's default is about to change; said outright, versions agree.
OPTIONS = {"enable_fp_fusion": True}


def pitch_of(width: int) -> int:
    """Return floats per row: rows start at 16 bytes, for the copies of the blocked kernel."""
    return -(-width // 4) * 4


@dataclass(frozen=True)
class Control:
    """What the device knows of each pair of a group, places 0 to MOST_PAIRS - 1; int32 where not said."""

    side: Tensor
    """Which half of the state is the present one."""
    done: Tensor
    """Iterations of this warp."""
    steps: Tensor
    """Iterations of the next launch, 0 for a pair that has stopped."""
    final: Tensor
    """1 where the next launch repeats the last one up to the iteration that should have been its end."""
    previous: Tensor
    """float64, the last sum of squared updates (px²), less the threshold for each iteration since."""
    listed: Tensor
    """The pairs that go on, `count` of them."""
    count: Tensor
    """(1,)."""
    limits: Tensor
    """float64 (2,): threshold in px², and px² per unit of the sums."""

    @classmethod
    def on(cls, device: torch.device, *, threshold: float, factor: float) -> "Control":
        """Make it, with all pairs stopped."""
        integers = torch.zeros(5, MOST_PAIRS, dtype=torch.int32, device=device).unbind()
        side, done, steps, final, listed = integers
        previous = torch.zeros(MOST_PAIRS, dtype=torch.float64, device=device)
        count = torch.zeros(1, dtype=torch.int32, device=device)
        limits = torch.tensor([threshold, factor], dtype=torch.float64, device=device)
        return cls(side, done, steps, final, previous, listed, count, limits)


class Level:
    """Buffers and launches of one scale, for up to `pairs` pairs of one size."""

    def __init__(
        self,
        pairs: int,
        size: tuple[int, int],
        *,
        params: TVL1Params,
        device: torch.device,
        blocked: Blocked | None,
    ) -> None:
        """Allocate; `blocked` runs the iterations if it is there, else the fused Triton kernel."""
        self.pairs, (self.height, self.width), self.params, self.blocked = pairs, size, params, blocked
        self.pitch = pitch_of(self.width)
        zeros = torch.zeros
        # Beyond the width the planes stay zero: the blocked kernel relies on it.
        self.state = zeros(2, pairs, 6, self.height, self.pitch, device=device)
        self.data = zeros(pairs, 3, self.height, self.pitch, device=device)
        self.gradient = zeros(2, pairs, self.height, self.width, device=device)
        self.filtered = zeros(pairs if params.median else 0, 2, self.height, self.pitch, device=device)
        tau, theta = params.tau, params.theta
        threshold = params.epsilon**2 * self.height * self.width
        self.control = Control.on(device, threshold=threshold, factor=(theta / tau) ** 2)
        # Which iterations may have to test for the end, see `decide_kernel`.
        self.error_every = 0 if params.epsilon == 0 else 1 if params.mode == "opencv" else 2
        self.plan = Tiles.best(*size, shape=blocked.shape) if blocked else None
        # A blocked launch runs up to `halo` iterations, each with an error of its own; a fused one runs one.
        self.slots = self.plan.halo if self.plan else 1
        self.tiles = self._tiles()
        self.chunks = triton.cdiv(self.tiles, kernels.TILES_AT_ONCE.value)
        # Sums of tiles are kept apart and added in one order, so that bits do not depend on which tile ends first.
        self.partials = zeros(MOST_PAIRS, self.slots, self.tiles, device=device)
        self.work = self._work()
        self.graph: torch.cuda.CUDAGraph | None = None
        self.chunks_run = 0

    def _tiles(self) -> int:
        if self.plan:
            return self.plan.count
        return math.ceil(self.height / FUSED_ROWS) * math.ceil(self.width / FUSED_COLUMNS)

    def _work(self) -> Work | None:
        if not self.plan:
            return None
        control, params, plan = self.control, self.params, self.plan
        buffers = (
            self.state, self.data, self.partials,
            control.count, control.listed, control.steps, control.done, control.side,
        )  # fmt: skip
        sizes = (
            self.pairs,
            self.height,
            self.width,
            self.pitch,
            plan.across,
            plan.down,
            plan.step_x,
            plan.step_y,
            plan.halo,
        )
        factors = params.tau, params.tau / params.theta, params.tau * params.lambda_
        return Work(*(ctypes.c_void_p(b.data_ptr()) for b in buffers), *sizes, self.error_every, *factors)

    def start(self, coarser: "Level | None", *, pairs: int) -> None:
        """Set U from the coarser level (zero without one), p to zero, as at the start of each scale."""
        self.control.side.zero_()
        self.state[0].zero_()
        # The coarsest scale starts from no motion.
        if coarser is None:
            return
        half_pixel = self.params.mode == "opencv"
        sizes = ((coarser.width, self.width), (coarser.height, self.height))
        x_taps, y_taps = (axis_taps(*s, ratio=None, half_pixel=half_pixel, device=self.state.device) for s in sizes)
        kernels.upsample_kernel[(*self._grid(pairs), 2)](
            coarser.state, coarser.control.side, self.state, *x_taps, *y_taps,
            coarser.pairs, coarser.height, coarser.pitch, self.height, self.width, self.pitch, 1 / self.params.zoom,
            BLOCK=PIXELS_PER_PROGRAM, **OPTIONS,
        )  # fmt: skip

    def flow(self, pairs: int) -> Tensor:
        """Return u of the first `pairs` pairs in pixels, (pairs, 2, H, W)."""
        # Pairs stop after an odd or an even number of launches, so each has its own side.
        side = self.control.side[:pairs].long()
        places = torch.arange(pairs, device=side.device)
        flow = self.state[side, places, :2, :, : self.width]
        return flow.mul_(self.params.theta / self.params.tau)

    def run(self, first: Tensor, second: Tensor) -> None:
        """Run the warps of this scale on I₀ and I₁, both (pairs, H, W) float32, as `procOneScale` does."""
        pairs, params, control = len(first), self.params, self.control
        across, down = self.gradient
        grid = self._grid(pairs)
        kernels.gradient_kernel[grid](
            second, across, down, self.height, self.width, BLOCK=PIXELS_PER_PROGRAM, **OPTIONS
        )
        for _ in range(params.warps):
            kernels.linearise_kernel[grid](
                self.state, control.side, first, second, across, down, self.data,
                self.pairs, self.height, self.width, self.pitch, params.theta / params.tau,
                CLAMPED=params.mode == "opencv-cuda", BLOCK=PIXELS_PER_PROGRAM, **OPTIONS,
            )  # fmt: skip
            # A launch never runs past a median or past the last iteration: those are between launches.
            first_steps = min(self.slots, self._period(), params.iterations)
            kernels.begin_kernel[(1,)](
                control.done, control.steps, control.final, control.previous, control.listed, control.count,
                first_steps, pairs, **OPTIONS,
            )  # fmt: skip
            self._iterate()

    def _grid(self, pairs: int) -> tuple[int, int]:
        return triton.cdiv(self.height * self.width, PIXELS_PER_PROGRAM), pairs

    def _period(self) -> int:
        """Return the iterations after which each pair that goes on has done equally many: medians stand there."""
        return self.params.median_every if self.params.median > 1 else self.params.iterations

    def _iterate(self) -> None:
        chunk = self._period() if self.params.median > 1 else CHUNK_ITERATIONS
        # As many launches as bring each pair to the end of a chunk if none has to repeat one.
        self.launches = math.ceil(min(chunk, self.params.iterations) / self.slots)
        per_chunk = chunk if self.params.median > 1 else self.launches * self.slots
        chunks = math.ceil(self.params.iterations / per_chunk)
        if self.error_every == 0:
            for _ in range(chunks):
                self._run_chunk()
            return
        for _ in range(chunks + 1):  # one more for pairs that repeat the end of the last one
            self._run_chunk()
            # Waits for the device, so it is asked once a chunk, not once a launch.
            if int(self.control.count) == 0:
                return

    def _run_chunk(self) -> None:
        """Run a chunk; on CUDA as a graph from the second time on: the first compiles the kernels."""
        if self.graph is None and self.state.is_cuda and self.chunks_run == 1:
            # A launch from Python costs more than a small scale's iterations: a graph sends a whole chunk at once.
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._chunk()
            self.graph = graph
        self.chunks_run += 1
        if self.graph is None:
            self._chunk()
        else:
            self.graph.replay()

    def _chunk(self) -> None:
        if self.params.median > 1:
            self._median()
        for _ in range(self.launches):
            self.launch_iterations()
            self._decide()

    def launch_iterations(self) -> None:
        """Launch `control.steps` iterations of each pair."""
        if self.blocked and self.work:
            self.blocked.launch(self.work, min(self.blocked.blocks, self.tiles * self.pairs))
            return
        control, params = self.control, self.params
        kernels.iterate_kernel[(self.tiles, self.pairs)](
            self.state, self.data, self.partials, control.side, control.steps,
            self.pairs, self.height, self.width, self.pitch,
            params.tau, params.tau / params.theta, params.tau * params.lambda_,
            WITH_ERROR=self.error_every > 0, ROWS=FUSED_ROWS, COLUMNS=FUSED_COLUMNS, **OPTIONS,
        )  # fmt: skip

    def _decide(self) -> None:
        control = self.control
        kernels.decide_kernel[(1,)](
            self.partials, control.limits, control.done, control.steps, control.final, control.previous,
            control.side, control.listed, control.count, self.tiles, self.params.iterations, self._period(),
            EVERY=self.error_every, SLOTS=self.slots, CHUNKS=self.chunks, num_warps=16, **OPTIONS,
        )  # fmt: skip

    def _median(self) -> None:
        control, size = self.control, self.params.median
        network = WINDOWS_AS_EXCHANGES[size]
        common = control.side, control.steps, control.final, self.pairs
        kernels.median_kernel[(*self._grid(self.pairs), 2)](
            self.state, self.filtered, *common, self.height, self.width, self.pitch,
            SIZE=size, NETWORK=network, EXCHANGES=len(network) // 2, BLOCK=PIXELS_PER_PROGRAM, **OPTIONS,
        )  # fmt: skip
        cells = 2 * self.height * self.pitch
        kernels.replace_kernel[(triton.cdiv(cells, 1024), self.pairs)](
            self.state, self.filtered, *common, self.height, self.pitch, BLOCK=1024, **OPTIONS
        )


_TAPS: dict[tuple[int, int, float | None, bool, torch.device], tuple[Tensor, Tensor, Tensor]] = {}


def axis_taps(
    source: int, result: int, *, ratio: float | None, half_pixel: bool, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Return tvl1_steps.linear_taps on a device, kept for the next time: copying them would make the host wait."""
    key = source, result, ratio, half_pixel, device
    if key not in _TAPS:
        step = 1.0 if source == result else source / result if ratio is None else ratio
        first, second, weight = linear_taps(source, result, step=step, half_pixel=half_pixel)
        _TAPS[key] = first.int().to(device), second.int().to(device), weight.to(device)
    return _TAPS[key]
