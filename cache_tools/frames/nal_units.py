"""How many pictures a packet of H.264 or HEVC holds: its container takes it for one, and so do decoders.

Video for Windows writes what one call of an encoder returned as one chunk of an AVI file, two pictures among them
(a P-frame with the B-frame before it). A decoder then shows one of the two. Only headers are read: those of a
sequence for the few fields that stand before it in a slice's header, and a slice's for whether it begins a picture,
and whether that is a field, half of one.
"""

from collections.abc import Iterator
from typing import Any

START_CODE = b"\0\0\1"
HEAD_BYTES = 64
"""Bytes of a slice that are looked at: no field that is read lies behind them."""
SPS_BYTES = 1024
"""Bytes of a sequence's header that are looked at."""
HIGH_PROFILES = {44, 83, 86, 100, 110, 118, 122, 128, 134, 135, 138, 139, 244}
"""Values of profile_idc whose sequence headers describe colours (ITU-T H.264, 7.3.2.1.1)."""


class PictureCounter:
    """Counts the pictures of a stream's packets, one packet after the other."""

    def __init__(self, codec: str, extradata: bytes | None) -> None:
        """Take FFmpeg's name of the codec and the container's header for the decoder."""
        self._hevc = codec == "hevc"
        self._slice_bits: tuple[int, int] | None = None
        """Bits of a slice's header before, and of, the frame number; None where no picture is a field."""
        self._length_bytes = 0
        """Bytes of the length before each unit; 0 where start codes part them."""
        head = extradata or b""
        # lengthSizeMinusOne (ISO 14496-15) is in byte 21 of an hvcC record and in byte 4 of an avcC one.
        at = 21 if self._hevc else 4
        if head[:1] == b"\1" and len(head) > at + 2:  # configurationVersion; a start code begins with 0
            self._length_bytes = (head[at] & 3) + 1
            if not self._hevc:
                self._sequence(head[8 : 8 + SPS_BYTES])  # behind the number of sets and the first one's length
        else:
            self.pictures(head)

    def pictures(self, packet: Any) -> int:
        """Return how many pictures begin in a packet; two fields are one."""
        data = memoryview(packet)
        frames = fields = 0
        for unit in self._units(data):
            if self._hevc:  # fields are pictures of their own; layers above the first are other views of one
                first = (unit[0] >> 1 & 63) < 32 and not unit[0] & 1 and unit[1] >> 3 == 0 and unit[2] >> 7
                frames += bool(first)
            elif unit[0] & 31 == 7:
                self._sequence(bytes(unit[:SPS_BYTES]))
            elif unit[0] & 31 in (1, 2, 5) and unit[1] >> 7:  # its first macroblock is the picture's
                field = self._is_field(bytes(unit[:HEAD_BYTES]))
                fields += field
                frames += not field
        return frames + (fields + 1) // 2

    def _units(self, data: memoryview) -> Iterator[memoryview]:
        """Yield the units of a packet, without what parts them; those too short for a header are left out."""
        if self._length_bytes:
            at = 0
            while at + self._length_bytes < len(data):
                start = at + self._length_bytes
                at = start + int.from_bytes(data[at:start], "big")
                if at - start > 3:
                    yield data[start:at]
            return
        whole = bytes(data)
        at = whole.find(START_CODE)
        while 0 <= at < len(whole) - 6:
            yield data[at + 3 : at + 3 + SPS_BYTES]
            at = whole.find(START_CODE, at + 3)

    def _sequence(self, unit: bytes) -> None:
        """Note what a sequence parameter set says of slices' headers (ITU-T H.264, 7.3.2.1.1)."""
        bits = _Bits(unit[1:])
        profile = bits.read(8)
        bits.read(16)
        bits.golomb()  # the set's number
        planes = _skip_colours(bits) if profile in HIGH_PROFILES else 0
        frame_number_bits = bits.golomb() + 4
        order = bits.golomb()
        if order == 0:
            bits.golomb()
        elif order == 1:
            bits.read(1)
            for _ in range(2):
                bits.golomb()
            for _ in range(min(bits.golomb(), 255)):  # H.264 allows 255: a damaged header cannot keep us here
                bits.golomb()
        bits.golomb()  # reference frames
        bits.read(1)
        bits.golomb()  # width, height
        bits.golomb()
        # frame_mbs_only_flag: where it is set no picture is a field, and slices need no second look.
        self._slice_bits = None if bits.read(1) else (planes, frame_number_bits)

    def _is_field(self, unit: bytes) -> bool:
        """Return whether a slice belongs to a field (ITU-T H.264, 7.3.3)."""
        if self._slice_bits is None:
            return False
        bits = _Bits(unit[1:])
        for _ in range(3):  # first macroblock, type, picture parameter set
            bits.golomb()
        bits.read(sum(self._slice_bits))
        return bool(bits.read(1))


class _Bits:
    """Reads bits in order, the most significant first, without the bytes that keep start codes away; then zeros."""

    def __init__(self, data: bytes) -> None:
        clean = data.replace(b"\0\0\3", b"\0\0")
        self._value, self._left = int.from_bytes(clean, "big"), 8 * len(clean)

    def read(self, count: int) -> int:
        """Return the next `count` bits."""
        self._left -= count
        value = self._value >> self._left if self._left >= 0 else self._value << -self._left
        return value & ((1 << count) - 1)

    def golomb(self) -> int:
        """Return the next number of variable length (ITU-T H.264, 9.1)."""
        zeros = 0
        # Behind the end there are zeros alone: without the limit this would never stop.
        while zeros < 32 and not self.read(1):
            zeros += 1
        return (1 << zeros) - 1 + self.read(zeros)

    def signed_golomb(self) -> int:
        """Return the next signed number of variable length."""
        number = self.golomb()
        return -(number // 2) if number % 2 == 0 else (number + 1) // 2


def _skip_colours(bits: _Bits) -> int:
    """Read over the format of colours; return the bits that it adds to a slice's header."""
    chroma = bits.golomb()
    planes = 2 if chroma == 3 and bits.read(1) else 0  # separate_colour_plane_flag: slices then name their plane
    bits.golomb()
    bits.golomb()  # depths
    bits.read(1)
    if bits.read(1):  # scaling lists
        for number in range(12 if chroma == 3 else 8):  # 4:4:4 has lists of 8 x 8 for Cb and Cr, too
            if bits.read(1):
                _skip_scaling_list(bits, 16 if number < 6 else 64)
    return planes


def _skip_scaling_list(bits: _Bits, size: int) -> None:
    last = following = 8
    for _ in range(size):
        if following:
            following = (last + bits.signed_golomb()) % 256
        last = following or last
