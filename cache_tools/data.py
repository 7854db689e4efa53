"""Opening a data set: manifest, videos and the facts of every clip, before any long work starts."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import Field

from mmkd.cache_tools.facts import probe_all
from mmkd.cache_tools.frames import Limits, VideoFiles, clip_facts, frame_interval_seconds
from mmkd.cache_tools.progress import Progress
from mmkd.cache_tools.recipes import Recipe
from mmkd.cache_tools.records import ClipFacts, FactsTable, VideoFacts
from mmkd.data_manifests.counted import counted
from mmkd.data_manifests.errors import InputError, VideoError
from mmkd.data_manifests.records import Clip, Manifest, load_manifest


class DataRecipe(Recipe):
    """Where clips are and what is refused; paths are relative to the current directory."""

    manifest: Path = Field(description="manifest made by `mmkd-cache manifest`")
    videos: Path = Field(description="folder that the manifest's video paths are relative to")
    facts: Path | None = Field(None, description="folder for what the probe found; default: MANIFEST.facts")
    workers: int = Field(2, ge=0, le=512, description="decoding processes; 0 decodes in this process")
    max_pixels: int = Field(4096 * 2304, ge=64, description="largest frame accepted, width times height")
    max_duration_seconds: float = Field(4 * 3600, gt=0, description="longest video accepted")
    clip_timeout_seconds: float = Field(120, gt=0, description="longest time that one clip may take")


@dataclass(frozen=True, slots=True)
class ClipVideo:
    """A clip with what the probe found of it."""

    clip: Clip
    """The manifest's row."""
    video: VideoFacts
    """Facts of its video."""
    facts: ClipFacts
    """Its frames within the video."""


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


class ClipSet:
    """A manifest opened over its videos."""

    def __init__(self, recipe: DataRecipe) -> None:
        """Load the manifest; raise InputError, naming it, when it or the video folder is not there."""
        self.recipe = recipe
        self.manifest: Manifest = load_manifest(recipe.manifest)
        if not recipe.videos.is_dir():
            raise InputError(f"the video folder {recipe.videos} does not exist; give it with --videos")
        limits = Limits(
            max_pixels=recipe.max_pixels,
            max_duration_seconds=recipe.max_duration_seconds,
            clip_timeout_seconds=recipe.clip_timeout_seconds,
        )
        self.source = VideoFiles(recipe.videos, limits)

    def probe(self, clips: Sequence[Clip]) -> ClipVideos:
        """Return the facts of each clip, or why it is unusable.

        Raises InputError when none can be read, or when a clip's segment is not inside its (readable) video: then
        the manifest is wrong, not the video.
        """
        store = self.recipe.facts or self.recipe.manifest.with_name(self.recipe.manifest.name + ".facts")
        videos = list(dict.fromkeys(clip.video for clip in clips))
        with Progress("probing videos", total=len(videos), unit="video") as progress:
            found = probe_all(
                self.source, videos, store=store, workers=self.recipe.workers, progress=progress.advance
            )
        result = clip_videos(clips, found)
        errors = [video for video in result.videos if isinstance(video, VideoError)]
        if len(errors) == len(result):
            raise InputError(
                f"none of {counted(len(result), 'clip')} can be read below {self.recipe.videos}; the first one, "
                f"{clips[0].clip_id!r}: {errors[0]}"
            )
        return result


def clip_videos(clips: Sequence[Clip], found: Mapping[str, VideoFacts | VideoError]) -> ClipVideos:
    """Join clips with their videos' facts; raise InputError, naming the first, for segments outside their video."""
    items = ClipVideos(clips, [found[clip.video] for clip in clips], np.zeros((len(clips), 4), np.int32))
    outside: list[str] = []
    intervals: dict[str, float] = {}
    for row, (clip, video) in enumerate(zip(clips, items.videos, strict=True)):
        if isinstance(video, VideoError):
            continue
        interval = intervals.get(clip.video)
        if interval is None and clip.end_seconds is not None:  # milliseconds in an hour's video of many clips
            interval = intervals[clip.video] = frame_interval_seconds(video)
        try:
            facts = clip_facts(clip, video, interval)
            items.facts[row] = facts.width, facts.height, facts.first_frame, facts.frame_count
        except VideoError as error:
            outside.append(f"clip {clip.clip_id!r} of {clip.video}: {error}")
    if outside:
        more = f" ({counted(len(outside) - 1, 'more clip')} likewise)" if len(outside) > 1 else ""
        raise InputError(f"{outside[0]}{more}; mend start_seconds and end_seconds in the manifest")
    return items
