"""Opening a data set: manifest, videos and the facts of every clip, before any long work starts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from mmkd.cache_tools.facts import probe_all
from mmkd.cache_tools.frames import Limits, VideoFiles, clip_facts, frame_interval_seconds
from mmkd.cache_tools.progress import Progress
from mmkd.cache_tools.recipes import Recipe
from mmkd.cache_tools.records import ClipFacts, VideoFacts
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

    def probe(self, clips: Sequence[Clip]) -> list[ClipVideo | VideoError]:
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
        errors = [item for item in result if isinstance(item, VideoError)]
        if len(errors) == len(result):
            raise InputError(
                f"none of {len(result)} clips can be read below {self.recipe.videos}; the first one, "
                f"{clips[0].clip_id!r}: {errors[0]}"
            )
        return result


def clip_videos(
    clips: Sequence[Clip], found: Mapping[str, VideoFacts | VideoError]
) -> list[ClipVideo | VideoError]:
    """Join clips with their videos' facts; raise InputError, naming the first, for segments outside their video.

    Equal facts are one object: clips may be millions.
    """
    items: list[ClipVideo | VideoError] = []
    outside: list[str] = []
    intervals: dict[str, float] = {}
    shared: dict[ClipFacts, ClipFacts] = {}
    for clip in clips:
        video = found[clip.video]
        if isinstance(video, VideoError):
            items.append(video)
            continue
        interval = intervals.get(clip.video)
        if interval is None and clip.end_seconds is not None:  # milliseconds in an hour's video of many clips
            interval = intervals[clip.video] = frame_interval_seconds(video)
        try:
            facts = clip_facts(clip, video, interval)
            items.append(ClipVideo(clip, video, shared.setdefault(facts, facts)))
        except VideoError as error:
            outside.append(f"clip {clip.clip_id!r} of {clip.video}: {error}")
    if outside:
        more = f" ({len(outside) - 1} more clips likewise)" if len(outside) > 1 else ""
        raise InputError(f"{outside[0]}{more}; mend start_seconds and end_seconds in the manifest")
    return items
