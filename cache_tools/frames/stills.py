"""Frames that are stored as pictures, JPEG or PNG: read whole or refused, as video frames are.

OpenCV decodes them, to the same bits everywhere that its version is the same; a rotation flag in a picture is
ignored. It fills the rest of a picture that is cut short with grey and says nothing, so the end is looked for
first.
"""

import hashlib
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mmkd.cache_tools.frames.packets import Limits
from mmkd.cache_tools.frames.records import Float64Array, IntArray, UInt8Array
from mmkd.data_manifests.errors import VideoError

STILL_RULES = "stills-1: cv2.imdecode to RGB, orientation ignored"
"""What `decode_still` does, in words; part of fingerprints where frames are pictures."""
JPEG_START, JPEG_END = b"\xff\xd8", b"\xff\xd9"
PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"
SIZE_MARKERS = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
"""Markers of JPEG segments that begin with a frame's size (SOF0 to SOF15)."""
SAMPLED_FRAMES = 64
"""Frames whose sizes tell a folder from one that was encoded again."""
MAX_FRAME_BYTES = 2**28
"""Size of a picture's file above which it is refused unread."""
MAX_FRAMES = 2**24
"""Frames of one video, 77 hours at 60 a second: a file may claim more than memory holds."""
FOLDER, TAR, HDF5 = "stills folder", "stills tar", "stills hdf5"
STILLS = frozenset((FOLDER, TAR, HDF5))
"""Decoders, as facts name them, of frames that are pictures: what holds them."""
RATE_ADVICE = (
    "its frames are pictures without times; state their rate in the manifest: `mmkd-cache manifest epic-kitchens "
    "--layout frames`, or --frames-per-second of `mmkd-cache manifest csv`"
)


class StillFrames(ABC):
    """The pictures of one video, opened."""

    kind: str
    """What holds them; the decoder of their facts."""

    @property
    @abstractmethod
    def count(self) -> int:
        """Number of frames."""

    @abstractmethod
    def read(self, frame: int) -> bytes:
        """Return a frame's file; VideoError names the frame where it is damaged, OSError is the machine's."""

    @abstractmethod
    def name(self, frame: int) -> str:
        """Return what a frame is called, for errors."""

    @abstractmethod
    def size_bytes(self, frame: int) -> int:
        """Return the size of a frame's file."""

    def times_seconds(self) -> Float64Array | None:
        """Return (frames,) the times that are stored with them; None where a rate has to be stated."""
        return None

    def identity(self) -> str:
        """Return a hash of how many frames there are and of their sizes, at up to 64 places, never of a path."""
        places = np.unique(np.linspace(0, self.count - 1, SAMPLED_FRAMES).round().astype(int)).tolist()
        text = f"{self.kind} {self.count} {[self.size_bytes(place) for place in places]}"
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def decoded(self, frames: Sequence[int] | IntArray, limits: Limits) -> Iterator[UInt8Array]:
        """Yield frames (H, W, 3), RGB; VideoError names the one that cannot be read."""
        for frame in (int(frame) for frame in frames):
            data = self.read(frame)
            try:
                yield decode_still(data, limits)
            except VideoError as error:
                raise VideoError(f"frame {self.name(frame)}: {error}") from error


@dataclass(frozen=True)
class StillSize:
    """Size of a picture, by its header."""

    width: int
    """In pixels."""
    height: int
    """In pixels."""


def still_size(data: bytes) -> StillSize:
    """Return the size that a JPEG or PNG states; VideoError for anything else."""
    if data.startswith(PNG_START) and len(data) >= 24:
        return StillSize(*struct.unpack(">II", data[16:24]))
    place = 2
    while data.startswith(JPEG_START) and place + 9 <= len(data) and data[place] == 0xFF:
        marker, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
        if marker in SIZE_MARKERS:
            height, width = struct.unpack(">HH", data[place + 5 : place + 9])
            return StillSize(width, height)
        place += 1 if marker == 0xFF else 2 + length  # 0xFF before a marker is padding
    raise VideoError("it is neither a JPEG nor a PNG picture, or its header is damaged")


def decode_still(data: bytes, limits: Limits) -> UInt8Array:
    """Return a picture (H, W, 3) as RGB; VideoError where it is damaged, cut short, or larger than the limits."""
    size = still_size(data)
    if size.width * size.height > limits.max_pixels or not size.width * size.height:
        raise VideoError(f"{size.width} x {size.height} pixels; the limit is {limits.max_pixels} pixels")
    end = PNG_END if data.startswith(PNG_START) else JPEG_END
    if not data.rstrip(b"\0").endswith(end):
        raise VideoError("it is cut short")
    import cv2  # here, for recipes import this module, and help is to come without a decoder

    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    picture = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    if picture is None or picture.shape[:2] != (size.height, size.width):
        raise VideoError("it cannot be decoded")
    return np.ascontiguousarray(picture[..., ::-1], np.uint8)  # OpenCV's order is blue, green, red
