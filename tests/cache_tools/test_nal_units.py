"""Counting the pictures of a packet by its headers."""

import pytest

from mmkd.cache_tools.frames.nal_units import PictureCounter


def golomb(value: int) -> str:
    digits = f"{value + 1:b}"
    return "0" * (len(digits) - 1) + digits


def unit(kind: int, bits: str) -> bytes:
    padded = bits + "1" + "0" * 31
    data = int(padded[: len(padded) // 8 * 8], 2).to_bytes(len(padded) // 8, "big")
    return b"\0\0\1" + bytes([kind]) + data


def sequence(*, fields: bool, high: bool = False) -> bytes:
    """A sequence parameter set whose frame numbers take 5 bits."""
    colours = golomb(1) + golomb(0) * 2 + "0" + "1"
    lists = "0" * 7 + "1" + golomb(16)  # eight lists, the last of which is all default: it ends at once
    head = f"{100 if high else 77:08b}" + "0" * 16 + golomb(0) + (colours + lists) * high
    numbers = golomb(1) + golomb(0) + golomb(2) + golomb(1)  # frame numbers, order, reference frames
    return unit(0x67, head + numbers + "0" + golomb(7) * 2 + str(int(not fields)))


def part(*, field: str = "", first: int = 0, number: int = 3) -> bytes:
    return unit(0x41, golomb(first) + golomb(5) + golomb(0) + f"{number:05b}" + field)


FRAME, TOP, BOTTOM = part(field="0"), part(field="10"), part(field="11")
LATER_SLICE = part(first=20, field="0")


@pytest.mark.parametrize("high", [False, True])
@pytest.mark.parametrize(
    ("packet", "pictures"),
    [
        (FRAME, 1),
        (FRAME + LATER_SLICE, 1),
        (TOP + BOTTOM, 1),
        (TOP, 1),
        (FRAME + FRAME, 2),
        (TOP + BOTTOM + TOP + BOTTOM, 2),
        (TOP + BOTTOM + FRAME, 2),
        (b"", 0),
        (b"\0\0\1", 0),
    ],
)
def test_two_fields_are_one_picture(packet, pictures, high):
    assert PictureCounter("h264", None).pictures(sequence(fields=True, high=high) + packet) == pictures
    assert PictureCounter("h264", sequence(fields=True, high=high)).pictures(packet) == pictures


def test_without_fields_each_slice_that_begins_a_picture_counts():
    counter = PictureCounter("h264", sequence(fields=False))
    assert counter.pictures(part() + part(first=9) + part(number=4)) == 2


def test_any_bytes_are_counted_without_a_fault():
    for length in range(12):
        for header in (None, b"\1" * length, b"\1" + b"\xff" * 40):
            for codec in ("h264", "hevc"):
                PictureCounter(codec, header).pictures(b"\0\0\1\x67" + b"\xff" * length + b"\0\0\1\x41")
