"""`mmkd-cache flow`: videos in, flow files out; from top to bottom of this file.

    find     the videos that were named, and what each result is called
    probe    facts of those whose flow is not there yet, in parallel
    compute  blocks of pairs in decoding processes: on a CPU they also compute and encode, else this process does
    write    one writer for each video, then its mark

Stopped at any instant it loses the video in hand; the next run continues with it.
"""

import dataclasses
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mmkd.cache_tools.facts import probe_all
from mmkd.cache_tools.frames import VideoFiles
from mmkd.cache_tools.interrupt import StopRequest, stop_on_signals
from mmkd.cache_tools.pool import run_tasks
from mmkd.cache_tools.progress import Progress
from mmkd.data_manifests.atomic import write_atomically
from mmkd.data_manifests.counted import counted
from mmkd.data_manifests.errors import InputError, StorageError, VideoError
from mmkd.pipeline.flow_blocks import (
    BlockResult,
    FlowBlock,
    FlowOptions,
    ShownPair,
    VideoPlan,
    block_flow,
    blocks_of,
    do_block,
    plan_video,
    shown_pairs,
)
from mmkd.pipeline.flow_colours import png_of, strip
from mmkd.pipeline.flow_files import EncodedFlow, FlowWriter, encode_values, stored_values
from mmkd.pipeline.flow_methods import FlowMethod
from mmkd.pipeline.flow_output import FILE_SUFFIXES, DoneVideo, FlowOutput
from mmkd.pipeline.flow_videos import NamedVideo, find_videos
from mmkd.pipeline.stages import Stages
from mmkd.pipeline.tvl1 import chosen_path
from mmkd.student.devices import choose_device

SOURCE = VideoFiles(Path("/"))
"""Videos are named by whole paths: whoever types the command chose them."""
BLOCK_SECONDS = 1800.0
"""Time limit for one block in a process: 16 pairs of the largest frames by the slowest method."""
SHOWN_PAIRS = 6
"""Pairs in the preview of a video."""
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
    names = ("bound_px", "step", "stride", "new_short", "new_width", "new_height")
    method = FlowMethod(options["method"], options["preset"], options["weights"])
    chosen = FlowOptions(
        layout=options["layout"] or ("hdf5" if one_file else "denseflow"),
        method=method,
        **{name: options[name] for name in names},
    )
    videos = find_videos(arguments, lists=options["lists"], class_folder=options["class_folder"])
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
        from mmkd.pipeline.raft import load_raft  # torchvision takes a second to import

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
        finally:
            output.close(gather=False)
        output.close(gather=True)
    run.report.seconds["total"] = time.perf_counter() - began
    return run.report


@dataclass
class VideoInHand:
    """A video of which some blocks are written."""

    video: str
    """Its file."""
    writer: FlowWriter
    """Gathers its result."""
    record: DoneVideo
    """What its mark will say."""
    shown: list[ShownPair] = field(default_factory=list)
    """Pairs for its preview, so far."""


def same_file(video: NamedVideo, record: DoneVideo | None) -> bool:
    """Return whether a video's flow is there, of the very file as it is now."""
    try:
        return record is not None and record.stamp == video.stamp
    except OSError:  # the probe will say that it is missing
        return False


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

    def plan(self, videos: Sequence[NamedVideo], stop: StopRequest) -> list[VideoPlan]:
        """Probe the videos whose flow is not there, and return what is to be computed."""
        records = {video.name: self._output.done(video.name) for video in videos}
        pending = [video for video in videos if not same_file(video, records[video.name])]
        self.report.skipped = len(videos) - len(pending)
        with Progress("probing videos", total=len(pending), unit="video", enabled=bool(pending)) as progress:

            def advance(count: int) -> None:
                stop.check("nothing was begun")
                progress.advance(count)

            faults: dict[str, StorageError] = {}
            found = probe_all(
                SOURCE,
                [video.path for video in pending],
                store=None,
                workers=self._workers,
                progress=advance,
                faults=faults,
            )
        plans = []
        for video in pending:
            facts = found.get(video.path) or faults[video.path]
            try:
                if isinstance(facts, VideoError | StorageError):
                    raise facts
                record = records[video.name]
                if record is not None and record.identity == facts.identity:  # moved or copied, not changed
                    self._output.mark(video.name, dataclasses.replace(record, stamp=video.stamp))
                    self.report.skipped += 1
                    continue
                plans.append(plan_video(video.name, video.path, facts, options=self._options))
            except (VideoError, StorageError) as error:
                self._fail(video.path, error)
        return plans

    def compute(self, plans: Sequence[VideoPlan], stop: StopRequest) -> None:
        """Compute the flow of the planned videos, blocks flowing through all of them without a pause."""
        total = sum(len(plan.pairs) for plan in plans)
        sent: deque[FlowBlock] = deque()
        results = run_tasks(
            do_block, self._jobs(plans, sent), workers=min(self._workers, total), timeout_seconds=BLOCK_SECONDS
        )
        encoding: deque[tuple[FlowBlock, Future[EncodedFlow]]] = deque()
        try:
            with (
                Progress(
                    f"flow ({self._options.method.name})", total=total, unit="frame", enabled=total > 0
                ) as bar,
                ThreadPoolExecutor(ENCODERS, "mmkd-encoder") as executor,
            ):
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

    def _jobs(self, plans: Sequence[VideoPlan], sent: deque[FlowBlock]) -> Iterator[FlowBlock]:
        """Yield the blocks of all videos, noting each; a video that has failed meanwhile is not gone on with."""
        for plan in plans:
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
        if isinstance(result, StorageError):
            raise result
        if isinstance(result, VideoError):
            self._fail(block.plan.video, result)
            return
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
        with self._stage("write"):
            video.writer.add(encoded.result())
            bar.advance(len(block), note=block.plan.name)
            if block.is_last:
                del self._videos[block.plan.name]
                self._finish(block.plan, video)

    def _finish(self, plan: VideoPlan, video: VideoInHand) -> None:
        video.writer.finish()
        if self._preview is not None:
            image = strip(video.shown, title=f"{plan.name}: {self._options.method.name}, step {self._options.step}")
            write_atomically(self._preview / f"{plan.name}.png", png_of(image))
        self._output.mark(plan.name, video.record)
        self.report.videos += 1
        self.report.fields += video.record.pairs

    def _in_hand(self, plan: VideoPlan) -> VideoInHand:
        if plan.name not in self._videos:
            stamp = NamedVideo(plan.name, plan.video).stamp
            record = DoneVideo(len(plan.pairs), stamp, plan.facts.identity)
            self._videos[plan.name] = VideoInHand(plan.video, self._output.writer(plan, record), record)
        return self._videos[plan.name]

    def _fail(self, video: str, error: VideoError | StorageError) -> None:
        self.report.failed[video] = str(error)
        for name, hand in list(self._videos.items()):
            if hand.video == video:
                del self._videos[name]
                hand.writer.abandon()
