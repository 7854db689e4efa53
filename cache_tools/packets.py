"""The packet index of a video file: what its frames are, found by demuxing without decoding.

Container headers lie about frame counts (WebM says 0) and about time (variable rates), and decoders return
fewer frames, in silence, from a truncated file. The packets tell: frame i of a video is the i-th smallest
presentation time stamp (pts) of the packets that show a frame. The index costs one pass over the file, 1 to
5 % of decoding it. It gives up files without time stamps (raw streams) and MPEG-TS, whose seeks are not exact
in any decoder that was measured.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.stream import Disposition

from mmkd.cache_tools.containers import is_cut_short
from mmkd.cache_tools.records import Float64Array, IntArray
from mmkd.data_manifests.counted import counted
from mmkd.data_manifests.errors import StorageError, VideoError
from mmkd.data_manifests.system_errors import MACHINE_FAULTS

CONTAINERS = "matroska,webm,mov,mp4,m4a,3gp,3g2,mj2,avi,asf,flv,ogg,mpegts"
"""FFmpeg's names of the containers that may be opened at all: playlists and images could name other files."""
MPEG4_FRAME_START = b"\x00\x00\x01\xb6"
NOT_EXACT = {"mpegts": "MPEG-TS cannot be read exactly; remux it: ffmpeg -i IN.ts -c copy OUT.mkv"}


@dataclass(frozen=True)
class Limits:
    """What a video may cost at most; a larger one is refused before its first frame is decoded."""

    max_pixels: int = 4096 * 4096
    """Width times height of a frame, in pixels; for every command, as are the others."""
    max_duration_seconds: float = 6 * 3600.0
    """Length of a video, in seconds."""
    clip_timeout_seconds: float = 120.0
    """Wall-clock time for one clip in a worker, in seconds."""

    def __post_init__(self) -> None:
        """Raise ValueError unless all are positive."""
        if min(self.max_pixels, self.max_duration_seconds, self.clip_timeout_seconds) <= 0:
            raise ValueError(f"limits must be positive: {self}")


@dataclass(frozen=True)
class PacketIndex:
    """What the packets of a video's first picture stream say."""

    container: str
    """FFmpeg's name of the container format, e.g. `matroska,webm`."""
    codec: str
    """FFmpeg's name of the codec, e.g. `vp9`."""
    pixel_format: str
    """FFmpeg's name of the decoded pixel format, e.g. `yuv420p`."""
    pts: IntArray
    """(frames,) presentation time stamps in units of `time_base`, strictly ascending."""
    keyframe_pts: IntArray
    """(key frames,) those at which decoding can start, ascending."""
    time_base: Fraction
    """Seconds per unit."""
    hidden: int
    """Number of packets that hold a reference frame alone, which is decoded but never shown."""
    packed: bool
    """Whether packets hold two frames (DivX's packed B-frames): pts name no frame; they are counted."""
    identity: str
    """Hash of the number of packets, their time stamps and sizes."""

    @property
    def times_seconds(self) -> Float64Array:
        """(frames,) presentation times in seconds, from 0."""
        scale = float(self.time_base.numerator), float(self.time_base.denominator)
        return np.asarray((self.pts - self.pts[0]) * scale[0] / scale[1], dtype=np.float64)


@contextmanager
def open_video(path: Path, limits: Limits) -> Iterator[tuple[Any, Any]]:
    """Open the file with PyAV and yield (container, first video stream); FFmpeg's errors become VideoError.

    Only the `file` protocol and the containers above are allowed, and the header's size and duration are
    checked before anything is decoded. One thread: the caller runs one worker per core.
    """
    options = {
        "protocol_whitelist": "file",
        "format_whitelist": CONTAINERS,
        # FFmpeg decodes frames while it opens a file; its own limit is wider, since it counts padded sizes
        "max_pixels": str(2 * limits.max_pixels + 256**2),
    }
    try:
        with _open(path, options) as container:
            if container.format.name in NOT_EXACT:
                raise VideoError(NOT_EXACT[container.format.name])
            stream = container.streams.best("video")  # the same choice as decord's
            if stream is None or stream.disposition & Disposition.attached_pic:
                raise VideoError("the file has no video stream")
            if stream.codec_context is None:
                raise VideoError("its video codec is not known")
            check_header(container, stream, limits)
            stream.codec_context.thread_count = 1
            stream.codec_context.thread_type = "NONE"
            yield container, stream
    except av.error.FFmpegError as error:
        if error.errno in MACHINE_FAULTS or isinstance(error, FileNotFoundError):  # it was there a moment ago
            raise StorageError(f"cannot read {path}: {error.strerror}") from error
        raise VideoError(f"cannot be decoded: {error.strerror}") from error
    except UnicodeError as error:
        raise VideoError("the container's text is not UTF-8") from error


def _open(path: Path, options: dict[str, str]) -> Any:
    try:
        return av.open(str(path), options=options)
    except (av.error.InvalidDataError, av.error.ArgumentError) as error:  # nothing it knows; not on the list
        raise VideoError("not a video file, or a damaged or unknown container") from error


def check_header(container: Any, stream: Any, limits: Limits) -> None:
    """Raise VideoError when the header claims more pixels or seconds than the limits allow."""
    width, height = stream.codec_context.width, stream.codec_context.height
    if width < 1 or height < 1:
        raise VideoError(f"no frame size, or one far above the limit of {limits.max_pixels} pixels")
    if width * height > limits.max_pixels:
        raise VideoError(f"frames of {width} x {height} pixels; the limit is {limits.max_pixels} pixels")
    seconds = (container.duration or 0) / av.time_base
    if seconds > limits.max_duration_seconds:
        raise VideoError(f"the video takes {seconds:.0f} s; the limit is {limits.max_duration_seconds:g} s")


@dataclass
class _Scan:
    """What is gathered of the video stream's packets while the file is demuxed."""

    codec: str
    pts: list[int] = field(default_factory=list)
    keyframe_pts: list[int] = field(default_factory=list)
    hidden: int = 0
    packed: bool = False
    packets: int = 0
    digest: Any = field(default_factory=lambda: hashlib.blake2b(digest_size=16))

    def add(self, packet: Any) -> None:
        """Take the next packet in decode order; raise VideoError for one that cannot be read exactly."""
        if not packet.size:  # a dropped frame, or the empty packet that flushes a decoder
            self.packets += packet.dts is not None
            return
        if packet.pts is None:
            raise VideoError("frames without time stamps; remux the video: ffmpeg -i IN -c copy OUT.mkv")
        if packet.is_corrupt:
            raise VideoError("the container marks a packet as damaged")
        self.packets += 1
        self.digest.update(b"%d %d;" % (packet.pts, packet.size))
        if packet.is_keyframe:
            self.keyframe_pts.append(packet.pts)
        elif not self.keyframe_pts:
            raise VideoError("the video does not begin with a key frame: cut or damaged; re-encode it")
        if self.codec == "mpeg4" and bytes(packet).count(MPEG4_FRAME_START) > 1:
            self.packed = True
        if is_hidden(self.codec, packet):
            self.hidden += 1
        elif not packet.is_discard:
            self.pts.append(packet.pts)


def index_packets(path: Path, container: Any, stream: Any) -> PacketIndex:
    """Demux the opened file once, without decoding; raise VideoError for one that is damaged or cut short."""
    if is_cut_short(path):
        raise VideoError("truncated: the file ends before its container says")
    scan = _Scan(stream.codec_context.name)
    end_seconds = 0.0
    for packet in container.demux():
        if packet.size and packet.pts is not None:
            end_seconds = max(end_seconds, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if packet.stream_index == stream.index:
            scan.add(packet)
    if scan.packets < len(stream.index_entries):
        expected = len(stream.index_entries)
        raise VideoError(f"damaged: {scan.packets} of the {expected} packets in its index can be read")
    check_complete(container, len(scan.pts), end_seconds)
    return PacketIndex(
        container=container.format.name,
        codec=scan.codec,
        pixel_format=stream.codec_context.pix_fmt or "unknown",
        pts=shown_pts(scan.pts, scan.keyframe_pts),
        keyframe_pts=np.array(sorted(scan.keyframe_pts), dtype=np.int64),
        time_base=stream.time_base,
        hidden=scan.hidden,
        packed=scan.packed,
        identity=scan.digest.hexdigest(),
    )


def check_complete(container: Any, frames: int, end_seconds: float) -> None:
    """Raise VideoError when fewer seconds arrived than the container's header says, over all its streams."""
    if not frames:
        raise VideoError("the video has no frame")
    claimed = (container.duration or 0) / av.time_base
    tolerance = max(0.5, 2 * end_seconds / frames)
    if end_seconds < claimed - tolerance:
        raise VideoError(
            f"truncated: the header says {claimed:.2f} s, {end_seconds:.2f} s ({counted(frames, 'frame')}) arrived"
        )


def shown_pts(pts: list[int], keyframe_pts: list[int]) -> IntArray:
    """Return the frames' pts, sorted, from the first key frame on.

    Those that an open GOP shows before its key frame need frames which are not in the file.
    """
    first = min(keyframe_pts)
    array = np.array(sorted(p for p in pts if p >= first), dtype=np.int64)
    if not len(array):
        raise VideoError("the video has no frame")
    if (np.diff(array) == 0).any():
        raise VideoError("two frames have the same time stamp; re-encode the video to read it exactly")
    return array


def is_hidden(codec: str, packet: Any) -> bool:
    """Return whether a VP8 or VP9 packet holds only a frame that is never shown (an alternate reference)."""
    if codec not in {"vp8", "vp9"}:
        return False
    data = memoryview(packet)
    first, last = data[0], data[-1]
    if codec == "vp8":
        return not first & 0x10  # RFC 6386, 9.1: show_frame
    if last & 0xE0 == 0xC0:
        return False  # a superframe: hidden frames packed together with a shown one
    profile = (first >> 5 & 1) | (first >> 3 & 2)  # VP9 bitstream, 6.2: profile bits low, high
    first = first << 1 if profile == 3 else first  # reserved_zero
    show_existing, show_frame = first & 0x08, first & 0x02
    return not (show_existing or show_frame)
