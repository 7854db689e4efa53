"""The two decoders of video files: PyAV held to the packet index, and decord for streams it reads exactly.

Both return RGB of the same bits on one machine (a test compares them), so the choice changes speed alone.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from av.sidedata.sidedata import Type as SideData
from av.video.reformatter import VideoReformatter

from mmkd.cache_tools.frames.packets import PacketIndex, reencode
from mmkd.cache_tools.frames.records import IntArray, UInt8Array
from mmkd.data_manifests.counted import counted
from mmkd.data_manifests.errors import VideoError

QUARTER_TURNS = {(1, 0, 0, 1): 0, (0, -1, 1, 0): 1, (-1, 0, 0, -1): 2, (0, 1, -1, 0): 3}
"""Display matrix (a, b, c, d) over 2^16 -> quarter turns to the left that show the frame upright."""


class PyavDecoder:
    """Decodes chosen frames of one opened stream, seeking only where that saves decoding."""

    def __init__(self, container: Any, stream: Any, index: PacketIndex) -> None:
        """Take an opened stream, wherever it stands; `index` is its packet index."""
        self._container = container
        self._stream = stream
        self._index = index
        self._to_rgb = VideoReformatter()
        self._decoded: Iterator[Any] = iter(())
        self._position: int | None = None
        """pts of the last decoded frame (its index where frames are counted); None after a seek."""

    def rgb(self, frame_index: int) -> tuple[UInt8Array, int]:
        """Return the upright frame (H, W, 3) and the quarter turns to the left that made it so."""
        frame = self._counted(frame_index) if self._index.counted else self._frame(frame_index)
        if frame.is_corrupt:
            raise VideoError(f"frame {frame_index} is damaged")
        turns = quarter_turns(frame)
        image: UInt8Array = self._to_rgb.reformat(frame, format="rgb24").to_ndarray()  # type: ignore[assignment]  # rgb24 is uint8
        return np.rot90(image, turns), turns

    def _frame(self, frame_index: int) -> Any:
        """Decode to the frame with that very pts, from an earlier key frame when it is jumped over.

        That happens with demuxers that seek by decode time, and with key frames that need earlier frames.
        """
        pts = int(self._index.pts[frame_index])
        keys = self._index.keyframe_pts
        key = int(np.searchsorted(keys, pts, side="right")) - 1
        follows = frame_index > 0 and self._position == self._index.pts[frame_index - 1]  # a stream never seeks
        if self._position is None or not (follows or keys[key] <= self._position < pts):
            self._seek(key)
        while True:
            frame = self._decode_until(pts)
            if frame is not None:
                return frame
            if key == 0:
                raise VideoError(f"frame {frame_index} could not be decoded; {reencode(self._stream)}")
            key -= 1
            self._seek(key)

    def _decode_until(self, pts: int) -> Any | None:
        """Decode on; return the frame with that pts, or None when it is not among those that follow."""
        for frame in self._decoded:
            if frame.pts is None or (self._position is not None and frame.pts <= self._position):
                raise VideoError(f"the decoder returned frames out of order; {reencode(self._stream)}")
            self._position = frame.pts
            if frame.pts >= pts:
                return frame if frame.pts == pts else None
        return None

    def _counted(self, frame_index: int) -> Any:
        """Decode from the start, counting: slow, for streams whose time stamps name no frame."""
        if self._position is None or self._position >= frame_index:
            self._seek(0)
            self._position = -1
        for frame in self._decoded:
            self._position += 1
            if self._position == frame_index:
                return frame
        raise VideoError(f"frame {frame_index} could not be decoded: the decoder returned fewer frames")

    def count(self) -> int:
        """Return how many frames decoding the whole stream gives."""
        self._seek(0)
        return sum(1 for _ in self._decoded)

    def _seek(self, key: int) -> None:
        """Let decoding go on at a key frame, given by its number; earlier where the decoder knows its way."""
        self._container.seek(int(self._index.seek_to[key]), stream=self._stream, backward=True)
        self._decoded = self._from_key(key) if self._index.strict else self._container.decode(self._stream)
        self._position = None

    def _from_key(self, key: int) -> Iterator[Any]:
        """Yield the frames from a key frame's own packet on; none where the demuxer stands behind it.

        A demuxer believes the container's marks, so it may stop at a predicted frame, which such a decoder would
        take. Streams are few packets long between key frames: those before it are read over.
        """
        pts, dts = int(self._index.keyframe_pts[key]), int(self._index.seek_to[key])
        avi = self._index.container == "avi"  # whose presentation times FFmpeg guesses, otherwise after a seek
        packets = self._container.demux(self._stream)
        for packet in packets:
            if packet.size and (packet.dts == dts if avi else packet.pts == pts):
                yield from packet.decode()
                break
            # Decode times ascend, and a frame's is never after its pts: the key frame cannot follow any more.
            if packet.size and packet.dts is not None and packet.dts > pts:
                return
        for packet in packets:
            yield from packet.decode()


def check_count(decoder: PyavDecoder, index: PacketIndex, stream: Any) -> None:
    """Raise VideoError unless decoding a counted stream whole gives as many frames as its packets show."""
    count = decoder.count()
    if count != len(index.pts):
        packets = counted(len(index.pts), "packet", ("gives", "give"))
        raise VideoError(f"{packets} {counted(count, 'frame')}; {reencode(stream)}")


def quarter_turns(frame: Any) -> int:
    """Return how many quarter turns to the left show the frame upright (phones store a rotation flag)."""
    matrix = frame.side_data.get(SideData.DISPLAYMATRIX)
    if matrix is None:
        return 0
    # Rows a, b, u; c, d, v; x, y, w of int32: a to d are 16.16 fixed point, and u between them is not used.
    a, b, _, c, d = struct.unpack_from("=5i", memoryview(matrix))
    turns = QUARTER_TURNS.get(tuple(round(value / 65536) for value in (a, b, c, d)))
    if turns is None or {abs(value) for value in (a, b, c, d)} != {0, 65536}:
        raise VideoError("the video's display matrix is not a quarter turn; re-encode it upright")
    return turns


def read_pyav(
    container: Any, stream: Any, *, index: PacketIndex, frame_indices: IntArray, size: tuple[int, int]
) -> UInt8Array:
    """Return frames (N, H, W, 3) at ascending indices; VideoError when one is not of `size` (H, W)."""
    frames = np.empty((len(frame_indices), *size, 3), dtype=np.uint8)
    images = pyav_frames(container, stream, index=index, frame_indices=frame_indices, size=size)
    for row, image in enumerate(images):
        frames[row] = image
    return frames


def pyav_frames(
    container: Any, stream: Any, *, index: PacketIndex, frame_indices: IntArray, size: tuple[int, int]
) -> Iterator[UInt8Array]:
    """Yield frames (H, W, 3) at ascending indices; VideoError when one is not of `size` (H, W)."""
    decoder = PyavDecoder(container, stream, index)
    for frame_index in frame_indices:
        image, _ = decoder.rgb(int(frame_index))
        if image.shape[:2] != size:
            height, width = image.shape[:2]
            raise VideoError(
                f"frame {frame_index} has another size ({width} x {height}) than the first ({size[1]} x {size[0]})"
            )
        yield image


class DecordRefusedError(Exception):
    """Decord cannot read the stream, which says nothing about the video: PyAV gives the same bits."""


def read_decord(path: Path, *, index: PacketIndex, frame_indices: IntArray) -> UInt8Array:
    """Return frames (N, H, W, 3) at ascending indices, decoded by decord; DecordRefusedError where it cannot."""
    import decord

    reader = _open_decord(path, index)
    try:
        frames: UInt8Array = reader.get_batch(frame_indices).asnumpy()
    except (decord.DECORDError, IndexError) as error:
        raise DecordRefusedError from error
    return frames


def decord_can_read(path: Path, index: PacketIndex) -> bool:
    """Return whether decord opens the file and sees its frames: it wants a duration, and a usual frame rate."""
    try:
        _open_decord(path, index)
    except DecordRefusedError:
        return False
    return True


def _open_decord(path: Path, index: PacketIndex) -> Any:
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    try:
        reader = decord.VideoReader(str(path), num_threads=1)  # 0 (automatic) aborts on some VP9 files
    except (decord.DECORDError, IndexError, UnicodeEncodeError) as error:  # it takes names in UTF-8 alone
        raise DecordRefusedError from error
    if len(reader) != len(index.pts):
        raise DecordRefusedError
    return reader
