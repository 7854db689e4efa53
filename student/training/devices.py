"""Arrays to a device, and computation there that repeats bit for bit."""

import ctypes
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmkd.data_manifests.errors import InputError
from mmkd.student.data.batches import AnyArray
from mmkd.student.recipes.loop import Precision, PrecisionMode

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Names and numbers from glibc's malloc.h."""


def choose_device(name: str) -> torch.device:
    """Return the device of that name; `auto` is CUDA if there is one. InputError when it cannot be used."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise InputError(f"--device {name!r} is not auto, cpu, cuda or cuda:N")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def to_device(arrays: Mapping[str, AnyArray | Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return arrays as tensors on a device; what lies in page-locked memory is copied while the host works on."""
    return {name: torch.as_tensor(value).to(device, non_blocking=True) for name, value in arrays.items()}


@contextmanager
def reproducible(device: torch.device, mode: PrecisionMode = "deterministic") -> Iterator[None]:
    """Compute with kernels that repeat bit for bit and without TF32, and leave torch's random state as it was.

    With the mode `fast`: TF32, and whichever convolutions are fastest on the first batch. Of gradients
    `repeating_gradients` takes care.
    """
    fast = mode == "fast"
    devices = [device] if device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=devices),
        torch.backends.cudnn.flags(enabled=True, benchmark=fast, deterministic=not fast, allow_tf32=fast),
        _matrix_products(fast),
    ):
        yield


@contextmanager
def repeating_gradients(device: torch.device, mode: PrecisionMode) -> Iterator[None]:
    """Train on CUDA with gradients that repeat bit for bit, wherever torch can; on a CPU, or if `fast`, do nothing.

    Attention is computed by matrix products, as its other kernels add gradients up in any order. Torch warns of the
    operations that have no kernel which repeats: the gradients of 3D pooling, in s3d and mvit.
    """
    if device.type != "cuda" or mode == "fast":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs to promise it, before its start
    enabled = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    fills = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = False  # it would cost time, and what is not written is not read here
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=only_warns)
        settings.fill_uninitialized_memory = fills


@contextmanager
def sound_kernels(device: torch.device, precision: Precision) -> Iterator[None]:
    """Train without oneDNN on a CPU in reduced precision.

    Its gradients of 3D convolutions in bf16 read memory that nobody wrote: torch 2.14.1 gave infinities, and other
    bits each time, on a processor with avx512_bf16. Slow, which nobody minds who tries bf16 on a CPU.
    """
    if device.type != "cpu" or precision not in ("bf16", "fp16"):
        yield
        return
    kernels: Any = torch.backends.mkldnn
    before = kernels.enabled
    kernels.enabled = False
    try:
        yield
    finally:
        kernels.enabled = before


@contextmanager
def _matrix_products(tf32: bool) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Return the context in which a network computes in a precision; `auto` is bf16 on CUDA and fp32 elsewhere."""
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    kind = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, kind, enabled=precision != "fp32")


def keep_freed_memory() -> None:
    """Tell glibc to reuse large freed blocks instead of returning them to the system; elsewhere do nothing.

    A training step on a CPU frees and allocates the same tensors again: without this, zeroing their pages
    again took 10 to 20 % of a small network's step. The process then keeps the memory of its largest step.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 32 * 2**20)  # the largest that glibc accepts
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
