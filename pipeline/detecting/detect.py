"""`mmkd-cache detect`: a detector over a manifest's videos, as one table, continued where it stopped.

    OUT.parts   one finished video each, itself a table (see mmkd.pipeline.pack.parts)
    OUT         all of them, written in one step at the end; then the parts go

Frames are decoded in this process. A video that cannot be read is left out and named.
"""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np
import torch

from mmkd.cache_tools.frames.clip_set import ClipSet
from mmkd.cache_tools.frames.data_frames import DataFrames
from mmkd.cache_tools.frames.records import IntArray, VideoFacts
from mmkd.cache_tools.frames.source import frame_interval_seconds
from mmkd.cache_tools.process.interrupt import StopRequest, stop_on_signals
from mmkd.cache_tools.process.progress import Progress
from mmkd.data_manifests.errors import VideoError
from mmkd.pipeline.detecting.detector import Detector, FrameFindings
from mmkd.pipeline.detecting.detector_params import DetectorParams
from mmkd.pipeline.detections.records import Unusable, VideoDetections, ids_of_videos
from mmkd.pipeline.detections.table import DetectionTable
from mmkd.pipeline.detections.table_writer import TableReport, write_table
from mmkd.pipeline.pack.parts import part_name, parts_folder

KEPT = "the videos that are done are kept"


def detect_videos(clip_set: ClipSet, out: Path, params: DetectorParams, device: torch.device) -> TableReport:
    """Write the table of all videos of a manifest, or finish what was begun there.

    Raises InputError for a file that is there, for parts of other parameters and for a second run at work;
    StorageError when the machine cannot; InterruptedByUserError after a clean stop.
    """
    videos = ids_of_videos(clip.video for clip in clip_set.manifest.clips)
    detector = Detector(params, device)
    with parts_folder(out, params.identity()) as (parts, lock):
        found = _detected(clip_set, list(videos.values()), parts, detector)
        lock.check()
        return write_table(out, found, params.identity(), kept=KEPT)


def _detected(
    clip_set: ClipSet, videos: list[str], parts: Path, detector: Detector
) -> Iterator[VideoDetections | Unusable]:
    """Write the parts that are not there, then return the detections of all, one at a time."""
    facts = clip_set.probe_videos(videos)
    whole: dict[str, Path | str] = {}
    with stop_on_signals() as stop, Progress("detecting", total=len(videos), unit="video") as progress:
        for video in videos:
            stop.check(KEPT)
            known = facts[video]
            name = PurePosixPath(video).stem
            try:
                if isinstance(known, VideoError):
                    raise known
                whole[name] = part = parts / part_name(video, known)
                if not part.exists():
                    found = detect_video(clip_set.source, video, known, detector, stop)
                    write_table(part, [found], {}, stop=stop, kept=KEPT)
            except VideoError as error:
                whole[name] = str(error)
            progress.advance()
    return (
        Unusable(video, part) if isinstance(part, str) else DetectionTable(part).read(video)
        for video, part in whole.items()
    )


def detect_video(
    source: DataFrames, video: str, facts: VideoFacts, detector: Detector, stop: StopRequest
) -> VideoDetections:
    """Return the detections of one video; VideoError where a frame cannot be read exactly."""
    interval_seconds = frame_interval_seconds(facts)
    rate = detector.params.frames_per_second
    indices = frames_at(facts, rate)
    findings: list[FrameFindings] = []
    batch = []
    for frame in source.stream(video, indices, facts):
        batch.append(frame)
        if len(batch) == detector.params.batch:
            findings += detector.find(batch)
            batch.clear()
            stop.check(KEPT)
    if batch:
        findings += detector.find(batch)
    boxes = np.concatenate([found.boxes for found in findings])
    return VideoDetections(
        video=PurePosixPath(video).stem,
        times_seconds=facts.times_seconds[indices],
        offsets=np.cumsum([0, *(len(found.boxes) for found in findings)], dtype=np.int64),
        boxes=boxes,
        categories=np.concatenate([found.categories for found in findings]),
        scores=np.concatenate([found.scores for found in findings]),
        sides=np.zeros(len(boxes), np.uint8),
        states=np.zeros(len(boxes), np.uint8),
        period_seconds=max(interval_seconds, 1 / rate if rate else 0.0),
    )


def frames_at(facts: VideoFacts, frames_per_second: float | None) -> IntArray:
    """Return the frames nearest to each step of a rate from the first frame on (the earlier in a tie), once
    each."""
    times = facts.times_seconds
    if frames_per_second is None:
        return np.arange(len(times))
    steps = times[0] + np.arange(int((times[-1] - times[0]) * frames_per_second + 1e-6) + 1) / frames_per_second
    right = np.searchsorted(times, steps).clip(0, len(times) - 1)
    left = (right - 1).clip(0)
    nearest: IntArray = np.unique(np.where(steps - times[left] <= times[right] - steps, left, right))
    return nearest
