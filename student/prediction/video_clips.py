"""Clips of videos that no manifest lists: each video whole, or as windows that slide over it."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmkd.cache_tools.frames.clip_set import ClipVideo
from mmkd.cache_tools.frames.probe import probe_all
from mmkd.cache_tools.frames.records import VideoFacts
from mmkd.cache_tools.frames.source import clip_facts, frame_interval_seconds
from mmkd.cache_tools.process.progress import Progress
from mmkd.data_manifests.counted import counted
from mmkd.data_manifests.errors import InputError, VideoError
from mmkd.data_manifests.manifest import Clip
from mmkd.student.prediction.named_files import NamedFiles

log = logging.getLogger("mmkd")
DIGITS = 6
"""Decimals of a window's times in seconds: what is written is what was cut."""
MOST_WINDOWS = 1_000_000
"""Windows of one video: more are a stride that was meant otherwise."""


@dataclass(frozen=True)
class Windows:
    """Windows of one length over a video, from its start to its end."""

    window_seconds: float
    """Length, more than 0."""
    stride_seconds: float
    """From the start of one to the start of the next, more than 0; smaller overlaps more."""

    def __post_init__(self) -> None:
        """Raise InputError for lengths that are none."""
        for name, value in (("window", self.window_seconds), ("stride", self.stride_seconds)):
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"--{name}-s {value:g}: expected seconds, more than 0")

    def over(self, end_seconds: float, tolerance_seconds: float = 0.0) -> list[tuple[float, float]]:
        """Return start and end of every window over a video that ends at `end_seconds`.

        The last one ends with the video, so that all of it is seen; a shorter video is one window. A rest of at
        most `tolerance_seconds` has no window of its own. Raises InputError for more than `MOST_WINDOWS`.
        """
        last = max(0.0, end_seconds - self.window_seconds)
        before = max(0, math.ceil((last - tolerance_seconds) / self.stride_seconds))
        if before >= MOST_WINDOWS:
            raise InputError(
                f"--stride-s {self.stride_seconds:g} makes {before + 1} windows of one video; set more"
            )
        starts = [number * self.stride_seconds for number in range(before)]
        spans = [(start, start + self.window_seconds) for start in starts] + [(last, end_seconds)]
        return [(round(start, DIGITS), round(end, DIGITS)) for start, end in spans]


@dataclass(frozen=True)
class VideoClip:
    """A video, or a window of one."""

    path: Path
    """Absolute path of the file."""
    start_seconds: float
    """Where it begins, from the file's start."""
    end_seconds: float
    """Where it ends (exclusive)."""
    item: ClipVideo
    """Its frames; `item.clip.video` is its video's number in `NamedFiles`."""


@dataclass(frozen=True)
class Unread:
    """A video, or a window of one, that could not be read."""

    path: Path
    """Absolute path of the file."""
    reason: str
    """Why not."""
    start_seconds: float | None = None
    """Where the window begins; None: the whole video."""
    end_seconds: float | None = None
    """Where it ends."""


def clips_of(
    source: NamedFiles, windows: Windows | None = None, *, workers: int = 0
) -> tuple[list[VideoClip], list[Unread]]:
    """Return the clips of a source's videos, in order, and the videos that cannot be used.

    `workers` processes probe them, or this one. A window in which no frame begins is left out, which a warning
    says. Raises StorageError when the machine cannot tell, InputError as `Windows.over`.
    """
    names = [str(number) for number in range(len(source.paths))]
    with Progress("probing videos", total=len(names), unit="video", enabled=len(names) > 1) as progress:
        found = probe_all(source, names, store=None, workers=workers, progress=progress.advance)
    clips: list[VideoClip] = []
    unread = []
    empty = 0
    for name, path in zip(names, source.paths, strict=True):
        video = found[name]
        if isinstance(video, VideoError):
            unread.append(Unread(path, str(video)))
            continue
        own, without_frame = cut(path, name, video, windows)
        clips += own
        empty += without_frame
    if empty:
        log.warning("%s left out: no frame begins there", counted(empty, "window", ("is", "are")))
    return clips, unread


def cut(path: Path, name: str, video: VideoFacts, windows: Windows | None) -> tuple[list[VideoClip], int]:
    """Return the clips of one video, and how many windows have no frame."""
    interval = frame_interval_seconds(video)
    end = float(video.times_seconds[-1]) + interval
    if windows is None:
        whole = Clip(name, name, "predict", {})
        item = ClipVideo(whole, video, clip_facts(whole, video))
        return [VideoClip(path, 0.0, round(end, DIGITS), item)], 0
    clips = []
    spans = windows.over(end, interval / 2)
    for number, (start_seconds, end_seconds) in enumerate(spans):
        clip = Clip(f"{name}-{number}", name, "predict", {}, start_seconds, end_seconds)
        try:
            facts = clip_facts(clip, video, interval, clip_end=True)
        except VideoError:
            continue
        clips.append(VideoClip(path, start_seconds, end_seconds, ClipVideo(clip, video, facts)))
    return clips, len(spans) - len(clips)


def absolute(paths: Sequence[Path]) -> tuple[Path, ...]:
    """Return paths as `NamedFiles` takes them; links are not followed."""
    return tuple(path.absolute() for path in paths)
