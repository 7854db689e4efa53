"""Where the time of training steps went, from a Chrome trace of theirs (trace event format, complete events).

Every moment of a profiled step belongs to the part that the training process is in, or to the rest. What the device
computes belongs to the part that queued it, whenever it ran, and by whichever thread: a kernel and the call that
launched it share a correlation number.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmkd.data_manifests.counted import counted
from mmkd.student.data.reading import READING
from mmkd.student.training.watch import BACKWARD, FORWARD, KEEPING, OPTIMISER, PARTS, SETTLING, TARGETS, WAITING

REST = "the rest"
STEP = "ProfilerStep#"
"""Begins the names of the steps in torch's traces."""
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES = ("cuda_runtime", "cuda_driver")
MICROSECONDS = 1e-6


@dataclass(frozen=True)
class PartTime:
    """The time of one part, over all profiled steps."""

    name: str
    """Which."""
    seconds: float
    """That the training process spent in it."""
    device_seconds: float
    """That the device worked on what was queued in it; kernels that run side by side count each."""


@dataclass(frozen=True)
class StepTimes:
    """Where the time of profiled steps went."""

    steps: int
    """Their number."""
    seconds: float
    """From the start of the first to the end of the last."""
    parts: Sequence[PartTime]
    """Which add up to these seconds; the rest is last."""
    reading_seconds: float
    """That threads spent reading clips meanwhile, all of them together; 0 where processes read."""
    reading_threads: int
    """How many read."""

    @property
    def on_device(self) -> bool:
        """Whether a device other than the processor worked."""
        return any(part.device_seconds for part in self.parts)


def step_times(trace: Mapping[str, Any]) -> StepTimes:
    """Return where the time went; ValueError for a trace without a whole step."""
    complete = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    named = [event for event in complete if event.get("cat") == "user_annotation"]
    steps = [event for event in named if event["name"].startswith(STEP)]
    if not steps:
        raise ValueError("the trace has no step")
    start, end = min(event["ts"] for event in steps), max(event["ts"] + event["dur"] for event in steps)
    within = [event for event in named if start <= event["ts"] < end]
    own = sorted(
        (event for event in within if event["tid"] == steps[0]["tid"] and event["name"].startswith(PARTS)),
        key=lambda event: event["ts"],
    )
    names = (WAITING, TARGETS, FORWARD, BACKWARD, OPTIMISER, SETTLING, KEEPING)
    host = dict.fromkeys(names, 0.0)
    for event in own:
        host[event["name"].removeprefix(PARTS)] += event["dur"] * MICROSECONDS
    seconds = (end - start) * MICROSECONDS
    device = _device_seconds(complete, own, (start, end))
    parts = [PartTime(name, host[name], device.get(name, 0.0)) for name in names]
    parts.append(PartTime(REST, seconds - sum(host.values()), device.get(REST, 0.0)))
    reading = [event for event in within if event["name"] == READING]
    return StepTimes(
        len(steps),
        seconds,
        parts,
        sum(event["dur"] for event in reading) * MICROSECONDS,
        len({event["tid"] for event in reading}),
    )


def _device_seconds(
    events: Sequence[Mapping[str, Any]], parts: Sequence[Mapping[str, Any]], window: tuple[float, float]
) -> dict[str, float]:
    """Return part -> seconds of the device's work that was launched in it, of work launched in the window."""
    launched = {
        event["args"]["correlation"]: event["ts"]
        for event in events
        if event.get("cat") in LAUNCHES and "correlation" in event.get("args", {})
    }
    starts = [event["ts"] for event in parts]
    found: dict[str, float] = {}
    for event in events:
        if event.get("cat") not in ON_DEVICE:
            continue
        at = launched.get(event.get("args", {}).get("correlation"))
        if at is None or not window[0] <= at < window[1]:
            continue
        place = bisect_right(starts, at) - 1
        inside = place >= 0 and at < parts[place]["ts"] + parts[place]["dur"]
        name = parts[place]["name"].removeprefix(PARTS) if inside else REST
        found[name] = found.get(name, 0.0) + event["dur"] * MICROSECONDS
    return found


def times_lines(times: StepTimes) -> list[str]:
    """Return a line for each part, for people: milliseconds a step, and the share of the whole."""
    lines = [f"{counted(times.steps, 'step')}, {milliseconds(times.seconds, times)} each while profiled:"]
    for part in times.parts:
        text = f"  {part.name:<26}{milliseconds(part.seconds, times):>12}{part.seconds / times.seconds:>7.1%}"
        lines.append(text + (f"  device {milliseconds(part.device_seconds, times)}" if times.on_device else ""))
    if times.reading_threads:
        by = counted(times.reading_threads, "thread")
        reading = milliseconds(times.reading_seconds, times)
        lines.append(f"  beside them, {by} read clips for {reading} a step, all together")
    else:
        lines.append("  no thread of this process read clips meanwhile; loader processes are not in a trace")
    return lines


def milliseconds(seconds: float, times: StepTimes) -> str:
    """Return seconds of all steps as milliseconds of one."""
    return f"{1e3 * seconds / times.steps:.2f} ms"
