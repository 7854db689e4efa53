"""Compiles Triton kernels of TV-L1 for Hopper, as they are launched: `tvl1_compiled.py FOLDER KERNEL…`."""

import sys
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mmkd.pipeline.tvl1 import triton_kernels as tvl1_kernels
from mmkd.pipeline.tvl1 import triton_level as tvl1_level
from mmkd.pipeline.tvl1.median import WINDOWS_AS_EXCHANGES

NETWORK = WINDOWS_AS_EXCHANGES[5]
BLOCK = {"BLOCK": tvl1_level.PIXELS_PER_PROGRAM}
CONSTANTS = {
    "linearise_kernel": {"CLAMPED": True, **BLOCK},
    "iterate_kernel": {"WITH_ERROR": True, "ROWS": tvl1_level.FUSED_ROWS, "COLUMNS": tvl1_level.FUSED_COLUMNS},
    "decide_kernel": {"EVERY": 2, "SLOTS": 6, "CHUNKS": 1},
    "median_kernel": {"SIZE": 5, "NETWORK": NETWORK, "EXCHANGES": len(NETWORK) // 2, **BLOCK},
}
FLOATS = ("state", "data", "partials", "first", "second", "across", "down", "filtered")
DOUBLES = ("limits", "previous")
NUMBERS = ("pairs", "height", "width", "pitch", "tiles", "iterations", "period")
FACTORS = ("tau", "scale", "limit", "pixels_per_u")


def kind(name: str) -> str:
    """Return Triton's name of an argument's type."""
    groups = {"*fp32": FLOATS, "*fp64": DOUBLES, "i32": NUMBERS, "fp32": FACTORS}
    return next((kind for kind, names in groups.items() if name in names), "*i32")


def main() -> None:
    """Write FOLDER/KERNEL.cubin for each."""
    for name in sys.argv[2:]:
        kernel, constants = getattr(tvl1_kernels, name), CONSTANTS[name]
        arguments = list(kernel.arg_names)
        signature = {each: "constexpr" if each in constants else kind(each) for each in arguments}
        values = {(arguments.index(each),): value for each, value in constants.items()}
        source = ASTSource(fn=kernel, signature=signature, constexprs=values)
        options = {**tvl1_level.OPTIONS, "num_warps": 16 if name == "decide_kernel" else 4}
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        (Path(sys.argv[1]) / f"{name}.cubin").write_bytes(compiled.asm["cubin"])


if __name__ == "__main__":
    main()
