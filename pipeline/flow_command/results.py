"""The videos in hand of a run: each one's writer, until its flow is whole and marked, or it has failed."""

import logging
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from mmkd.cache_tools.process.progress import Progress
from mmkd.cache_tools.process.stages import Stages
from mmkd.data_manifests.atomic import write_atomically
from mmkd.data_manifests.errors import StorageError, VideoError
from mmkd.data_manifests.video_files import NamedVideo
from mmkd.pipeline.flow_command.blocks import FlowBlock, ShownPair, VideoPlan
from mmkd.pipeline.flow_command.claims import Holder
from mmkd.pipeline.flow_command.colours import png_of, strip
from mmkd.pipeline.flow_command.encoding import EncodedFlow
from mmkd.pipeline.flow_command.faults import fault_of, is_of_all
from mmkd.pipeline.flow_command.options import FlowOptions
from mmkd.pipeline.flow_command.output import DoneVideo, FlowOutput
from mmkd.pipeline.flow_command.report import FlowReport
from mmkd.pipeline.flow_command.writers import FlowWriter

log = logging.getLogger(__name__)

MOST_FAULTS = 20
"""Videos that may fail by a fault of the machine one after the other: more is a disk that has gone."""


@dataclass
class VideoInHand:
    """A video of which some blocks are written."""

    writer: FlowWriter
    """Gathers its result."""
    record: DoneVideo
    """What its mark will say."""
    shown: list[ShownPair] = field(default_factory=list)
    """Pairs for its preview, so far."""


class FlowResults:
    """The videos that this run has claimed, on their way into the output."""

    def __init__(
        self, output: FlowOutput, options: FlowOptions, report: FlowReport, *, stage: Stages, preview: Path | None
    ) -> None:
        """Start with none; what becomes of them goes to `report`."""
        self.elsewhere: dict[str, tuple[VideoPlan, Holder]] = {}
        """Name -> a video that another run computes, and which run."""
        self._output, self._options, self._report = output, options, report
        self._stage, self._preview = stage, preview
        self._videos: dict[str, VideoInHand] = {}
        self._claimed: dict[str, str] = {}
        self._faults_in_a_row = 0

    def claimed(self, plan: VideoPlan) -> None:
        """Note that this run holds the claim on a video."""
        self._claimed[plan.video] = plan.name

    def abandon(self) -> None:
        """Drop what is not whole yet."""
        for video in self._videos.values():
            video.writer.abandon()
        self._videos.clear()

    def write(self, block: FlowBlock, encoded: Future[EncodedFlow], *, bar: Progress) -> None:
        """Write a block of a video in hand; the last one finishes it."""
        if block.plan.video in self._report.failed:
            return
        video = self._videos[block.plan.name]
        try:
            with self._stage("write"):
                video.writer.add(encoded.result())
                bar.advance(len(block), note=block.plan.name)
                if block.is_last:
                    self._finish(block.plan, video)
        except Exception as error:
            self.fail(block.plan.video, error, block.plan.size)

    def _finish(self, plan: VideoPlan, video: VideoInHand) -> None:
        if not self._output.finish(plan.name, video.writer, video.record):
            self.elsewhere[plan.name] = plan, Holder()  # this run slept, and another took it for dead
            video.writer.abandon()
            del self._videos[plan.name], self._claimed[plan.video]
            return
        del self._videos[plan.name], self._claimed[plan.video]
        self._output.release(plan.name)
        self._report.videos += 1
        self._report.fields += video.record.pairs
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

    def in_hand(self, plan: VideoPlan) -> VideoInHand:
        """Return a video in hand, taken now where this is its first block."""
        if plan.name not in self._videos:
            try:
                stamp = NamedVideo(plan.name, plan.video).stamp
            except OSError as error:
                raise VideoError(f"it has gone since it was probed: {error.strerror}") from error
            record = DoneVideo(len(plan.pairs), stamp, plan.facts.identity)
            self._videos[plan.name] = VideoInHand(self._output.writer(plan, record), record)
        return self._videos[plan.name]

    def fail(self, video: str, error: Exception, size: tuple[int, int] = (0, 0)) -> None:
        """Note that a video has no flow, and go on; raise what would befall all others, too."""
        fault = fault_of(error, size)
        self._report.failed[video] = str(fault)
        name = self._claimed.pop(video, None)
        if name is not None:
            hand = self._videos.pop(name, None)
            if hand is not None:
                hand.writer.abandon()
            self._output.release(name)
        if isinstance(fault, StorageError):
            self._report.faults.append(video)
            self._faults_in_a_row += 1
            if is_of_all(fault) or self._faults_in_a_row >= MOST_FAULTS:
                raise fault
