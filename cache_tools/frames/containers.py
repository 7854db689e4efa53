"""Whether a video file ends before its container says: read from the outermost sizes alone.

Matroska and WebM, MP4 and AVI all declare the size of their outer boxes, so a file cut anywhere is recognised
exactly and without demuxing, where comparing durations needs a tolerance. Live recordings that leave the size
unknown are not recognised here. Other containers are not looked into. What a camera appends behind the last box
is no part of the video, and may be anything.
"""

from pathlib import Path
from typing import BinaryIO

MATROSKA, SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"
MP4_FIRST_BOXES = {b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot"}
MP4_LATER_BOXES = MP4_FIRST_BOXES | {
    b"moof",
    b"styp",
    b"sidx",
    b"ssix",
    b"emsg",
    b"prft",
    b"mfra",
    b"meta",
    b"uuid",
}
"""Boxes that may follow the first ones: another type behind whole pictures (`mdat`) and their table is no box."""
RIFF_UNKNOWN = {0, 0xFFFF_FFFF}
"""Sizes in a header that was written before the size was known, or that cannot hold it."""
MAX_BOXES = 100_000
"""Outer boxes looked at in one file: a fragmented MP4 has two per fragment."""


def is_cut_short(path: Path) -> bool:
    """Return whether the file is shorter than its container's outer boxes say."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(12)
        if head[:4] == MATROSKA:
            return _matroska_end(file) > size
        if head[:4] == b"RIFF":
            return _riff_end(file, size) > size
        if head[4:8] in MP4_FIRST_BOXES:
            return _mp4_end(file, size) > size
    return False


def _matroska_end(file: BinaryIO) -> int:
    """Return where the segment ends, in bytes from the start, or 0 where it does not say."""
    file.seek(4)
    header_size = _ebml_size(file)
    if header_size is None:
        return 0
    file.seek(header_size, 1)
    if file.read(4) != SEGMENT:
        return 0
    segment_size = _ebml_size(file)
    return 0 if segment_size is None else file.tell() + segment_size


def _ebml_size(file: BinaryIO) -> int | None:
    """Read a variable-length size (RFC 8794, 4): leading zeros tell its length; all ones mean unknown."""
    first = file.read(1)
    if not first or not first[0]:
        return None
    length = 9 - first[0].bit_length()
    value = int.from_bytes(first + file.read(length - 1), "big") ^ 1 << 7 * length
    return None if value == (1 << 7 * length) - 1 else value


def _riff_end(file: BinaryIO, size: int) -> int:
    """Return where the last RIFF chunk ends (OpenDML puts one behind the other), or 0 where it does not say."""
    position = 0
    for _ in range(MAX_BOXES):
        file.seek(position)
        head = file.read(8)
        if head[:4] != b"RIFF" or len(head) < 8:
            break
        length = int.from_bytes(head[4:], "little")
        if length in RIFF_UNKNOWN:
            return 0
        position += 8 + length
        if position >= size:
            break
        position += length % 2  # padded to whole words, but perhaps not at the file's end
    return position


def _mp4_end(file: BinaryIO, size: int) -> int:
    """Return where the last outer box that begins inside the file ends, in bytes from the start."""
    position = 0
    # Before both are found any type of box is read over; behind them it may be what a camera appended.
    missing = {b"moov", b"mdat"}
    for _ in range(MAX_BOXES):
        file.seek(position)
        head = file.read(16)
        if len(head) < 8:
            break
        length, kind = int.from_bytes(head[:4], "big"), head[4:8]
        if not missing and kind not in MP4_LATER_BOXES:
            break  # appended by a camera
        if length == 1 and len(head) == 16:
            length = int.from_bytes(head[8:], "big")  # 1: the size follows in 64 bits (ISO 14496-12)
        if length == 0:
            return size  # the box goes on to the end of the file
        if length < 8:
            break  # not a box: some writers pad with zeros
        position += length
        if position >= size:
            return position
        missing.discard(kind)
    return size
