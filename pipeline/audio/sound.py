"""The sound of a clip: its video's sound track, decoded by PyAV to one channel at a stated rate.

Times count from the container's start, as those of frames do. What lies outside the track, before its first sample
or after its last, is silence. Decoding begins a second before the segment, so that codecs with memory (AAC, Opus)
have settled; the same file and segment give the same samples.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np

from mmkd.cache_tools.frames.packets import CONTAINERS
from mmkd.cache_tools.frames.records import Float32Array
from mmkd.cache_tools.frames.video_paths import reading
from mmkd.data_manifests.errors import StorageError
from mmkd.data_manifests.system_errors import MACHINE_FAULTS
from mmkd.pipeline.missing import SoundMissingError

SOUND_CONTAINERS = f"{CONTAINERS},wav,flac,mp3,aac"
"""FFmpeg's names of the containers that may be opened for their sound."""
ONLY_FILES = {"protocol_whitelist": "file", "format_whitelist": SOUND_CONTAINERS}
SETTLE_SECONDS = 1.0
"""How long before the segment decoding begins."""
SOUND_RULES = "sound-1: PyAV, mono float32, decoded from 1 s before the segment, silence outside the track"
"""What `read_sound` does, in words, for fingerprints."""


@dataclass(frozen=True)
class Segment:
    """A part of a video, in seconds from the container's start."""

    start_seconds: float
    """Its first moment."""
    end_seconds: float
    """Its end, exclusive."""

    def samples(self, rate_hz: int) -> int:
        """Return how many samples it has, at least 1."""
        return max(1, round((self.end_seconds - self.start_seconds) * rate_hz))


def read_sound(path: Path, segment: Segment, *, rate_hz: int) -> Float32Array:
    """Return the sound (N,) of a segment of a file: one channel, full scale 1, `segment.samples(rate_hz)` samples.

    Raises SoundMissingError where the file has no sound track, or one that cannot be decoded; StorageError where
    the machine cannot read it.
    """
    found = np.zeros(segment.samples(rate_hz), np.float32)
    with reading(path):
        for first, samples in _decoded(path, segment, rate_hz):
            begin, end = max(first, 0), min(first + len(samples), len(found))
            if begin < end:
                found[begin:end] = samples[begin - first : end - first]
    return found


def has_sound(path: Path) -> bool:
    """Return whether a file has a sound track, by its header; raises as `read_sound`."""
    with reading(path), _opened(path) as box:
        return box.streams.best("audio") is not None


def _decoded(path: Path, segment: Segment, rate_hz: int) -> Iterator[tuple[int, Float32Array]]:
    """Yield stretches of sound with the place of their first sample, counted from the segment's first."""
    with _opened(path) as box:
        stream = box.streams.best("audio")
        if stream is None or stream.codec_context is None:
            raise SoundMissingError("the video has no sound")
        stream.codec_context.thread_count = 1
        yield from _resampled(box, stream, segment, rate_hz)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with av.open(str(path), options=ONLY_FILES) as box:
            yield box
    except av.error.FFmpegError as error:
        if error.errno in MACHINE_FAULTS or isinstance(error, FileNotFoundError):
            raise StorageError(f"cannot read {path}: {error.strerror}") from error
        raise SoundMissingError(f"its sound cannot be decoded: {error.strerror}") from error


def _resampled(box: Any, stream: Any, segment: Segment, rate_hz: int) -> Iterator[tuple[int, Float32Array]]:
    origin = (box.start_time or 0) / av.time_base
    wanted = origin + segment.start_seconds - SETTLE_SECONDS
    if wanted > origin:
        box.seek(int(wanted / stream.time_base), stream=stream, backward=True)
    resampler = av.AudioResampler(format="flt", layout="mono", rate=rate_hz)
    place: int | None = None
    for frame in _frames(box, stream, origin + segment.end_seconds):
        if place is None and frame is not None:  # where the stretch begins; from here on samples follow each other
            place = round((frame.time - origin - segment.start_seconds) * rate_hz)
        for piece in resampler.resample(frame):
            samples = np.asarray(piece.to_ndarray().reshape(-1), np.float32)
            yield place or 0, samples
            place = (place or 0) + len(samples)


def _frames(box: Any, stream: Any, end_seconds: float) -> Iterator[Any]:
    """Yield decoded frames up to the end, then None, which empties the resampler."""
    for frame in box.decode(stream):
        if frame.time is None:
            raise SoundMissingError("its sound has no time stamps")
        if frame.time >= end_seconds:
            break
        yield frame
    yield None
