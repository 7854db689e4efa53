"""One video as pictures: what a worker does of `mmkd-cache pack`.

Every frame is decoded exactly, shrunk so that its short side is the one asked for (never enlarged), and encoded as
a JPEG by OpenCV, with its usual halved colour resolution, which most videos have themselves. Times are the video's
own.
"""

import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import h5py
import numpy as np

from mmkd.cache_tools.frames.data_frames import DataFrames
from mmkd.cache_tools.frames.records import UInt8Array, VideoFacts
from mmkd.cache_tools.frames.still_hdf5 import CHECKSUMS, PICTURES, TIMES
from mmkd.cache_tools.storage.hdf5_file import writing_hdf5
from mmkd.data_manifests.atomic import atomic_path
from mmkd.data_manifests.errors import VideoError

GROUP = "video"
"""Name of the one group of a part."""


@dataclass(frozen=True)
class PackParams:
    """How frames are stored."""

    short_side_px: int
    """Larger frames are shrunk to this short side; smaller keeps less and decodes faster."""
    quality: int
    """JPEG quality, 1 to 100; larger keeps more and takes more room."""

    def identity(self) -> dict[str, Any]:
        """Return what could change a picture, for files and refusals."""
        return {**asdict(self), "encoding": "cv2.imencode .jpg, shrunk by INTER_AREA"}


@dataclass(frozen=True)
class PackJob:
    """One video to pack."""

    source: DataFrames
    """Where frames come from."""
    video: str
    """Its path below the source's root."""
    facts: VideoFacts
    """Its facts."""
    part: Path
    """Where its part is written."""
    params: PackParams
    """How."""


def pack_video(job: PackJob) -> int:
    """Write a video's part and return its size in bytes; VideoError where a frame cannot be read exactly."""
    count = job.facts.frame_count
    checksums = np.zeros(count, np.uint32)
    with atomic_path(job.part) as temporary, writing_hdf5(temporary) as output:
        group = output.file.create_group(GROUP)
        pictures = group.create_dataset(PICTURES, (count,), h5py.vlen_dtype(np.uint8))
        for index, frame in enumerate(job.source.stream(job.video, np.arange(count), job.facts)):
            data = encoded(frame, job.params)
            pictures[index] = np.frombuffer(data, np.uint8)
            checksums[index] = zlib.crc32(data)
            output.check()  # a full disk ends it now, and not after an hour
        group[TIMES], group[CHECKSUMS] = job.facts.times_seconds, checksums
        group.attrs["source"] = job.facts.identity
    return job.part.stat().st_size


def encoded(frame: UInt8Array, params: PackParams) -> bytes:
    """Return a frame (H, W, 3) as the bytes of a JPEG."""
    bgr = cv2.cvtColor(shrunk(frame, params.short_side_px), cv2.COLOR_RGB2BGR)
    done, data = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, params.quality])
    if not done:
        raise VideoError(f"a frame of {frame.shape[1]} x {frame.shape[0]} cannot be encoded as JPEG")
    return bytes(data.tobytes())


def shrunk(frame: UInt8Array, short_side_px: int) -> UInt8Array:
    """Return a frame whose short side is at most `short_side_px`, in proportion."""
    height, width = frame.shape[:2]
    scale = short_side_px / min(height, width)
    if scale >= 1:
        return frame
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(cv2.resize(frame, size, interpolation=cv2.INTER_AREA), np.uint8)
