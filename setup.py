"""The C library of TV-L1's CPU path; everything else is in pyproject.toml.

`optional`: without a C compiler the package installs all the same, and TV-L1 takes its torch path. The library has
no Python in it, so Python's headers are not needed; it is called through ctypes.
"""

from setuptools import Extension, setup

native = Extension(
    "mmkd.pipeline.tvl1._native",
    sources=["pipeline/tvl1/native.c"],
    # Bits must not depend on what a compiler fuses or reorders. Errno, traps and integers that wrap, which Python's
    # own flags ask for, would forbid vectors.
    extra_compile_args=[
        "-std=gnu11",
        "-O3",
        "-g0",
        "-ffp-contract=off",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-fno-wrapv",
        "-fvisibility=hidden",
    ],
    libraries=["m"],
    optional=True,
)
setup(ext_modules=[native])
