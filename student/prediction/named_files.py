"""Frames of video files wherever they lie, by number: no folder has to hold them all."""

from dataclasses import dataclass
from pathlib import Path

from mmkd.cache_tools.frames.records import ClipFrames, IntArray, VideoFacts
from mmkd.cache_tools.frames.source import DEFAULT_LIMITS, Limits, VideoFiles


@dataclass(frozen=True)
class NamedFiles:
    """A source of frames (`mmkd.cache_tools.frames.source.FrameSource`); it can be sent to workers."""

    paths: tuple[Path, ...]
    """Absolute paths. The video `"3"` is the fourth of them."""
    limits: Limits = DEFAULT_LIMITS
    """What a video may cost at most."""

    def stamp(self, video: str) -> str:
        """Return a cheap text that changes when the video does; VideoError if it is missing."""
        files, name = self._file(video)
        return files.stamp(name)

    def probe(self, video: str) -> VideoFacts:
        """Return the video's facts; VideoError if it cannot be used."""
        files, name = self._file(video)
        return files.probe(name)

    def read(self, video: str, frame_indices: IntArray, facts: VideoFacts) -> ClipFrames:
        """Return the frames at strictly ascending indices, exactly these; VideoError otherwise."""
        files, name = self._file(video)
        return files.read(name, frame_indices, facts)

    def _file(self, video: str) -> tuple[VideoFiles, str]:
        path = self.paths[int(video)]
        return VideoFiles(path.parent, self.limits, links="allow"), path.name  # its user named this very file
