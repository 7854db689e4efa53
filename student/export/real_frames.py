"""What an exported file is tried on: views of named videos, of a manifest's clips, or noise where there are none.

Views are the student's own evaluation views, made by the function that training and evaluation call. Clips are read
one by one, whenever they are asked for, so that any number of them takes the memory of one.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mmkd.cache_tools.frames.clip_set import ClipSet, ClipVideo
from mmkd.cache_tools.frames.records import ClipFacts, UInt8Array, VideoFacts
from mmkd.cache_tools.frames.source import FrameSource, VideoFiles
from mmkd.cache_tools.views.canonical import canonical_view
from mmkd.data_manifests.counted import counted
from mmkd.data_manifests.errors import InputError, VideoError
from mmkd.data_manifests.manifest import Clip, Manifest
from mmkd.student.evaluation.trained import TrainedStudent

log = logging.getLogger("mmkd")
NOISE = "noise, not real frames"
NOISE_CLIPS = 3


@dataclass(frozen=True)
class ClipViews:
    """One clip as the student sees it when it is evaluated."""

    pixels: UInt8Array
    """(V, T, S, S, 3) canonical views in RGB."""
    labels: Mapping[str, int | None] = field(default_factory=dict)
    """Head -> label number, None where it is not known; empty where the clip is of no manifest."""


@dataclass(frozen=True)
class Frames:
    """Clips to try a file on."""

    told: str
    """What they are, in words."""
    clips: int
    """How many."""
    views: int
    """Views of each."""
    read: Callable[[], Iterator[ClipViews]]
    """Reads them, from the first on; InputError, naming it, for one that cannot be read."""
    real: bool = True
    """Whether a camera took them."""


def noise(student: TrainedStudent) -> Frames:
    """Return clips of noise, the same every time."""
    size = student.policy.size_px
    shape = (1, student.policy.frames, size, size, 3)

    def read() -> Iterator[ClipViews]:
        words = np.random.default_rng(0)
        return (ClipViews(words.integers(0, 256, shape, dtype=np.uint8)) for _ in range(NOISE_CLIPS))

    return Frames(NOISE, NOISE_CLIPS, 1, read, real=False)


def of_videos(student: TrainedStudent, paths: Sequence[Path]) -> Frames:
    """Return whole videos, each as one clip; InputError, naming it, for one that cannot be read."""
    found = [probed(path) for path in paths]

    def read() -> Iterator[ClipViews]:
        for path, (source, video) in zip(paths, found, strict=True):
            facts = ClipFacts(video.width, video.height, 0, video.frame_count)
            try:
                yield ClipViews(views_of(student, source, path.name, video, facts))
            except VideoError as error:
                raise InputError(f"--check {path}: {error}") from error

    return Frames(counted(len(paths), "video"), len(paths), student.policy.evaluation_views, read)


def probed(path: Path) -> tuple[VideoFiles, VideoFacts]:
    """Return a video's source and facts; InputError where it cannot be used."""
    source = VideoFiles(path.absolute().parent, links="allow")  # its user named this very file
    try:
        return source, source.probe(path.name)
    except VideoError as error:
        raise InputError(f"--check {path}: {error}") from error


def of_clips(student: TrainedStudent, clip_set: ClipSet, splits: Sequence[str], *, most: int) -> Frames:
    """Return at most `most` clips of a manifest's `splits`, spread evenly over each.

    Those that cannot be read are left out, and a warning says so. Raises InputError for other classes, and where
    none can be read.
    """
    check_classes(student, clip_set.manifest)
    wanted = [clip for split in splits for clip in spread(clip_set.manifest.split(split), most // len(splits))]
    items = [item for item in clip_set.probe(wanted) if isinstance(item, ClipVideo)]
    if len(items) < len(wanted):
        log.warning(
            "%d of %s cannot be read and are left out", len(wanted) - len(items), counted(len(wanted), "clip")
        )

    def read() -> Iterator[ClipViews]:
        for item in items:
            try:
                pixels = views_of(student, clip_set.source, item.clip.video, item.video, item.facts)
            except VideoError as error:
                raise InputError(f"clip {item.clip.clip_id!r}: {error}") from error
            yield ClipViews(pixels, item.clip.labels)

    told = f"{counted(len(items), 'clip')} of {' and '.join(splits)} of {clip_set.manifest.dataset}"
    return Frames(told, len(items), student.policy.evaluation_views, read)


def spread(clips: Sequence[Clip], most: int) -> list[Clip]:
    """Return at most `most` clips, at least one, evenly spaced from the first to the last."""
    rows = np.unique(np.linspace(0, len(clips) - 1, max(1, min(most, len(clips)))).round().astype(int))
    return [clips[row] for row in rows.tolist()]


def check_classes(student: TrainedStudent, manifest: Manifest) -> None:
    """Raise InputError where the classes of a manifest are not the student's."""
    if {head.name: list(head.classes) for head in manifest.heads} != student.heads:
        raise InputError("--manifest has other classes than the run (names or order differ)")


def views_of(
    student: TrainedStudent, source: FrameSource, name: str, video: VideoFacts, facts: ClipFacts
) -> UInt8Array:
    """Return a clip's evaluation views as the student sees them, uint8 (V, T, S, S, 3); VideoError as `read`."""
    times = video.times_seconds[facts.first_frame :][: facts.frame_count]
    views = student.views(facts, times)
    frames = source.read(name, np.unique(np.concatenate([view.frame_indices for view in views])), video)
    return np.stack([canonical_view(frames, view, student.policy.size_px) for view in views])
