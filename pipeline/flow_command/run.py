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
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mmkd.cache_tools.frames.records import VideoFacts
from mmkd.cache_tools.frames.source import VideoFiles
from mmkd.cache_tools.process.interrupt import StopRequest, stop_on_signals
from mmkd.cache_tools.process.pool import run_tasks
from mmkd.cache_tools.process.progress import Progress
from mmkd.cache_tools.process.stages import Stages
from mmkd.data_manifests.atomic import write_atomically
from mmkd.data_manifests.counted import counted
from mmkd.data_manifests.errors import InputError, StorageError, VideoError
from mmkd.pipeline.flow.methods import FlowMethod
from mmkd.pipeline.flow_command.blocks import (
    BlockResult,
    FlowBlock,
    FlowOptions,
    ShownPair,
    VideoPlan,
    block_flow,
    blocks_of,
    do_block,
    fault_of,
    is_of_all,
    plan_video,
    shown_pairs,
)
from mmkd.pipeline.flow_command.claims import Holder
from mmkd.pipeline.flow_command.colours import png_of, strip
from mmkd.pipeline.flow_command.files import (
    EncodedFlow,
    FlowWriter,
    encode_values,
    stored_values,
)
from mmkd.pipeline.flow_command.output import FILE_SUFFIXES, DoneVideo, FlowOutput
from mmkd.pipeline.flow_command.videos import NamedVideo, find_videos
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
MOST_FAULTS = 20
"""Videos that may fail by a fault of the machine one after the other: more is a disk that has gone."""
ENCODERS = 4
"""Threads that encode what another device computed."""


@dataclass
class FlowReport:
    """What a run did."""

    videos: int = 0
    """Videos whose flow this run wrote."""
    fields: int = 0
    """Flow fields in them."""
    skipped: int = 0
    """Videos whose flow was there."""
    failed: dict[str, str] = field(default_factory=dict)
    """Video file -> why it has no flow."""
    faults: list[str] = field(default_factory=list)
    """Those of them that failed by a fault of the machine, and may not when it is well."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Stage -> seconds, decode, flow and encode summed over processes; `total` of the clock."""

    def lines(self, out: Path) -> list[str]:
        """Return the report for people."""
        total = self.seconds["total"]
        rate = f"{self.fields / total:.1f} frames/s" if self.fields else "nothing left to do"
        stages = ", ".join(f"{name} {value:.1f} s" for name, value in self.seconds.items() if name != "total")
        return [
            f"{out}: flow of {counted(self.videos, 'video')} written, {self.skipped} there "
            f"already; {counted(self.fields, 'frame')} in "
            f"{total:.1f} s, {rate}; {len(self.failed)} failed",
            *([f"time: {stages} (summed over processes)"] if stages else []),
        ]


def run_flow(arguments: Sequence[str], options: Mapping[str, Any]) -> FlowReport:
    """Run the command with click's values; raise InputError for those that do not go together."""
    one_file = options["out"].suffix.lower() in FILE_SUFFIXES
    names = ("bound_px", "step", "stride", "new_short", "new_width", "new_height", "enlarge")
    method = FlowMethod(options["method"], options["preset"], options["weights"])
    chosen = FlowOptions(
        layout=options["layout"] or ("hdf5" if one_file else "denseflow"),
        method=method,
        **{name: options[name] for name in names},
    )
    naming = {name: options[name] for name in ("lists", "class_folder", "keep_ending")}
    videos = find_videos(arguments, **naming)
    device = method_device(method, options["device"])
    workers = len(os.sched_getaffinity(0)) if options["workers"] is None else options["workers"]
    return compute_flow(videos, options["out"], chosen, device=device, workers=workers, preview=options["preview"])


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
) -> FlowReport:
    """Compute and write the flow of every video whose flow is not in `out` yet.

    Raises InputError for other parameters than `out` was made with, and InterruptedByUserError after a clean stop.
    """
    output = FlowOutput(out, options, rounding_of(options.method, device))
    run = FlowRun(output, options, device, workers=workers, preview=preview)
    began = time.perf_counter()
    with stop_on_signals() as stop:
        try:
            run.compute(run.plan(videos, stop), stop)
            output.close(gather=True)
        finally:
            output.close(gather=False)
    run.report.seconds["total"] = time.perf_counter() - began
    return run.report


@dataclass
class VideoInHand:
    """A video of which some blocks are written."""

    writer: FlowWriter
    """Gathers its result."""
    record: DoneVideo
    """What its mark will say."""
    shown: list[ShownPair] = field(default_factory=list)
    """Pairs for its preview, so far."""


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
        self._workers, self._preview = workers, preview
        self._stage = Stages(self.report.seconds)
        self._videos: dict[str, VideoInHand] = {}
        self._claimed: dict[str, str] = {}
        self._elsewhere: dict[str, tuple[VideoPlan, Holder]] = {}
        self._faults_in_a_row = 0

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
            self._fail(video.path, error)
            return []

    def compute(self, plans: Sequence[VideoPlan], stop: StopRequest) -> None:
        """Compute the flow of the planned videos, and of those that other runs give up."""
        while plans:
            self._compute(plans, stop)
            plans = self._await_others(stop)

    def _await_others(self, stop: StopRequest) -> list[VideoPlan]:
        """Wait for the videos that other runs compute; return those that are free again and not done."""
        waiting, self._elsewhere = self._elsewhere, {}
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
        self._elsewhere = waiting
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
                    self._write(*encoding.popleft(), bar=bar)
            finally:
                results.close()
                for video in self._videos.values():
                    video.writer.abandon()
                self._videos.clear()

    def _jobs(self, plans: Sequence[VideoPlan], sent: deque[FlowBlock], bar: Progress) -> Iterator[FlowBlock]:
        """Yield the blocks of all videos that this run can claim, noting each; of a failed video no more."""
        for plan in plans:
            holder = self._output.take(plan.name)
            if holder is not None:
                self._elsewhere[plan.name] = plan, holder
            elif self._is_there(NamedVideo(plan.name, plan.video)):  # another run did it meanwhile
                self._output.release(plan.name)
                self.report.skipped += 1
            else:
                self._claimed[plan.video] = plan.name
                yield from self._blocks(plan, sent)
                continue
            bar.advance(len(plan.pairs))

    def _blocks(self, plan: VideoPlan, sent: deque[FlowBlock]) -> Iterator[FlowBlock]:
        shown = SHOWN_PAIRS if self._preview is not None else 0
        compute = self._device.type == "cpu"
        for block in blocks_of(plan, source=SOURCE, options=self._options, compute=compute, previewed=shown):
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
            self._fail(block.plan.video, error, block.plan.size)

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
        video = self._in_hand(block.plan)
        video.shown += result.shown
        if result.encoded is not None:
            done: Future[EncodedFlow] = Future()
            done.set_result(result.encoded)
            self._write(block, done, bar=bar)
            return
        if result.frames is None:
            raise ValueError("a block came back with neither flow nor frames")
        with self._stage("flow"):
            flow = block_flow(block, result.frames, self._device)
            video.shown += shown_pairs(block, result.frames, flow)
            values = stored_values(flow, layout=self._options.layout, bound_px=self._options.bound_px)
        encoding.append((block, executor.submit(encode_values, values, layout=self._options.layout)))
        if len(encoding) > ENCODERS:
            self._write(*encoding.popleft(), bar=bar)

    def _write(self, block: FlowBlock, encoded: Future[EncodedFlow], *, bar: Progress) -> None:
        if block.plan.video in self.report.failed:
            return
        video = self._videos[block.plan.name]
        try:
            with self._stage("write"):
                video.writer.add(encoded.result())
                bar.advance(len(block), note=block.plan.name)
                if block.is_last:
                    self._finish(block.plan, video)
        except Exception as error:
            self._fail(block.plan.video, error, block.plan.size)

    def _finish(self, plan: VideoPlan, video: VideoInHand) -> None:
        if not self._output.finish(plan.name, video.writer, video.record):
            self._elsewhere[plan.name] = plan, Holder()  # this run slept, and another took it for dead
            video.writer.abandon()
            del self._videos[plan.name], self._claimed[plan.video]
            return
        del self._videos[plan.name], self._claimed[plan.video]
        self._output.release(plan.name)
        self.report.videos += 1
        self.report.fields += video.record.pairs
        self._faults_in_a_row = 0
        if self._preview is not None:
            self._show(plan, video, self._preview)

    def _show(self, plan: VideoPlan, video: VideoInHand, folder: Path) -> None:
        """Write a video's preview; its flow is done, so a preview that cannot be is only said."""
        try:
            image = strip(video.shown, title=f"{plan.name}: {self._options.method.name}, step {self._options.step}")
            write_atomically(folder / f"{plan.name}.png", png_of(image))
        except Exception as error:
            fault = fault_of(error, plan.size)
            if is_of_all(fault):
                raise
            log.warning("%s: no preview: %s", plan.video, fault)

    def _in_hand(self, plan: VideoPlan) -> VideoInHand:
        if plan.name not in self._videos:
            try:
                stamp = NamedVideo(plan.name, plan.video).stamp
            except OSError as error:
                raise VideoError(f"it has gone since it was probed: {error.strerror}") from error
            record = DoneVideo(len(plan.pairs), stamp, plan.facts.identity)
            self._videos[plan.name] = VideoInHand(self._output.writer(plan, record), record)
        return self._videos[plan.name]

    def _fail(self, video: str, error: Exception, size: tuple[int, int] = (0, 0)) -> None:
        """Note that a video has no flow, and go on; raise what would befall all others, too."""
        fault = fault_of(error, size)
        self.report.failed[video] = str(fault)
        name = self._claimed.pop(video, None)
        if name is not None:
            hand = self._videos.pop(name, None)
            if hand is not None:
                hand.writer.abandon()
            self._output.release(name)
        if isinstance(fault, StorageError):
            self.report.faults.append(video)
            self._faults_in_a_row += 1
            if is_of_all(fault) or self._faults_in_a_row >= MOST_FAULTS:
                raise fault
