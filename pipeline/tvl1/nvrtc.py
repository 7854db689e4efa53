"""CUDA C++ compiled at run time by NVRTC, which torch's CUDA wheels bring along; loaded through the driver.

Compiling needs no GPU. Both libraries have stable C interfaces, called here by ctypes: torch has a wrapper, but a
private one. What this gives up: one argument per kernel, a structure.
"""

import ctypes
from dataclasses import dataclass

import torch

MAX_DYNAMIC_SHARED_BYTES = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


class NvrtcError(RuntimeError):
    """NVRTC or the CUDA driver is absent, or refused what was asked of it."""


def compile_cubin(source: str, *, architecture: str, options: tuple[str, ...] = ()) -> bytes:
    """Return the machine code of CUDA C++ `source` for an architecture such as sm_90.

    Raises NvrtcError with the compiler's log, or if no NVRTC library is found.
    """
    library = _nvrtc()
    program = ctypes.c_void_p()
    _check_nvrtc(library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None))
    flags = [option.encode() for option in (f"--gpu-architecture={architecture}", *options)]
    status = library.nvrtcCompileProgram(program, len(flags), (ctypes.c_char_p * len(flags))(*flags))
    if status != 0:
        raise NvrtcError(f"NVRTC does not compile the kernel: {_read(library, program, 'ProgramLog').decode()}")
    cubin = _read(library, program, "CUBIN")
    library.nvrtcDestroyProgram(ctypes.byref(program))
    return cubin


def _read(library: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check_nvrtc(getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check_nvrtc(getattr(library, f"nvrtcGet{what}")(program, buffer))
    return buffer.raw


def _nvrtc() -> ctypes.CDLL:
    major = (torch.version.cuda or "13").split(".")[0]
    for name in (f"libnvrtc.so.{major}", "libnvrtc.so", f"nvrtc64_{major}0_0.dll"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise NvrtcError("NVRTC, CUDA's run-time compiler, is absent; torch's CUDA wheels bring it")


def _check_nvrtc(status: int) -> None:
    if status != 0:
        raise NvrtcError(f"NVRTC failed with status {status}")


@dataclass(frozen=True)
class Kernel:
    """A kernel loaded on the device that was current then."""

    function: ctypes.c_void_p
    """Handle of the driver."""
    threads: int
    """Threads of a block."""
    shared_bytes: int
    """Dynamic shared memory of a block."""

    @classmethod
    def load(cls, cubin: bytes, name: str, *, threads: int, shared_bytes: int) -> "Kernel":
        """Load `name` from machine code on the current CUDA device; NvrtcError if the driver refuses."""
        driver = _driver()
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        _check_driver(driver.cuModuleLoadData(ctypes.byref(module), cubin))
        _check_driver(driver.cuModuleGetFunction(ctypes.byref(function), module, name.encode()))
        _check_driver(driver.cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED_BYTES, shared_bytes))
        return cls(function, threads, shared_bytes)

    def launch(self, argument: ctypes.Structure, *, blocks: int) -> None:
        """Start `blocks` blocks with `argument` on torch's current stream; the structure is copied."""
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(argument))
        sizes = blocks, 1, 1, self.threads, 1, 1, self.shared_bytes
        _check_driver(_driver().cuLaunchKernel(self.function, *sizes, stream, arguments, None))


def _driver() -> ctypes.CDLL:
    for name in ("libcuda.so.1", "nvcuda.dll"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise NvrtcError("the CUDA driver is absent")


def _check_driver(status: int) -> None:
    if status != 0:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise NvrtcError(f"the CUDA driver says: {(text.value or b'unknown error').decode()}")
