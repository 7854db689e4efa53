"""Several iterations of TV-L1 per launch, on tiles that stay in registers: blocked.cu, compiled at run time.

An iteration needs its neighbours' last one, so a tile that starts `halo` pixels beyond what it stores can run as
many iterations alone: 6 on 64 x 64 pixels read and write 14 bytes per pixel-iteration through the caches and
10 through memory instead of 60, and compute 1.4 to 1.7 times as many pixels as they store. CUDA C++ rather than
Triton, because neighbours come from registers by shuffles, which Triton has no word for.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from mmkd.pipeline.tvl1.nvrtc import Kernel, NvrtcError, compile_cubin

SOURCE = Path(__file__).with_suffix(".cu")
TILE_WIDTH = 64
PLANES = 9
PLACE_BYTES = 44
MOST_HALO = 8
HALOS = (4, 6, MOST_HALO)
# What a tile costs besides its iterations, in iterations, counted in machine code: 500 of 365 instructions.
TILE_OVERHEAD = 500 / 365
# Bits must not depend on how a variant was compiled: no contraction.
OPTIONS = ("--fmad=false", "--std=c++17")


@dataclass(frozen=True)
class Shape:
    """How the kernel cuts an image; each is a constant of the compiled kernel."""

    warps: int = 16
    """Warps of a block, above each other; 16 fill the registers of a multiprocessor."""
    rows: int = 4
    """Rows of a tile per warp, of 64 pixels each; 10 registers per pixel and lane."""

    @property
    def tile_height(self) -> int:
        """Rows of a tile."""
        return self.warps * self.rows

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block: edges of warps, the next tile, errors of warps, two places."""
        edges, stage = 2 * 16 * self.threads, 4 * PLANES * TILE_WIDTH * self.tile_height
        return edges + stage + 4 * MOST_HALO * self.warps + 2 * PLACE_BYTES

    @property
    def definitions(self) -> tuple[str, ...]:
        """Compiler options that set these."""
        return f"-DWARPS={self.warps}", f"-DROWS={self.rows}", f"-DMOST_HALO={MOST_HALO}"


# The first that a device has the shared memory for: 164 KB (A100, H100 and later), 83 KB (consumer GPUs).
SHAPES = (Shape(), Shape(warps=8))


@dataclass(frozen=True)
class Tiles:
    """Tiles over an image: the first begins at its first pixel, each next one a step further."""

    across: int
    """Tiles next to each other."""
    down: int
    """Tiles above each other."""
    step_x: int
    """Pixels from one to the next, a multiple of 4 as copies go by 16 bytes."""
    step_y: int
    """Rows from one to the next."""
    halo: int
    """Pixels of a tile beyond what it stores, and most iterations per launch; larger reads less, computes more."""

    @classmethod
    def over(cls, height: int, width: int, *, shape: Shape, halo: int) -> "Tiles":
        """Cover an image so that each pixel is stored by the one tile in which it is right."""
        # What lies within the halo of a tile's edge is wrong after `halo` iterations: the next tile stores it.
        step_x = (TILE_WIDTH - 2 * halo) // 4 * 4
        step_y = shape.tile_height - 2 * halo
        if halo % 2 or halo > MOST_HALO or min(step_x, step_y) < 1:
            raise ValueError(f"a halo of {halo} is odd, above {MOST_HALO}, or too large for {TILE_WIDTH} x {shape}")
        # The first and the last tile are right up to the image's border: nothing beyond it is needed.
        across = 1 + max(0, -(-(width - TILE_WIDTH) // step_x))
        down = 1 + max(0, -(-(height - shape.tile_height) // step_y))
        return cls(across, down, step_x, step_y, halo)

    @classmethod
    def best(cls, height: int, width: int, *, shape: Shape) -> "Tiles":
        """Cover an image with the halo that takes the fewest instructions per iteration."""
        fitting = [halo for halo in HALOS if 2 * halo < shape.tile_height]
        plans = [cls.over(height, width, shape=shape, halo=halo) for halo in fitting]
        # A larger halo runs more iterations a launch on more tiles; ties go to the smaller one.
        return min(plans, key=lambda plan: plan.count * (1 + TILE_OVERHEAD / plan.halo))

    @property
    def count(self) -> int:
        """Tiles of one image."""
        return self.across * self.down


class Work(ctypes.Structure):
    """What a launch works on; mirrors `Work` of blocked.cu. Buffers are those of triton_kernels.py."""

    _fields_ = [
        ("state", ctypes.c_void_p),  # float32 (2, pairs, 6, height, pitch)
        ("data", ctypes.c_void_p),  # float32 (pairs, 3, height, pitch)
        ("partials", ctypes.c_void_p),  # float32 (pairs, halo, tiles): squared updates of U, a sum per iteration
        ("count", ctypes.c_void_p),  # int32 (1,): pairs that go on
        ("list", ctypes.c_void_p),  # int32 (pairs,): which ones, the first `count` places
        ("steps", ctypes.c_void_p),  # int32 (pairs,): iterations of this launch, at most halo
        ("done", ctypes.c_void_p),  # int32 (pairs,): iterations of this warp before it
        ("side", ctypes.c_void_p),  # int32 (pairs,): where the present state lies
        ("pairs", ctypes.c_int),
        ("height", ctypes.c_int),
        ("width", ctypes.c_int),
        ("pitch", ctypes.c_int),  # floats per row, a multiple of 4; zero beyond the width
        ("tiles_x", ctypes.c_int),
        ("tiles_y", ctypes.c_int),
        ("step_x", ctypes.c_int),
        ("step_y", ctypes.c_int),
        ("halo", ctypes.c_int),
        ("error_every", ctypes.c_int),  # sum in iterations n with (n + 1) % error_every == 0; 0: in none
        ("tau", ctypes.c_float),  # τ
        ("scale", ctypes.c_float),  # τ/θ
        ("limit", ctypes.c_float),  # τλ
    ]


Launch = Callable[[Work, int], None]
"""Runs a work in so many blocks."""


@dataclass(frozen=True)
class Blocked:
    """The kernel on one device."""

    shape: Shape
    """What it was compiled for."""
    blocks: int
    """Blocks that run at once: each works through tiles."""
    launch: Launch
    """How to start it."""


def cubin(shape: Shape, *, architecture: str) -> bytes:
    """Return the kernel's machine code; NvrtcError if it cannot be compiled or its source is not installed."""
    if not SOURCE.exists():
        raise NvrtcError(f"{SOURCE.name} was not installed with the package")
    return compile_cubin(SOURCE.read_text(), architecture=architecture, options=(*OPTIONS, *shape.definitions))


def load_blocked(device: torch.device) -> Blocked | None:
    """Return the kernel loaded on a CUDA device; None where it does not run, as asynchronous copies need sm_80.

    Raises NvrtcError if it should run there, but cannot be compiled or loaded.
    """
    properties = torch.cuda.get_device_properties(device)
    room = getattr(properties, "shared_memory_per_block_optin", 48 * 1024)
    shape = next((shape for shape in SHAPES if shape.shared_bytes <= room), None)
    if shape is None or properties.major < 8:
        return None
    with torch.cuda.device(device):
        torch.cuda.synchronize()  # makes torch's context the current one of this thread
        code = cubin(shape, architecture=f"sm_{properties.major}{properties.minor}")
        kernel = Kernel.load(code, "tvl1_blocked", threads=shape.threads, shared_bytes=shape.shared_bytes)

    def launch(work: Work, blocks: int) -> None:
        with torch.cuda.device(device):
            kernel.launch(work, blocks=blocks)

    return Blocked(shape, properties.multi_processor_count, launch)
