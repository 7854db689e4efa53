"""All benchmarks once, small, to see that they run; what this machine lacks is skipped with a reason.

    python tests/benchmarks/quick.py        # or `make bench`

The figures of so small runs say little: those of RESULTS.md come from each script with its own options.
"""

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
DEMO = FOLDER.parents[1] / "demo"


def nothing_lacks() -> str | None:
    """Return None: this machine has all that is needed."""
    return None


def lacks_demo() -> str | None:
    """Return why trained experts are not there, or None."""
    return (
        None if (DEMO / "seed-0" / "experts").is_dir() else f"it needs the trained experts of `make demo` in {DEMO}"
    )


def lacks_gpu() -> str | None:
    """Return why nothing can run on a GPU, or None."""
    import torch

    return None if torch.cuda.is_available() else "it needs a CUDA GPU (--dry-run tries the script itself)"


@dataclass(frozen=True)
class Benchmark:
    """One script."""

    script: str
    """Its file."""
    options: tuple[str, ...]
    """Those that make it short."""
    lacks: Callable[[], str | None] = nothing_lacks
    """What is missing here, None when it can run."""


BENCHMARKS = (
    Benchmark("targets.py", ("--rows", "2000", "--views", "2")),
    Benchmark("scale.py", ("--rows", "10000")),
    Benchmark("build.py", ("--clips", "14", "--views", "2", "--shard-rows", "7")),
    Benchmark("live_teacher.py", ("--clips", "14", "--batches", "1", "--batch", "14")),
    Benchmark("steps.py", ("--clips", "14", "--batch", "14", "--steps", "3", "--live-steps", "1")),
    Benchmark("reading.py", ("--batches", "2", "--rounds", "1", "--batch", "4")),
    Benchmark("endurance.py", ("--clips", "14", "--steps", "8", "--every", "2", "--batch", "7")),
    Benchmark("cost.py", ()),
    Benchmark("flow.py", ("--frames", "2", "--repetitions", "1")),
    Benchmark("drift.py", (str(DEMO), "--views", "8", "--flips", "2", "--swin-views", "2"), lacks_demo),
    Benchmark(
        "students.py", (str(DEMO), "--seeds", "0", "--epochs", "5", "--views", "1", "2", "--looks", "2"), lacks_demo
    ),
    Benchmark("flow_gpu.py", ("--minutes", "2"), lacks_gpu),
)


def main() -> int:
    """Run each; return 1 when one failed."""
    failed = []
    for benchmark in BENCHMARKS:
        if reason := benchmark.lacks():
            print(f"\n== {benchmark.script} skipped: {reason}", flush=True)
            continue
        print(f"\n== {benchmark.script} {' '.join(benchmark.options)}", flush=True)
        began = time.perf_counter()
        done = subprocess.run([sys.executable, FOLDER / benchmark.script, *benchmark.options], check=False)
        print(
            f"== {benchmark.script}: {time.perf_counter() - began:.0f} s, exit code {done.returncode}", flush=True
        )
        failed += [benchmark.script] * (done.returncode != 0)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
