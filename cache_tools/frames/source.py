"""Exact frames of video files: frame i is the i-th in presentation order, or reading fails.

Which decoder reads which stream is a small table, held by the barcode tests over containers, codecs and GOP
structures: decord where it is exact and fast (VP8 and VP9 in WebM or Matroska), PyAV with the packet index
for everything else. It is part of the fingerprint, never a silent fallback. Frames are decoded on the CPU
with one thread, since hardware decoding gives other bits. A rotation flag is applied, by quarter turns: width
and height are those of the upright frame.
"""

import importlib.util
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mmkd.cache_tools.frames.decoders import (
    DecordRefusedError,
    PyavDecoder,
    check_count,
    decord_can_read,
    pyav_frames,
    read_decord,
    read_pyav,
)
from mmkd.cache_tools.frames.packets import Limits as Limits  # users find it here, beside VideoFiles
from mmkd.cache_tools.frames.packets import PacketIndex, index_packets, open_video
from mmkd.cache_tools.frames.records import ClipFacts, ClipFrames, IntArray, UInt8Array, VideoFacts
from mmkd.cache_tools.frames.video_paths import ADVICE, Links, reading, video_path
from mmkd.data_manifests.errors import StorageError, VideoError
from mmkd.data_manifests.manifest import Clip

HAS_DECORD = importlib.util.find_spec("decord") is not None
DECORD_STREAMS = {("matroska,webm", "vp8", "yuv420p"), ("matroska,webm", "vp9", "yuv420p")}
"""(container, codec, pixel format) that decord 0.6 reads exactly with one thread, where the height is even.

At odd heights its old FFmpeg converts colours otherwise: other bits than PyAV, and than libvpx for VP9."""
DECORD_SIDE_PX = 32
"""Shorter side from which decord is asked: it refuses most streams of 16 px and less."""
USUAL_FPS = 120
"""Frames a second up to which decord opens what has a duration; it refuses 1,000."""
PYAV_RULES = "1: all pyav"
DECODER_RULES = "1: vp8, vp9 in webm of even height decord; else pyav" if HAS_DECORD else PYAV_RULES
"""Name of the table for fingerprints: it changes with the table, and where decord is missing."""
DEFAULT_LIMITS = Limits()
INDEX_CACHE_SIZE = 16
"""Packet indices kept in a process: clips of a long video follow each other, and it is demuxed once."""


class FrameSource(Protocol):
    """Where frames come from: video files here, and what tests put in their place."""

    def stamp(self, video: str) -> str:
        """Return a cheap text that changes when video, limits or rules do; VideoError if it is missing."""
        ...

    def probe(self, video: str) -> VideoFacts:
        """Return the video's facts without decoding more than a frame; VideoError if it cannot be used."""
        ...

    def read(self, video: str, frame_indices: IntArray, facts: VideoFacts) -> ClipFrames:
        """Return the frames at strictly ascending indices, exactly these; VideoError otherwise."""
        ...


@dataclass(frozen=True)
class VideoFiles:
    """Video files below a root folder. Nothing is held open, so it can be sent to workers."""

    root: Path
    """Folder that holds the videos; a path that leads out of it is refused."""
    limits: Limits = DEFAULT_LIMITS
    """What a video may cost at most."""
    force_pyav: bool = False
    """Read everything with PyAV, whatever the table says."""
    links: Links = "own"
    """Which symbolic links may lead out of the root."""

    @property
    def rules(self) -> str:
        """Name of the decoder table in use, for fingerprints."""
        return PYAV_RULES if self.force_pyav else DECODER_RULES

    def path(self, video: str) -> Path:
        """Return the file's resolved path; VideoError if it is outside the root or no file."""
        return video_path(self.root, video, self.links)

    def _known_path(self, video: str) -> Path:
        """Return the path of a video that was probed; StorageError if it has gone since: the disk may be lost."""
        try:
            return self.path(video)
        except VideoError as error:
            raise StorageError(f"{error}, though it was there before, below {self.root}; {ADVICE}") from error

    def stamp(self, video: str) -> str:
        """Return size, time of change, limits and rules as a text."""
        path = self.path(video)
        with reading(path):
            stat = path.stat()
        limits = f"{self.limits.max_pixels}:{self.limits.max_duration_seconds:g}"
        return f"{stat.st_size}:{stat.st_mtime_ns}:{limits}:{self.rules}"

    def probe(self, video: str) -> VideoFacts:
        """Return the video's facts from its packets and its first frame."""
        path = self.path(video)
        with reading(path), open_video(path, self.limits) as (container, stream):
            index = _index(path, container, stream)
            check_duration(index, self.limits)
            decoder = PyavDecoder(container, stream, index)
            if index.counted:
                check_count(decoder, index, stream)
            first, turns = decoder.rgb(0)
            plain = is_plain(container, stream)
        height, width = first.shape[:2]
        decord = not turns and not self.force_pyav and choose_decoder(index, width, height) == "decord"
        return VideoFacts(
            width=width,
            height=height,
            times_seconds=index.times_seconds,
            decoder="decord" if decord and (plain or decord_can_read(path, index)) else "pyav",
            identity=index.identity,
        )

    def read(self, video: str, frame_indices: IntArray, facts: VideoFacts) -> ClipFrames:
        """Return the frames at strictly ascending indices with the decoder that the facts name.

        Where decord refuses after all, PyAV reads: the bits are the same, and its verdict is the video's.
        """
        check_indices(frame_indices, facts)
        path = self._known_path(video)
        with reading(path):
            return self._read(path, frame_indices, facts)

    def _read(self, path: Path, frame_indices: IntArray, facts: VideoFacts) -> ClipFrames:
        frames = self._read_decord(path, frame_indices, facts) if facts.decoder == "decord" else None
        if frames is None:
            with open_video(path, self.limits) as (container, stream):
                index = _index(path, container, stream)
                check_identity(index, facts)
                size = (facts.height, facts.width)
                frames = read_pyav(container, stream, index=index, frame_indices=frame_indices, size=size)
        return ClipFrames(frames, frame_indices, facts.times_seconds[frame_indices])

    def _read_decord(self, path: Path, frame_indices: IntArray, facts: VideoFacts) -> UInt8Array | None:
        """Return the frames, or None where decord gives none of that size: PyAV gives the bits that it would."""
        index = _kept_index(path)
        if index is None:
            with open_video(path, self.limits) as (container, stream):
                index = _index(path, container, stream)
        check_identity(index, facts)
        try:
            frames = read_decord(path, index=index, frame_indices=frame_indices)
        except DecordRefusedError:
            return None
        return frames if frames.shape[1:3] == (facts.height, facts.width) else None

    def stream(self, video: str, frame_indices: IntArray, facts: VideoFacts) -> Iterator[UInt8Array]:
        """Yield the frames (H, W, 3) at strictly ascending indices one by one, so in the memory of one.

        Always through PyAV, which gives the bits that `read` gives. Raises what `read` raises.
        """
        check_indices(frame_indices, facts)
        path = self._known_path(video)
        with reading(path), open_video(path, self.limits) as (container, stream):
            index = _index(path, container, stream)
            check_identity(index, facts)
            yield from pyav_frames(
                container, stream, index=index, frame_indices=frame_indices, size=(facts.height, facts.width)
            )


def choose_decoder(index: PacketIndex, width: int, height: int) -> str:
    """Return the decoder that the table names for an upright stream: `decord` or `pyav`."""
    listed = (index.container, index.codec, index.pixel_format) in DECORD_STREAMS
    usual = index.one_size and not index.hidden and len(index.pts) > 1
    fits = height % 2 == 0 and min(width, height) >= DECORD_SIDE_PX
    return "decord" if listed and usual and fits and HAS_DECORD else "pyav"


def is_plain(container: Any, stream: Any) -> bool:
    """Return whether the header states what decord wants, a duration and a usual rate: asking doubles a probe."""
    rate = stream.average_rate
    return bool(container.duration) and rate is not None and 1 <= rate <= USUAL_FPS


def frame_interval_seconds(facts: VideoFacts) -> float:
    """Return the median time between frames; 1 for a single frame."""
    return float(np.median(np.diff(facts.times_seconds))) if facts.frame_count > 1 else 1.0


def clip_facts(
    clip: Clip, facts: VideoFacts, interval_seconds: float | None = None, *, clip_end: bool = False
) -> ClipFacts:
    """Return which of the video's frames are the clip's: those with start_seconds <= t < end_seconds.

    A segment may end up to one frame's time after the video does, since annotations are rounded. That time is
    `frame_interval_seconds`, for a caller with many clips of one video to give. With `clip_end` any later end is
    the video's. Raises VideoError for a segment outside the video, or without a frame.
    """
    times, end = facts.times_seconds, clip.end_seconds
    if end is None:
        last, until = facts.frame_count, "the video's end"
    else:
        interval = frame_interval_seconds(facts) if interval_seconds is None else interval_seconds
        video_end = float(times[-1]) + interval
        if end > video_end + interval and not clip_end:
            raise VideoError(
                f"segment outside the video: it ends at {end:g} s, the video at {video_end:.3f} s; "
                "data.clip_segments=true clips it"
            )
        last, until = int(np.searchsorted(times, end)), f"{end:g} s"
    first = int(np.searchsorted(times, clip.start_seconds)) if clip.start_seconds else 0
    if first >= last:
        raise VideoError(f"segment without a frame: no frame from {clip.start_seconds:g} s to {until}")
    return ClipFacts(facts.width, facts.height, first, last - first)


def check_indices(frame_indices: IntArray, facts: VideoFacts) -> None:
    """Raise ValueError (a caller's bug) unless the indices ascend strictly inside the video."""
    if not len(frame_indices) or frame_indices[0] < 0 or frame_indices[-1] >= facts.frame_count:
        raise ValueError(f"frame indices {frame_indices} are empty or outside 0..{facts.frame_count - 1}")
    if (np.diff(frame_indices) <= 0).any():
        raise ValueError(f"frame indices {frame_indices} do not ascend strictly")


def check_identity(index: PacketIndex, facts: VideoFacts) -> None:
    """Raise VideoError when the file is not the one that was probed."""
    if index.identity != facts.identity:
        raise VideoError("the video has changed since it was probed; run the command again")


def check_duration(index: PacketIndex, limits: Limits) -> None:
    """Raise VideoError when the packets span more time than the limit."""
    seconds = float(index.times_seconds[-1])
    if seconds > limits.max_duration_seconds:
        raise VideoError(f"the video takes {seconds:.0f} s; the limit is {limits.max_duration_seconds:g} s")


_INDICES: OrderedDict[tuple[object, ...], PacketIndex] = OrderedDict()


def _kept_index(path: Path) -> PacketIndex | None:
    stat = path.stat()
    return _INDICES.get((path, stat.st_size, stat.st_mtime_ns, stat.st_ino))


def _index(path: Path, container: Any, stream: Any) -> PacketIndex:
    stat = path.stat()
    # The inode, too: a file moved into another's place may have its size and time of change.
    key = (path, stat.st_size, stat.st_mtime_ns, stat.st_ino)
    index = _INDICES.get(key)
    if index is None:
        index = index_packets(path, container, stream)
        _INDICES[key] = index
        if len(_INDICES) > INDEX_CACHE_SIZE:
            _INDICES.popitem(last=False)
    return index
