"""Profiling some steps of a training: a Chrome trace of them, and where their time went; by torch.profiler.

What it gives up: a profiled step is slower than others, by more where it consists of many small operations.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile, schedule

from mmkd.data_manifests.atomic import atomic_path
from mmkd.data_manifests.counted import counted
from mmkd.student.looking.step_times import step_times, times_lines
from mmkd.student.training.watch import Watch

log = logging.getLogger("mmkd")
WARM_UP_STEPS = 5
"""Before the first profiled step: kernels are chosen and compiled, and readers run ahead, in these."""


class StepProfile(Watch):
    """Profiles `steps` steps of a run after a warm-up, and writes them to `path`."""

    def __init__(self, path: Path, steps: int, check: Callable[[], None] = lambda: None) -> None:
        """`check` is called before the file is written, and raises where it may not be."""
        self._path, self._steps, self._check = path, steps, check
        self._profile: profile | None = None

    @contextmanager
    def over(self, step: int, total_steps: int) -> Iterator[None]:
        """Profile within the loop; that too few steps are left is said."""
        count = min(self._steps, total_steps - step - WARM_UP_STEPS)
        if count < 1:
            left = counted(total_steps - step, "step")
            log.warning("nothing is profiled: %s are left, and the first %d are a warm-up", left, WARM_UP_STEPS)
            yield
            return
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its own lines on stderr are for its developers
        with profile(
            activities=activities(),
            schedule=schedule(wait=WARM_UP_STEPS - 1, warmup=1, active=count, repeat=1),
            on_trace_ready=self._write,
            experimental_config=_ExperimentalConfig(profile_all_threads=True),  # readers are threads
        ) as self._profile:
            yield
        self._profile = None

    def step_done(self) -> None:
        """Go on to the next step."""
        if self._profile is not None:
            self._profile.step()

    def _write(self, found: profile) -> None:
        self._check()
        with atomic_path(self._path) as temporary:
            found.export_chrome_trace(str(temporary))
            trace: dict[str, Any] = json.loads(temporary.read_bytes())
        try:
            lines = times_lines(step_times(trace))
        except ValueError:  # stopped within the first one
            lines = ["no step was profiled to its end"]
        log.info("%s", "\n".join([*lines, f"{self._path}: the trace, for https://ui.perfetto.dev"]))


def activities() -> list[ProfilerActivity]:
    """Return what there is to be looked at on this machine."""
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
