"""TV-L1 optical flow of many image pairs, on any device; importing this needs torch alone.

Follows OpenCV's two implementations: `opencv-cuda`, which denseflow, EPIC's furnari-flow and I3D's flow were
made with and which is the default, and `opencv`, its CPU class.

Paths: `triton`, fused kernels on CUDA; `native`, a fused loop in C on the CPU, built when the package is
installed where a C compiler is found, several pairs at once on torch.get_num_threads() threads; `torch`, which
runs anywhere and is the reference. `auto` takes the first of them that runs on the images' device.

On each path and device a pair's result has the same bits in any batch and with any number of threads, early
stopping included. Paths round differently: a result that must not mix them keeps `arithmetic` with it.

Sources: Zach, Pock, Bischof, "A duality based approach for realtime TV-L1 optical flow" (2007); Sánchez,
Meinhardt-Llopis, Facciolo, "TV-L1 optical flow estimation" (IPOL 2013); opencv_contrib
modules/cudaoptflow/src/tvl1flow.cpp, cuda/tvl1flow.cu and modules/optflow/src/tvl1flow.cpp.
"""

import importlib
import os
import tempfile
from contextlib import suppress
from pathlib import Path as FilePath
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from mmkd.pipeline.tvl1 import native_path as tvl1_native
from mmkd.pipeline.tvl1 import torch_path as tvl1_torch
from mmkd.pipeline.tvl1.params import BUDGET_BYTES_DEVICE, TVL1Params

ChosenPath = Literal["torch", "native", "triton"]
Path = Literal["auto", "torch", "native", "triton"]
PATHS: tuple[Path, ...] = ("auto", "torch", "native", "triton")
TRITON_MODULE = "mmkd.pipeline.tvl1.triton_path"
BUDGET_BYTES_CPU = 512 * 2**20


def chosen_path(device: torch.device | str) -> ChosenPath:
    """Return the path that `auto` takes on a device: of those installed, the fastest one there."""
    kind = torch.device(device).type
    if kind == "cuda" and (triton := _triton()) is not None and triton.triton_available():
        return "triton"
    return "native" if kind == "cpu" and tvl1_native.library() is not None else "torch"


def arithmetic(device: torch.device | str) -> str:
    """Return what decides how `auto` rounds on a device, e.g. `cpu-native` or `cuda-triton-blocked`.

    For whoever keeps flow and must not mix it. On a CUDA device this loads the kernels.
    """
    device, path = torch.device(device), chosen_path(device)
    # The kernels of a CUDA device differ too: blocked and fused round differently.
    triton = _triton() if path == "triton" else None
    return f"{device.type}-{path}" + (f"-{triton.iteration_kernel(device)}" if triton else "")


def tvl1_flow(
    first: Tensor, second: Tensor, *, params: TVL1Params, path: Path = "auto", budget_bytes: int | None = None
) -> Tensor:
    """Return the flow from `first` to `second`, float32 (B, 2, H, W), in pixels per step.

    Both are grey images (B, H, W), uint8 or floating point in 0..255, on one device, and are not changed.
    Channel 0 is horizontal, positive to the right, channel 1 vertical, positive downwards: the pixel x of
    `first` is found at x + flow(x) in `second`. `budget_bytes` bounds the memory beyond images and result (512
    MiB on the CPU, 4 GiB elsewhere): fewer pairs at a time fit a smaller one, and ValueError says when not even
    one does. Without a budget one pair is computed whatever it takes. ValueError for other images than these and
    for a path that does not run here.
    """
    _check_images(first, second)
    taken = _path(path, first)
    budget = _budget(first, params, budget_bytes, path=taken)
    with torch.no_grad():
        if taken == "native":
            return tvl1_native.flow_of_pairs(first, second, params=params, budget_bytes=budget)
        if taken == "triton" and len(first):
            return _triton_flow("tvl1_flow_triton", first, second, params=params, budget_bytes=budget)
        return tvl1_torch.flow_of_pairs(first, second, params=params, budget_bytes=budget)


def tvl1_clip_flow(
    frames: Tensor, *, params: TVL1Params, step: int = 1, path: Path = "auto", budget_bytes: int | None = None
) -> Tensor:
    """Return the flow from each frame to the one `step` later, float32 (N - step, 2, H, W).

    `frames` are the grey images of one clip (N, H, W), as in `tvl1_flow`, which gives the same bits; here
    the pyramid of each frame is made once. The gradient of a frame is made once in either: a frame is the second
    of one pair.
    """
    if step < 1:
        raise ValueError(f"tvl1_clip_flow needs a step of at least 1 frame, not {step}")
    _check_images(frames, frames)
    taken = _path(path, frames)
    budget = _budget(frames, params, budget_bytes, path=taken)
    with torch.no_grad():
        if taken == "native":
            return tvl1_native.flow_of_clip(frames, step=step, params=params, budget_bytes=budget)
        if taken == "triton" and len(frames) > step:
            return _triton_flow("tvl1_clip_flow_triton", frames, step=step, params=params, budget_bytes=budget)
        return tvl1_torch.flow_of_clip(frames, step=step, params=params, budget_bytes=budget)


def _check_images(first: Tensor, second: Tensor) -> None:
    if first.ndim != 3 or first.shape != second.shape or 0 in first.shape[1:]:
        shapes = f"{tuple(first.shape)} and {tuple(second.shape)}"
        raise ValueError(f"tvl1_flow needs two stacks of grey images of one shape (B, H, W), not {shapes}")
    if first.device != second.device:
        raise ValueError(f"tvl1_flow needs both stacks on one device, not {first.device} and {second.device}")
    for images in (first,) if first is second else (first, second):
        if images.dtype == torch.uint8:
            continue
        if not images.is_floating_point():
            raise ValueError(f"tvl1_flow needs uint8 or floating point images in 0..255, not {images.dtype}")
        if len(images) == 0:
            continue
        low, high = images.aminmax()
        if not (low.item() >= 0 and high.item() <= 255):  # NaN fails both comparisons
            raise ValueError("tvl1_flow needs grey values in 0..255; found NaN or a value outside that range")


def _path(path: Path, images: Tensor) -> ChosenPath:
    """Resolve `auto`, and refuse a path that does not run on the images' device here."""
    kind = images.device.type
    if path == "native":
        if kind != "cpu":
            raise ValueError(f"TV-L1's native path runs on the CPU, not on {kind}; use path='auto'")
        if tvl1_native.library() is None:
            raise ValueError(
                "TV-L1's native path is not built here; install the package where a C compiler is found, "
                "or use path='torch'"
            )
    elif path == "triton":
        if _triton() is None:
            raise ValueError("TV-L1's Triton path needs Triton; install it, or use path='torch'")
        if kind != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(
                f"TV-L1's Triton path runs on CUDA, not on {kind}, except in Triton's interpreter "
                "(TRITON_INTERPRET=1); use path='auto'"
            )
    elif path not in PATHS:
        raise ValueError(f"TV-L1 has the paths {', '.join(PATHS)}, not {path!r}")
    return chosen_path(images.device) if path == "auto" else path


def _budget(images: Tensor, params: TVL1Params, budget_bytes: int | None, *, path: ChosenPath) -> int:
    """Return the bytes to keep within: the default, but as many as one pair needs; or what was asked for."""
    module = {"native": tvl1_native, "torch": tvl1_torch}.get(path) or importlib.import_module(TRITON_MODULE)
    needed: int = module.pair_bytes(*images.shape[1:], params=params)
    if budget_bytes is None:
        return max(needed, BUDGET_BYTES_CPU if images.device.type == "cpu" else BUDGET_BYTES_DEVICE)
    if budget_bytes < needed:
        raise ValueError(
            f"TV-L1 needs {needed:,} bytes for one pair of {images.shape[2]}x{images.shape[1]}, "
            f"more than the budget of {budget_bytes:,}; raise budget_bytes"
        )
    return budget_bytes


def _triton() -> ModuleType | None:
    """Return the module of the Triton kernels, None where Triton is absent; loaded on first use, as it is slow."""
    give_triton_a_home()
    try:
        return importlib.import_module(TRITON_MODULE)
    except ImportError:
        return None


def give_triton_a_home() -> None:
    """Name a folder for what Triton compiles where the user has no home, as in containers and batch jobs.

    Triton would make one named `~` in the current folder.
    """
    if os.path.expanduser("~") != "~" or "TRITON_HOME" in os.environ:  # noqa: PTH111 - Path raises where this tells
        return
    folder = FilePath(tempfile.gettempdir()) / f"mmkd-{os.getuid()}"
    with suppress(OSError):
        folder.mkdir(mode=0o700)
    # Anybody may write into the temporary folder, and what lies in Triton's is run: never somebody else's.
    is_ours = folder.is_dir() and not folder.is_symlink() and folder.stat().st_uid == os.getuid()
    os.environ["TRITON_HOME"] = str(folder) if is_ours else tempfile.mkdtemp(prefix="mmkd-")


def _triton_flow(name: str, *images: Tensor, **options: object) -> Tensor:
    flow: Tensor = getattr(importlib.import_module(TRITON_MODULE), name)(*images, **options)
    return flow
