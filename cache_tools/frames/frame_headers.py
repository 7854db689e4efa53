"""What a packet's own first bytes say of its frame, where its container's marks cannot be relied on.

A container marks the samples at which decoding may start, and muxers mark them wrongly. Some decoders notice and
give nothing; others decode a predicted frame on grey, in silence. For those the frame's own header is read where
that is simple and certain, and every other stream is decoded from its start: slow, and never wrong.
"""

from collections.abc import Callable
from typing import Any

MPEG4_FRAME_START = b"\x00\x00\x01\xb6"
OwnMark = Callable[[bytes], bool | None]
"""Packet -> whether its frame is decoded without others; None where its header is not recognised."""
SAFE_DECODERS = {"h264", "hevc", "vp8", "vp9", "av1", "libdav1d", "mpeg1video", "mpeg2video", "ffv1"}
"""Decoders that return nothing, or an error, for a frame whose references are missing."""


def _mpeg4(data: bytes) -> bool | None:
    """ISO 14496-2, 6.2.5: vop_coding_type is 0 in an I-VOP."""
    at = data.find(MPEG4_FRAME_START)
    return data[at + 4] >> 6 == 0 if 0 <= at < len(data) - 4 else None


def _h263(data: bytes) -> bool | None:
    """ITU-T H.263, 5.1: a start code of 22 bits, 8 of time, then PTYPE, whose ninth bit says INTER."""
    if len(data) < 9 or _bits(data, 0, 22) != 0x20 or _bits(data, 30, 2) != 2:
        return None
    if _bits(data, 35, 3) != 7:
        return not _bits(data, 38, 1)
    extended = _bits(data, 38, 3)  # PLUSPTYPE, with or without 18 bits that stay as they were
    return _bits(data, 59 if extended == 1 else 41, 3) == 0


def _flv1(data: bytes) -> bool | None:
    """Sorenson's H.263 (SWF file format, H263VIDEOPACKET): 17 + 5 + 8 bits, the size in eight forms, the type."""
    if len(data) < 9 or _bits(data, 0, 17) != 1:
        return None
    explicit_bits = {0: 16, 1: 32}.get(_bits(data, 30, 3), 0)  # width and height: of 8 bits each, or of 16
    return _bits(data, 33 + explicit_bits, 2) == 0


def _msmpeg4(data: bytes) -> bool | None:
    """MS-MPEG-4 version 2 and 3 and WMV1 begin with two bits of picture type, 0 in an I-frame."""
    return data[0] >> 6 == 0


def _wmv2(data: bytes) -> bool | None:
    """WMV2 begins with one bit: 0 in an I-frame."""
    return data[0] >> 7 == 0


def _unknown(_: bytes) -> bool | None:
    return None


OWN_MARKS: dict[str, OwnMark] = {
    "mpeg4": _mpeg4,
    "h263": _h263,
    "h263p": _h263,
    "flv": _flv1,
    "flv1": _flv1,
    "msmpeg4v2": _msmpeg4,
    "msmpeg4": _msmpeg4,
    "msmpeg4v3": _msmpeg4,
    "wmv1": _msmpeg4,
    "wmv2": _wmv2,
}
"""Decoders that give grey for missing references -> how their frames tell what they are."""


def own_mark(codec: Any) -> OwnMark | None:
    """Return how frames of an opened FFmpeg codec tell what they are; None where the container is believed.

    A codec of no table, such as Cinepak or QuickTime Animation, is decoded from its start.
    """
    if codec.name in SAFE_DECODERS or codec.intra_only:
        return None
    return OWN_MARKS.get(codec.name, _unknown)


def _bits(data: bytes, start: int, count: int) -> int:
    """Return `count` bits from bit `start` of the first 16 bytes, the most significant first."""
    head = int.from_bytes(data[:16].ljust(16, b"\0"), "big")
    return head >> (128 - start - count) & ((1 << count) - 1)


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


def coded_sizes(codec: str, packet: Any) -> list[tuple[int, int]]:
    """Return (width, height) of each frame of a VP8 or VP9 packet that states its own; none for other codecs.

    The other frames have the size of one before them. So while all that is stated is one size, all frames have it.
    """
    if codec == "vp8":
        data = bytes(memoryview(packet)[:10])
        if len(data) < 10 or data[0] & 1:  # RFC 6386, 9.1: only key frames state a size
            return []
        width, height = int.from_bytes(data[6:8], "little"), int.from_bytes(data[8:10], "little")
        return [(width & 0x3FFF, height & 0x3FFF)]  # the two bits above are a hint for scaling
    if codec == "vp9":
        sizes = (_vp9_size(frame) for frame in _vp9_frames(memoryview(packet)))
        return [size for size in sizes if size is not None]
    return []


def _vp9_frames(data: memoryview) -> list[bytes]:
    """Return the first 24 bytes of each frame in a packet (VP9 bitstream, annex B: superframes)."""
    last = data[-1]
    count, length_bytes = (last & 7) + 1, (last >> 3 & 3) + 1
    index_bytes = 2 + count * length_bytes
    # The marker stands at both ends of the index: at the packet's end alone it is picture data by chance.
    if last & 0xE0 != 0xC0 or len(data) < index_bytes or data[-index_bytes] != last:
        return [bytes(data[:24])]
    lengths = bytes(data[1 - index_bytes : -1])
    frames, start = [], 0
    for number in range(count):
        length = int.from_bytes(lengths[number * length_bytes : (number + 1) * length_bytes], "little")
        frames.append(bytes(data[start : min(start + length, start + 24)]))
        start += length
    return frames


class _Bits:
    """Reads bits in order, the most significant first; zeros after the end."""

    def __init__(self, data: bytes) -> None:
        self._value, self._left = int.from_bytes(data.ljust(32, b"\0"), "big"), 256

    def read(self, count: int) -> int:
        """Return the next `count` bits."""
        self._left -= count
        return self._value >> self._left & ((1 << count) - 1)


def _vp9_size(frame: bytes) -> tuple[int, int] | None:
    """Return the size that an uncompressed header states (VP9 bitstream, 6.2), or None where it states none."""
    bits = _Bits(frame)
    bits.read(2)  # frame marker
    profile = bits.read(1) | bits.read(1) << 1
    bits.read(profile == 3)
    if bits.read(1) or not frame:  # shows an existing frame
        return None
    predicted, shown, resilient = bits.read(1), bits.read(1), bits.read(1)
    if not predicted:
        bits.read(24)  # sync code
        _skip_vp9_colours(bits, profile)
        return _vp9_frame_size(bits)
    intra_only = 0 if shown else bits.read(1)
    bits.read(0 if resilient else 2)  # reset of contexts
    if intra_only:
        bits.read(24)
        if profile:  # 0 states none: 8 bits, 4:2:0
            _skip_vp9_colours(bits, profile)
        bits.read(8)  # refreshed references
        return _vp9_frame_size(bits)
    bits.read(8 + 3 * 4)  # refreshed references; three used ones, with a sign each
    if any(bits.read(1) for _ in range(3)):  # the size of a reference
        return None
    return _vp9_frame_size(bits)


def _vp9_frame_size(bits: _Bits) -> tuple[int, int]:
    width = bits.read(16) + 1
    return width, bits.read(16) + 1


def _skip_vp9_colours(bits: _Bits, profile: int) -> None:
    bits.read(profile >= 2)  # bit depth
    if bits.read(3) != 7:  # not sRGB
        bits.read(1)  # range
        bits.read(3 if profile & 1 else 0)  # subsampling and a reserved bit
    else:
        bits.read(profile & 1)
