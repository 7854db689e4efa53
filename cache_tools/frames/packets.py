"""The packet index of a video file: what its frames are, found by demuxing without decoding.

Container headers lie about frame counts (WebM says 0) and about time (variable rates), and decoders return
fewer frames, in silence, from a truncated file. The packets tell: frame i of a video is the i-th smallest
presentation time stamp (pts) of the packets that show a frame. The index costs one pass over the file, 1 to
5 % of decoding it. It gives up files without time stamps (raw streams) and MPEG-TS, whose seeks are not exact
in any decoder that was measured. AVI keeps no presentation times: where its pictures are reordered, they are
counted as they come out of the decoder.
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

from mmkd.cache_tools.frames.containers import is_cut_short
from mmkd.cache_tools.frames.frame_headers import MPEG4_FRAME_START, OwnMark, coded_sizes, is_hidden, own_mark
from mmkd.cache_tools.frames.nal_units import PictureCounter
from mmkd.cache_tools.frames.records import Float64Array, IntArray
from mmkd.data_manifests.counted import counted
from mmkd.data_manifests.errors import StorageError, VideoError
from mmkd.data_manifests.system_errors import MACHINE_FAULTS

CONTAINERS = "matroska,webm,mov,mp4,m4a,3gp,3g2,mj2,avi,asf,flv,ogg,mpegts"
"""FFmpeg's names of the containers that may be opened at all: playlists and images could name other files."""
PRIMING_SECONDS = 0.05
"""Sound codecs start with up to this much that is never played, and muxers move the pictures after it."""
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
    seek_to: IntArray
    """(key frames,) time stamps that make the demuxer stand at or before each of them."""
    strict: bool
    """Whether decoding must start at a key frame's very packet, for the decoder starts anywhere, on grey."""
    time_base: Fraction
    """Seconds per unit."""
    late_seconds: float
    """First frame's time after the container's start, which is that of its earliest stream, in seconds."""
    hidden: int
    """Number of packets that hold a reference frame alone, which is decoded but never shown."""
    counted: bool
    """Whether pts name no frame (packed B-frames, reordered pictures in AVI): they are counted from the start."""
    one_size: bool
    """Whether all frames have the size that the container states, as far as their headers say."""
    identity: str
    """Hash of the packets' number, time stamps and sizes, and of what is read in another way than these say."""

    @property
    def times_seconds(self) -> Float64Array:
        """(frames,) presentation times in seconds from the container's start."""
        scale = float(self.time_base.numerator), float(self.time_base.denominator)
        return np.asarray((self.pts - self.pts[0]) * scale[0] / scale[1] + self.late_seconds, dtype=np.float64)


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


def reencode(stream: Any, *, untimed: bool = False) -> str:
    """Return the command that makes a copy of the opened video which is read exactly, with all its frames.

    Matroska, for into MP4 ffmpeg repeats frames at a constant rate. Untimed frames are given the times of a
    constant rate: those that ffmpeg guesses may meet others, and it leaves out a frame then.
    """
    odd = stream.codec_context.width % 2 or stream.codec_context.height % 2
    filters = ["setpts=N/FRAME_RATE/TB"] * untimed + ["crop=trunc(iw/2)*2:trunc(ih/2)*2"] * bool(odd)
    option = f'-vf "{",".join(filters)}" ' if filters else ""
    return f"re-encode it: ffmpeg -i IN {option}-c:v libx264 -crf 18 OUT.mkv"


def unpack(stream: Any, rate: float) -> str:
    """Return the command that parts the pictures of the opened video's packets, and encodes them again."""
    codec = stream.codec_context.name
    second = reencode(stream).replace("re-encode it: ffmpeg -i IN", f"ffmpeg -framerate {rate:.6g} -i OUT.{codec}")
    return f"re-encode them one by one: ffmpeg -i IN -map 0:{stream.index} -c copy OUT.{codec} && {second}"


@dataclass
class _Scan:
    """What is gathered of the video stream's packets while the file is demuxed."""

    stream: Any
    own_mark: OwnMark | None
    reordered: bool
    """Whether presentation times are a guess; the n-th picture shown has the n-th decode time."""
    pts: list[int] = field(default_factory=list)
    keys: list[tuple[int, int]] = field(default_factory=list)
    """(pts, time stamp to seek to) of each key frame."""
    sizes: set[tuple[int, int]] = field(default_factory=set)
    headless: bool = False
    """Whether frames come before the first key frame."""
    hidden: int = 0
    packed: bool = False
    counter: PictureCounter | None = None
    """For codecs whose packets may hold several pictures, of which a decoder shows one."""
    unshown: int = 0
    """Pictures beyond the first of their packet."""
    false_marks: int = 0
    marked: int = 0
    packets: int = 0
    digest: Any = field(default_factory=lambda: hashlib.blake2b(digest_size=16))

    def add(self, packet: Any) -> None:
        """Take the next packet in decode order; raise VideoError for one that cannot be read exactly."""
        if not packet.size:  # a dropped frame, or the empty packet that flushes a decoder
            self.packets += packet.dts is not None
            return
        if packet.pts is None or (self.reordered and packet.dts is None):
            raise VideoError(f"frames without time stamps; {reencode(self.stream, untimed=True)}")
        if packet.is_corrupt:
            raise VideoError("the container marks a packet as damaged")
        self.packets += 1
        self.digest.update(b"%d %d;" % (packet.pts, packet.size))
        codec = self.stream.codec_context.name
        if self._is_key(packet):
            # Some demuxers seek by decode time, others by presentation time: the smaller stands before both.
            self.keys.append((packet.pts, packet.pts if packet.dts is None else min(packet.pts, packet.dts)))
        self.headless |= not self.keys
        if codec == "mpeg4" and bytes(packet).count(MPEG4_FRAME_START) > 1:
            self.packed = True  # DivX in AVI: a P- and a B-frame share a packet and its one time stamp
        if self.counter is not None:
            self.unshown += max(0, self.counter.pictures(packet) - 1)
        self.sizes.update(coded_sizes(codec, packet))
        if is_hidden(codec, packet):
            self.hidden += 1
        elif not packet.is_discard:
            self.pts.append(packet.dts if self.reordered else packet.pts)

    def _is_key(self, packet: Any) -> bool:
        """Return whether decoding can start here: by the container's mark where the decoder knows better itself."""
        marked = bool(packet.is_keyframe)
        self.marked += marked
        if self.own_mark is None:
            return marked
        own = self.own_mark(bytes(packet))
        if own is None:
            return marked and not self.keys  # of marks that nothing confirms the first alone is believed
        self.false_marks += marked and not own
        return own

    def identity(self, late_seconds: float) -> str:
        """Return the hash. What is read in another way than by caches made before these rules is named in it."""
        every_mark = self.own_mark is not None and len(self.keys) == 1 and self.marked == self.packets > 1
        if self.false_marks or every_mark:
            self.digest.update(b"false key frames;")
        if late_seconds:
            self.digest.update(b"late %.6f;" % late_seconds)
        if len(self.sizes) > 1:
            self.digest.update(b"sizes;")
        return str(self.digest.hexdigest())


def index_packets(path: Path, container: Any, stream: Any) -> PacketIndex:
    """Demux the opened file once, without decoding; raise VideoError for one that is damaged or cut short."""
    if is_cut_short(path):
        raise VideoError("truncated: the file ends before its container says")
    coder = stream.codec_context
    reordered = is_reordered_avi(container, stream)
    scan = _Scan(stream, own_mark(coder.codec), reordered)
    if coder.name in {"h264", "hevc"}:
        scan.counter = PictureCounter(coder.name, coder.extradata)
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
    if not scan.keys:
        raise VideoError("the video has no key frame, so nothing of it can be decoded: get it again")
    if scan.headless:
        raise VideoError(f"the video does not begin with a key frame: cut or damaged; {reencode(stream)}")
    keys = np.array(sorted(scan.keys), dtype=np.int64)
    pts = shown_pts(scan.pts, int(keys[0, int(reordered)]), stream)  # reordered: both are decode times
    avi = container.format.name == "avi"  # knows decode times alone: what FFmpeg adds to reorder is no lateness
    interval_seconds = float(np.median(np.diff(pts)) * stream.time_base) if len(pts) > 1 else PRIMING_SECONDS
    if scan.unshown:
        seconds = float((pts[-1] - pts[0]) * stream.time_base) + interval_seconds
        raise VideoError(f"packets that hold several frames; {unpack(stream, (len(pts) + scan.unshown) / seconds)}")
    late_seconds = seconds_late(container, stream, int(keys[0, 1] if avi else pts[0]), interval_seconds)
    by_count = scan.packed or reordered
    return PacketIndex(
        container=container.format.name,
        codec=coder.name,
        pixel_format=coder.pix_fmt or "unknown",
        pts=pts,
        keyframe_pts=keys[:, 0],
        seek_to=keys[:, 1],
        strict=by_count or scan.own_mark is not None,
        time_base=stream.time_base,
        late_seconds=late_seconds,
        hidden=scan.hidden,
        counted=by_count,
        one_size=scan.sizes <= {(coder.width, coder.height)},
        identity=scan.identity(late_seconds),
    )


def is_reordered_avi(container: Any, stream: Any) -> bool:
    """Return whether presentation times are the demuxer's guess. Of MPEG-4 part 2 it knows each frame's type."""
    coder = stream.codec_context
    return container.format.name == "avi" and coder.name != "mpeg4" and bool(coder.has_b_frames)


def seconds_late(container: Any, stream: Any, first_pts: int, interval_seconds: float) -> float:
    """Return how long after the container's start the first frame is shown, in seconds.

    The start is that of the earliest stream, as players and `ffmpeg -ss` count. What sound alone has before 0 is
    never played (an encoder's priming), and where a muxer moved everything to begin at 0 with that priming, the
    pictures come less than a frame later: both are starts together.
    """
    own = first_pts if stream.start_time is None else stream.start_time
    start = (container.start_time or 0) / av.time_base
    if float(own * stream.time_base) <= start:
        return 0.0  # this very stream is the earliest
    first = float(first_pts * stream.time_base)
    late = first - max(start, min(first, 0.0))
    return late if late >= min(interval_seconds, PRIMING_SECONDS) else 0.0


def check_complete(container: Any, frames: int, end_seconds: float) -> None:
    """Raise VideoError when fewer seconds arrived than the container's header says, over all its streams."""
    if not frames:
        raise VideoError("the video has no frame")
    claimed = (container.duration or 0) / av.time_base
    tolerance = max(0.5, 2 * end_seconds / frames)  # two frames: the last packet may state no duration
    if end_seconds < claimed - tolerance:
        raise VideoError(
            f"truncated: the header says {claimed:.2f} s, {end_seconds:.2f} s ({counted(frames, 'frame')}) arrived"
        )


def shown_pts(pts: list[int], first: int, stream: Any) -> IntArray:
    """Return the frames' pts, sorted, from that of the first key frame on.

    Those that an open GOP shows before its key frame need frames which are not in the file.
    """
    array = np.array(sorted(p for p in pts if p >= first), dtype=np.int64)
    if not len(array):
        raise VideoError("the video has no frame")
    if (np.diff(array) == 0).any():
        raise VideoError(f"two frames have the same time stamp; {reencode(stream)}")
    return array
