"""`mmkd-cache pack`: a manifest's videos as pictures in one HDF5 file, in parallel, and continued where it stopped.

    OUT.parts   one finished video each (see mmkd.pipeline.pack.parts)
    OUT         all of them, written in one step at the end; then the parts go

It takes the room of its result twice while it is put together. A video that cannot be read is left out and named.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py

from mmkd.cache_tools.frames.clip_set import ClipSet
from mmkd.cache_tools.frames.records import VideoFacts
from mmkd.cache_tools.frames.still_hdf5 import FRAMES_SCHEMA
from mmkd.cache_tools.process.interrupt import StopRequest, stop_on_signals
from mmkd.cache_tools.process.pool import run_tasks
from mmkd.cache_tools.process.progress import Progress
from mmkd.cache_tools.storage.hdf5_file import writing_hdf5
from mmkd.data_manifests.atomic import atomic_path
from mmkd.data_manifests.counted import counted
from mmkd.data_manifests.errors import InputError, StorageError, VideoError
from mmkd.pipeline.pack.pack_video import GROUP, PackJob, PackParams, pack_video
from mmkd.pipeline.pack.parts import part_name, parts_folder

log = logging.getLogger("mmkd")
KEPT = "what is packed so far is kept"


@dataclass
class PackReport:
    """What a run did."""

    videos: int = 0
    """Videos in the file."""
    packed: int = 0
    """Of them those that this run packed."""
    size_bytes: int = 0
    """Size of the file."""
    unusable: dict[str, str] = field(default_factory=dict)
    """Video -> why it is not in the file."""

    def lines(self, out: Path) -> list[str]:
        """Return the report for people."""
        left_out = f"; {counted(len(self.unusable), 'video')} left out" if self.unusable else ""
        return [
            f"{out}: {counted(self.videos, 'video')}, {self.packed} of them packed now; "
            f"{self.size_bytes / 2**20:.1f} MiB{left_out}",
            *(f"left out: {video}: {reason}" for video, reason in self.unusable.items()),
        ]


def pack_videos(clip_set: ClipSet, out: Path, params: PackParams) -> PackReport:
    """Pack all videos of a manifest into `out`, or finish what was begun there.

    Raises InputError for a file that is there, for parts of other parameters and for a second run at work;
    StorageError when the machine cannot; InterruptedByUserError after a clean stop.
    """
    report = PackReport()
    with parts_folder(out, params.identity()) as (parts, lock):
        found = clip_set.probe_videos(dict.fromkeys(clip.video for clip in clip_set.manifest.clips))
        whole = pack_parts(clip_set, parts, found, params, report)
        if not whole:
            raise InputError(f"no video can be read; the first: {next(iter(report.unusable.items()))}")
        lock.check()
        report.size_bytes = put_together(out, whole, params)
        report.videos = len(whole)
    return report


def pack_parts(
    clip_set: ClipSet,
    parts: Path,
    found: Mapping[str, VideoFacts | VideoError],
    params: PackParams,
    report: PackReport,
) -> dict[str, Path]:
    """Write the part of every video that has none yet; return video -> part of those that are whole."""
    jobs: list[PackJob] = []
    whole: dict[str, Path] = {}
    for video, facts in found.items():
        if isinstance(facts, VideoError):
            report.unusable[video] = str(facts)
            continue
        part = parts / part_name(video, facts)
        whole[video] = part
        if not part.exists():
            jobs.append(PackJob(clip_set.source, video, facts, part, params))
    limit_seconds = clip_set.recipe.max_duration_seconds
    results = run_tasks(pack_video, jobs, workers=clip_set.recipe.workers, timeout_seconds=limit_seconds)
    total, done = len(whole), len(whole) - len(jobs)
    with stop_on_signals() as stop, Progress("packing", total=total, done=done, unit="video") as progress:
        for job, result in _checked(jobs, results, stop):
            if isinstance(result, VideoError):
                report.unusable[job.video] = str(result)
                del whole[job.video]
            else:
                report.packed += 1
            progress.advance()
    return whole


def _checked(jobs: list[PackJob], results: Any, stop: StopRequest) -> Iterator[tuple[PackJob, int | VideoError]]:
    try:
        for position, result in results:
            stop.check(KEPT)
            if isinstance(result, StorageError):
                raise result
            yield jobs[position], result
    finally:
        results.close()


def put_together(out: Path, whole: Mapping[str, Path], params: PackParams) -> int:
    """Write the file of all parts in one step and return its size in bytes."""
    with (
        stop_on_signals() as stop,
        Progress("writing", total=len(whole), unit="video") as progress,
        atomic_path(out) as temporary,
        writing_hdf5(temporary) as output,
    ):
        output.file.attrs["schema"] = FRAMES_SCHEMA
        output.file.attrs["parameters"] = json.dumps(params.identity())
        for video, part in whole.items():
            stop.check(KEPT)
            with _opened(part) as file:
                output.file.copy(file[GROUP], video)
            output.check()
            progress.advance()
    return out.stat().st_size


def _opened(part: Path) -> h5py.File:
    try:
        return h5py.File(part, "r", locking=False)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise StorageError(f"{part} is damaged and deleted ({error}); run again to pack it anew") from error
