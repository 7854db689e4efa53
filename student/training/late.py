"""What a step tells, read one step late: the device never waits for the host, and no bad step stays unnoticed.

A step's loss, gradient norm and the clips that look wrong stay on the device until the next step has been queued.
Before anything is written, whatever is still out is read.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mmkd.cache_tools.frames.records import IntArray


@dataclass(frozen=True)
class StepResult:
    """What is known of a finished step."""

    step: int
    """Its number, from 0."""
    rows: IntArray
    """(B,) rows of its clips, those of this process alone."""
    suspects: Tensor
    """bool (B,), on the device: which of them have logits or targets that are not finite."""
    clips: int
    """Clips of all processes."""
    loss: float
    """The step's loss."""
    norm: float
    """Global norm of its gradient, before clipping."""
    stop: bool
    """Whether any process was asked to stop."""


@dataclass(frozen=True)
class _Pending:
    step: int
    rows: IntArray
    suspects: Tensor
    clips: int
    numbers: Tensor
    """(3,) loss, norm and whether to stop, on the host once `ready` has happened."""
    ready: "torch.cuda.Event | None"


class LateResults:
    """The results of the last steps, in order."""

    def __init__(self) -> None:
        """Nothing is out."""
        self._pending: deque[_Pending] = deque()

    def add(self, step: int, rows: IntArray, suspects: Tensor, *, clips: int, numbers: Tensor) -> None:
        """Note a step that was queued; `numbers` (3,) float64, on the device: loss, norm, whether to stop."""
        ready = None
        if numbers.device.type == "cuda":
            here = torch.empty(3, dtype=torch.float64, pin_memory=True)
            here.copy_(numbers, non_blocking=True)
            numbers, ready = here, torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
            ready.record()
        self._pending.append(_Pending(step, rows, suspects, clips, numbers, ready))

    def settled(self, *, keep: int) -> Iterator[StepResult]:
        """Yield the oldest results until `keep` are out; waits for their steps."""
        while len(self._pending) > keep:
            found = self._pending.popleft()
            if found.ready is not None:
                found.ready.synchronize()
            loss, norm, stop = found.numbers.tolist()
            yield StepResult(found.step, found.rows, found.suspects, found.clips, loss, norm, stop > 0)
