"""Opening a data set: manifest, videos and the facts of every clip, before any long work starts."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import Field

from mmkd.cache_tools.frames.data_frames import decoder_rules, open_data_frames
from mmkd.cache_tools.frames.probe import probe_all
from mmkd.cache_tools.frames.records import ClipFacts, FactsTable, Float64Array, VideoFacts
from mmkd.cache_tools.frames.source import DEFAULT_LIMITS, Limits, clip_facts, frame_interval_seconds
from mmkd.cache_tools.frames.video_paths import Links
from mmkd.cache_tools.process.progress import Progress
from mmkd.cache_tools.recipes.recipe import Recipe
from mmkd.data_manifests.counted import counted
from mmkd.data_manifests.errors import InputError, VideoError
from mmkd.data_manifests.manifest import Clip, Manifest
from mmkd.data_manifests.manifest_file import load_manifest


class DataRecipe(Recipe):
    """Where clips are and what is refused; paths are relative to the current directory."""

    manifest: Path = Field(description="manifest made by `mmkd-cache manifest`")
    videos: Path = Field(
        description="folder that the manifest's video paths are relative to, or an HDF5 file of pictures"
    )
    facts: Path | None = Field(None, description="folder for what the probe found; default: MANIFEST.facts")
    workers: int = Field(2, ge=0, le=512, description="decoding processes; 0 decodes in this process")
    max_pixels: int = Field(
        DEFAULT_LIMITS.max_pixels, ge=64, description="largest frame accepted, width times height"
    )
    max_duration_seconds: float = Field(
        DEFAULT_LIMITS.max_duration_seconds, gt=0, description="longest video accepted"
    )
    clip_timeout_seconds: float = Field(
        DEFAULT_LIMITS.clip_timeout_seconds, gt=0, description="longest time that one clip may take"
    )
    clip_segments: bool = Field(
        False, description="a segment that ends after its video ends with it; else unusable"
    )
    links: Links = Field(
        "own",
        description="links that lead out of the video folder: own follows those made by you, by root or by the "
        "file's owner; allow all; refuse none",
    )

    def limits(self) -> Limits:
        """Return what a video may cost at most."""
        return Limits(
            max_pixels=self.max_pixels,
            max_duration_seconds=self.max_duration_seconds,
            clip_timeout_seconds=self.clip_timeout_seconds,
        )


@dataclass(frozen=True, slots=True)
class ClipVideo:
    """A clip with what the probe found of it."""

    clip: Clip
    """The manifest's row."""
    video: VideoFacts
    """Facts of its video."""
    facts: ClipFacts
    """Its frames within the video."""

    @property
    def times_seconds(self) -> Float64Array:
        """(frame_count,) times of the clip's frames in the video."""
        return self.video.times_seconds[self.facts.first_frame :][: self.facts.frame_count]


class ClipVideos:
    """Clips with what the probe found of each, by row; a table, since clips may be millions."""

    def __init__(self, clips: Sequence[Clip], videos: Sequence[VideoFacts | VideoError], facts: FactsTable) -> None:
        """Join rows of `clips` with their videos, and their own facts (zeros where a video is unreadable)."""
        self.clips, self.videos, self.facts = clips, videos, facts

    def __len__(self) -> int:
        """Return the number of clips."""
        return len(self.clips)

    def __iter__(self) -> Iterator[ClipVideo | VideoError]:
        """Yield every row."""
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, row: int) -> ClipVideo | VideoError:
        """Return a clip with its facts, or why its video cannot be used."""
        video = self.videos[row]
        if isinstance(video, VideoError):
            return video
        return ClipVideo(self.clips[row], video, ClipFacts(*self.facts[row].tolist()))

    def times(self) -> list[Float64Array | None]:
        """Return (rows,) the times of each clip's frames; None for a clip whose video cannot be used."""
        return [item.times_seconds if isinstance(item, ClipVideo) else None for item in self]


class ClipSet:
    """A manifest opened over its videos."""

    def __init__(self, recipe: DataRecipe) -> None:
        """Load the manifest; raise InputError, naming it, when it or the video folder is not there."""
        self.recipe = recipe
        self.manifest: Manifest = load_manifest(recipe.manifest)
        rates = self.manifest.frame_rates
        self.source = open_data_frames(recipe.videos, recipe.limits(), recipe.links, rates)

    @property
    def facts_folder(self) -> Path:
        """Folder for what the probe found: the one asked for, or one beside the manifest."""
        return self.recipe.facts or self.recipe.manifest.with_name(self.recipe.manifest.name + ".facts")

    def probe_videos(self, videos: Iterable[str]) -> dict[str, VideoFacts | VideoError]:
        """Return the facts of each video, or why it is unusable; StorageError when the machine cannot tell."""
        names, workers = list(videos), self.recipe.workers
        with Progress("probing videos", total=len(names), unit="video") as progress:
            return probe_all(
                self.source, names, store=self.facts_folder, workers=workers, progress=progress.advance
            )

    def probe(self, clips: Sequence[Clip]) -> ClipVideos:
        """Return the facts of each clip, or why it is unusable.

        Raises InputError when none can be read, StorageError when the machine cannot tell.
        """
        found = self.probe_videos(dict.fromkeys(clip.video for clip in clips))
        result = clip_videos(clips, found, clip_segments=self.recipe.clip_segments)
        errors = [video for video in result.videos if isinstance(video, VideoError)]
        if len(errors) == len(result):
            raise InputError(
                f"none of {counted(len(result), 'clip')} can be read below {self.recipe.videos}; the first one, "
                f"{clips[0].clip_id!r}: {errors[0]}"
            )
        return result


def clip_videos(
    clips: Sequence[Clip], found: Mapping[str, VideoFacts | VideoError], *, clip_segments: bool = False
) -> ClipVideos:
    """Join clips with their videos' facts; a segment outside its video is a fault of that clip alone."""
    videos: list[VideoFacts | VideoError] = [found[clip.video] for clip in clips]
    items = ClipVideos(clips, videos, np.zeros((len(clips), 4), np.int32))
    intervals: dict[str, float] = {}
    for row, (clip, video) in enumerate(zip(clips, videos, strict=True)):
        if isinstance(video, VideoError):
            continue
        interval = intervals.get(clip.video)
        if interval is None and clip.end_seconds is not None:  # milliseconds in an hour's video of many clips
            interval = intervals[clip.video] = frame_interval_seconds(video)
        try:
            facts = clip_facts(clip, video, interval, clip_end=clip_segments)
            items.facts[row] = facts.width, facts.height, facts.first_frame, facts.frame_count
        except VideoError as error:
            videos[row] = error
    return items


def decoder_of(splits: Iterable[ClipVideos]) -> str:
    """Return the name of the rules by which the clips' frames are decoded, for fingerprints."""
    videos = (video for items in splits for video in items.videos)
    return decoder_rules(video for video in videos if not isinstance(video, VideoError))


NUMBERS = re.compile(r"\d[\d.]*")
CLIP = re.compile(r"^clip '[^']*': ")


def kind_of(reason: str) -> str:
    """Return what reasons of one kind share: "clip '7': frames of 9 x 9 pixels; ..." is "frames of N x N
    pixels"."""
    return NUMBERS.sub("N", re.split("[:;]", CLIP.sub("", reason))[0])


def unusable_line(splits: Iterable[ClipVideos]) -> str | None:
    """Return one line that counts the clips of all splits that cannot be used, by reason; None when all can."""
    reasons: Counter[str] = Counter()
    videos: dict[str, set[str]] = {}
    every, clips = set[str](), 0
    for items in splits:
        clips += len(items)
        for clip, video in zip(items.clips, items.videos, strict=True):
            every.add(clip.video)
            if isinstance(video, VideoError):
                kind = kind_of(str(video))
                reasons[kind] += 1
                videos.setdefault(kind, set()).add(clip.video)
    if not reasons:
        return None
    kinds = "; ".join(
        f"{kind}: {counted(count, 'clip')} of {counted(len(videos[kind]), 'video')}"
        for kind, count in reasons.most_common()
    )
    lost = len(set().union(*videos.values()))
    return (
        f"{reasons.total()} of {counted(clips, 'clip')}, in {lost} of {counted(len(every), 'video')}, "
        f"cannot be used ({kinds})"
    )
