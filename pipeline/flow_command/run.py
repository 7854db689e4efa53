"""`mmkd-cache flow`: videos in, flow files out; from top to bottom of this file.

    find     the videos that were named, and what each result is called
    probe    facts of those whose flow is not there yet, in parallel
    compute  blocks of pairs in decoding processes: on a CPU they also compute and encode, else this process does
    write    one writer for each video, then its mark
    wait     for the videos that other runs into the same output compute, to compute those that they give up

Stopped at any instant it loses the video in hand; the next run continues with it. Whatever is wrong with one video
is noted, and the others are done.
"""

import dataclasses
import logging
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from mmkd.cache_tools.frames.records import VideoFacts
from mmkd.cache_tools.frames.source import VideoFiles
from mmkd.cache_tools.process.interrupt import StopRequest, stop_on_signals
from mmkd.cache_tools.process.place import from_place
from mmkd.cache_tools.process.pool import run_tasks
from mmkd.cache_tools.process.progress import Progress
from mmkd.cache_tools.process.stages import Stages
from mmkd.data_manifests.counted import counted
from mmkd.data_manifests.errors import InputError, StorageError, VideoError
from mmkd.data_manifests.video_files import NamedVideo, find_videos
from mmkd.pipeline.flow.flow_method import FlowMethod
from mmkd.pipeline.flow_command.blocks import (
    BlockResult,
    FlowBlock,
    VideoPlan,
    block_flow,
    blocks_of,
    do_block,
    plan_video,
    shown_pairs,
)
from mmkd.pipeline.flow_command.encoding import EncodedFlow, encode_values, stored_values
from mmkd.pipeline.flow_command.faults import fault_of
from mmkd.pipeline.flow_command.options import FlowOptions, FlowRequest
from mmkd.pipeline.flow_command.output import FlowOutput
from mmkd.pipeline.flow_command.report import FlowReport
from mmkd.pipeline.flow_command.results import FlowResults
from mmkd.pipeline.tvl1.dispatch import chosen_path
from mmkd.student.training.devices import choose_device

log = logging.getLogger(__name__)

SOURCE = VideoFiles(Path("/"))
"""Videos are named by whole paths: whoever types the command chose them."""
BLOCK_SECONDS = 1800.0
"""Time limit for one block in a process: 16 pairs of the largest frames by the slowest method."""
SHOWN_PAIRS = 6
"""Pairs in the preview of a video."""
PROBE_SECONDS = SOURCE.limits.clip_timeout_seconds
"""Time limit for one probe."""
WAIT_SECONDS = 1.0
"""Between two looks at what other runs have done."""
ENCODERS = 4
"""Threads that encode what another device computed."""


def run_flow(request: FlowRequest) -> FlowReport:
    """Run the command; raise InputError for videos that are not there and a device that does not fit the method."""
    videos = find_videos(request.videos, lists=request.lists, naming=request.naming)
    device = method_device(request.options.method, request.device)
    workers = len(os.sched_getaffinity(0)) if request.workers is None else request.workers
    chosen: dict[str, Any] = {"device": device, "workers": workers, "preview": request.preview}
    return compute_flow(videos, request.out, request.options, task=request.task, **chosen)


def method_device(method: FlowMethod, name: str) -> torch.device:
    """Return the device of that name for a method; InputError for DIS off the CPU and for weights not of RAFT."""
    if method.name == "dis":
        if name not in ("auto", "cpu"):
            raise InputError(f"--device {name}: DIS computes on the CPU")
        name = "cpu"
    device = choose_device(name)
    if method.weights is not None:
        from mmkd.pipeline.flow.raft import load_raft  # torchvision takes a second to import

        load_raft(method.weights, device)
    return device


def rounding_of(method: FlowMethod, device: torch.device) -> str:
    """Return a name for what results of the same parameters still differ by in their last bits."""
    return f"{device.type}, {chosen_path(device)}" if method.name == "tvl1" else device.type


def compute_flow(
    videos: Sequence[NamedVideo],
    out: Path,
    options: FlowOptions,
    *,
    device: torch.device,
    workers: int,
    preview: Path | None = None,
    task: tuple[int, int] = (0, 1),
) -> FlowReport:
    """Compute and write the flow of every video whose flow is not in `out` yet, as run i of n (`task`).

    Raises InputError for other parameters than `out` was made with, and InterruptedByUserError after a clean stop.
    """
    names = [video.name for video in videos]
    output = FlowOutput(out, options, rounding_of(options.method, device), names=names)
    run = FlowRun(output, options, device, workers=workers, preview=preview)
    began = time.perf_counter()
    with stop_on_signals() as stop:
        try:
            plans = run.plan(videos, stop)
            run.compute(plans if output.is_file else from_place(plans, task), stop)
            output.close(gather=True)
        finally:
            output.close(gather=False)
    run.report.seconds["total"] = time.perf_counter() - began
    return run.report


def probe(video: str) -> VideoFacts:
    """Return a video's facts; VideoError for whatever is wrong with it, StorageError for a fault of the machine."""
    try:
        return SOURCE.probe(video)
    except Exception as error:
        raise fault_of(error, (0, 0)) from error


class FlowRun:
    """One run over many videos."""

    def __init__(
        self, output: FlowOutput, options: FlowOptions, device: torch.device, *, workers: int, preview: Path | None
    ) -> None:
        """Prepare a run; nothing is read yet."""
        self.report = FlowReport()
        self._output, self._options, self._device = output, options, device
        self._workers, self._shown = workers, 0 if preview is None else SHOWN_PAIRS
        self._stage = Stages(self.report.seconds)
        self._results = FlowResults(output, options, self.report, stage=self._stage, preview=preview)

    def plan(self, videos: Sequence[NamedVideo], stop: StopRequest) -> list[VideoPlan]:
        """Probe the videos whose flow is not there, and return what is to be computed."""
        pending = [video for video in videos if not self._is_there(video)]
        if pending and self._output.is_file:
            self._output.take_whole()
            pending = [video for video in videos if not self._is_there(video)]
        self.report.skipped = len(videos) - len(pending)
        plans = []
        with Progress("probing videos", total=len(pending), unit="video", enabled=bool(pending)) as progress:
            workers = min(self._workers, len(pending))
            found = run_tasks(probe, [v.path for v in pending], workers=workers, timeout_seconds=PROBE_SECONDS)
            try:
                for position, facts in found:
                    stop.check("nothing was begun")
                    progress.advance(1)
                    plans += self._plan_one(pending[position], facts)
            finally:
                found.close()
        return plans

    def _plan_one(self, video: NamedVideo, facts: VideoFacts | VideoError | StorageError) -> list[VideoPlan]:
        """Return the plan of a video, or none where it fails or was only moved or copied."""
        try:
            if isinstance(facts, VideoError | StorageError):
                raise facts
            record = self._output.done(video.name)
            if record is not None and record.identity == facts.identity:
                if self._output.take(video.name) is None:
                    self._output.mark(video.name, dataclasses.replace(record, stamp=video.stamp))
                    self._output.release(video.name)
                self.report.skipped += 1
                return []
            return [plan_video(video.name, video.path, facts, options=self._options)]
        except Exception as error:
            self._results.fail(video.path, error)
            return []

    def compute(self, plans: Sequence[VideoPlan], stop: StopRequest) -> None:
        """Compute the flow of the planned videos, and of those that other runs give up."""
        while plans:
            self._compute(plans, stop)
            plans = self._await_others(stop)

    def _await_others(self, stop: StopRequest) -> list[VideoPlan]:
        """Wait for the videos that other runs compute; return those that are free again and not done."""
        waiting, self._results.elsewhere = self._results.elsewhere, {}
        free: list[VideoPlan] = []
        if waiting:
            holders = sorted({str(holder) for _, holder in waiting.values()})
            log.info("waiting for %s of other runs: %s", counted(len(waiting), "video"), "; ".join(holders))
        while waiting and not free:
            for name, (plan, _) in list(waiting.items()):
                if self._is_there(NamedVideo(name, plan.video)):
                    self.report.skipped += 1
                    del waiting[name]
                elif self._output.take(name) is None:
                    free.append(plan)
                    del waiting[name]
            stop.check("the flow of the videos before is kept")
            if waiting and not free:
                time.sleep(WAIT_SECONDS)
        self._results.elsewhere = waiting
        return free

    def _is_there(self, video: NamedVideo) -> bool:
        """Return whether a video's flow is there, of the very file as it is now."""
        record = self._output.done(video.name)
        try:
            return record is not None and record.stamp == video.stamp
        except OSError:  # the probe will say that it is missing
            return False

    def _compute(self, plans: Sequence[VideoPlan], stop: StopRequest) -> None:
        """Compute the flow of some videos, blocks flowing through all of them without a pause."""
        total = sum(len(plan.pairs) for plan in plans)
        sent: deque[FlowBlock] = deque()
        encoding: deque[tuple[FlowBlock, Future[EncodedFlow]]] = deque()
        title = f"flow ({self._options.method.name})"
        with (
            Progress(title, total=total, unit="frame") as bar,
            ThreadPoolExecutor(ENCODERS, "mmkd-encoder") as executor,
        ):
            workers = min(self._workers, total)
            jobs = self._jobs(plans, sent, bar)
            results = run_tasks(do_block, jobs, workers=workers, timeout_seconds=BLOCK_SECONDS)
            try:
                while True:
                    with stop.at_once("the flow of the videos before is kept"):  # a block may take a minute
                        result = next(results, None)
                    if result is None:
                        break
                    self._take(sent.popleft(), result[1], encoding, executor=executor, bar=bar)
                while encoding:
                    self._results.write(*encoding.popleft(), bar=bar)
            finally:
                results.close()
                self._results.abandon()

    def _jobs(self, plans: Sequence[VideoPlan], sent: deque[FlowBlock], bar: Progress) -> Iterator[FlowBlock]:
        """Yield the blocks of all videos that this run can claim, noting each; of a failed video no more."""
        for plan in plans:
            holder = self._output.take(plan.name)
            if holder is not None:
                self._results.elsewhere[plan.name] = plan, holder
            elif self._is_there(NamedVideo(plan.name, plan.video)):  # another run did it meanwhile
                self._output.release(plan.name)
                self.report.skipped += 1
            else:
                self._results.claimed(plan)
                yield from self._blocks(plan, sent)
                continue
            bar.advance(len(plan.pairs))

    def _blocks(self, plan: VideoPlan, sent: deque[FlowBlock]) -> Iterator[FlowBlock]:
        compute = self._device.type == "cpu"
        for block in blocks_of(plan, source=SOURCE, options=self._options, compute=compute, previewed=self._shown):
            if plan.video in self.report.failed:
                break
            sent.append(block)
            yield block

    def _take(
        self,
        block: FlowBlock,
        result: BlockResult | VideoError | StorageError,
        encoding: deque[tuple[FlowBlock, Future[EncodedFlow]]],
        *,
        executor: ThreadPoolExecutor,
        bar: Progress,
    ) -> None:
        """Take a block from a process; compute its flow here where the process did not."""
        if block.plan.video in self.report.failed:
            return
        try:
            if isinstance(result, VideoError | StorageError):
                raise result
            self._take_result(block, result, encoding, executor=executor, bar=bar)
        except Exception as error:
            self._results.fail(block.plan.video, error, block.plan.size)

    def _take_result(
        self,
        block: FlowBlock,
        result: BlockResult,
        encoding: deque[tuple[FlowBlock, Future[EncodedFlow]]],
        *,
        executor: ThreadPoolExecutor,
        bar: Progress,
    ) -> None:
        for name, seconds in result.seconds.items():
            self._stage.add(name, seconds)
        video = self._results.in_hand(block.plan)
        video.shown += result.shown
        if result.encoded is not None:
            done: Future[EncodedFlow] = Future()
            done.set_result(result.encoded)
            self._results.write(block, done, bar=bar)
            return
        if result.frames is None:
            raise ValueError("a block came back with neither flow nor frames")
        with self._stage("flow"):
            flow = block_flow(block, result.frames, self._device)
            video.shown += shown_pairs(block, result.frames, flow)
            values = stored_values(flow, layout=self._options.layout, bound_px=self._options.bound_px)
        encoding.append((block, executor.submit(encode_values, values, layout=self._options.layout)))
        if len(encoding) > ENCODERS:
            self._results.write(*encoding.popleft(), bar=bar)
