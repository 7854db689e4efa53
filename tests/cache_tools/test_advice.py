"""What a refusal advises is typed on a file that makes it appear: the copy is read, and holds every frame."""

import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from mmkd.cache_tools.frames.source import VideoFiles
from mmkd.data_manifests.errors import VideoError
from tests.helpers import barcode_videos as barcode

OPEN_GOP = barcode.x264("open.mkv", "keyint=12:min-keyint=12:open-gop=1:bframes=3:b-adapt=0", frames=30)
PACKED = barcode.Sample("plain.avi", "mpeg4", b_frames=1, gop=12, options={"b_strategy": "0"}, frames=30)


def copy_packets(source: Path, target: Path, change: Callable[[list], list]) -> Path:
    """Remux a file with its packets changed: left out, or at other times."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in change([packet for packet in old.demux(video=0) if packet.size]):
            packet.stream = stream
            new.mux(packet)
    return target


def without_time_stamps(folder: Path, sample=OPEN_GOP) -> Path:
    """Blocks before 0, which Matroska has no time for: what joining two pieces with an open GOP leaves."""
    path = barcode.write_sample(folder, sample)
    with av.open(str(path)) as container:
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    data = bytearray(path.read_bytes())
    for number, packet in enumerate(packets[1:3]):
        at = data.index(packet) - 3  # after the track: two bytes of time, relative to the cluster
        data[at : at + 2] = (-20 - number).to_bytes(2, "big", signed=True)
    path.write_bytes(data)
    return path


def odd_size_without_time_stamps(folder: Path) -> Path:
    sample = replace(OPEN_GOP, size=(barcode.WIDTH + 1, barcode.HEIGHT + 1), pixel_format="yuv444p")
    return without_time_stamps(folder, sample)


def equal_time_stamps(folder: Path) -> Path:
    def repeat(packets: list) -> list:
        packets[10].pts = packets[10].dts = packets[9].pts
        return packets

    sample = replace(barcode.EXACT[2], name="plain.webm", frames=30)
    return copy_packets(barcode.write_sample(folder, sample), folder / "equal.webm", repeat)


def cut_before_a_key_frame(folder: Path) -> Path:
    sample = barcode.x264("closed.mkv", "keyint=10:min-keyint=10:bframes=0", frames=35)
    return copy_packets(barcode.write_sample(folder, sample), folder / "cut.mkv", lambda packets: packets[5:])


def transport_stream(folder: Path) -> Path:
    return barcode.write_sample(folder, barcode.NOT_EXACT)


def packed_with_one_lost(folder: Path) -> Path:
    """A packet that lost the B-frame it carried: one packet more than frames."""

    start = b"\x00\x00\x01\xb6"

    def lose(packets):
        packed = barcode.pack_b_frames(packets)
        middle = next(i for i in range(12, len(packed)) if packed[i].count(start) == 2)
        packed[middle] = packed[middle][: packed[middle].rindex(start)]
        return packed

    return barcode.rewrite(barcode.write_sample(folder, PACKED), folder / "lost.avi", lose)


MADE = {
    without_time_stamps: "frames without time stamps",
    odd_size_without_time_stamps: "frames without time stamps",
    equal_time_stamps: "two frames have the same time stamp",
    cut_before_a_key_frame: "does not begin with a key frame",
    transport_stream: "MPEG-TS cannot be read exactly",
    packed_with_one_lost: "30 packets give 29 frames",
}


def follow(advice: str, video: Path) -> Path:
    """Type the command of a message with the file's own name in place of IN."""
    command = re.search(r"ffmpeg -i IN\S* .*(OUT\S*)", advice)
    out = video.parent / command[1].replace("OUT", "made")
    typed = re.sub(r"\bIN\S*", str(video), command[0], count=1).replace("OUT", str(video.parent / "made"))
    subprocess.run(["bash", "-c", typed.replace("ffmpeg", "ffmpeg -v error -nostdin")], check=True)
    return out


def two_in_a_packet(folder: Path, name: str, sample: barcode.Sample, rate: int = 12) -> Path:
    """Each packet of the copy holds two pictures, as Video for Windows writes what an encoder returns at once."""
    path = folder / name
    with av.open(str(barcode.write_sample(folder, sample))) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        packets = [packet for packet in old.demux(video=0) if packet.size]
        for number, (first, second) in enumerate(zip(packets[::2], packets[1::2], strict=True)):
            both = av.Packet(bytes(first) + bytes(second))
            both.pts = both.dts = number
            both.time_base, both.is_keyframe, both.stream = Fraction(1, rate), first.is_keyframe, stream
            new.mux(both)
    return path


H264 = barcode.x264("once.avi", "keyint=10:min-keyint=10:bframes=0", frames=36)
TWICE = {
    "h264.avi": H264,
    "h264.mkv": replace(H264, name="once.mkv"),
    "b_frames.mkv": barcode.x264("once.mkv", "keyint=12:min-keyint=12:bframes=2", frames=36),
    "interlaced.mp4": barcode.x264("once.mp4", "keyint=10:min-keyint=10:bframes=0:tff=1", frames=36),
    "hevc.mkv": barcode.Sample("once.mkv", "libx265", barcode.X265, frames=36),
}


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="the ffmpeg program that is advised is not installed")
@pytest.mark.parametrize("name", TWICE)
def test_packets_of_two_frames_are_refused_with_a_command_that_gives_both(tmp_path, name):
    video = two_in_a_packet(tmp_path, name, TWICE[name])
    with pytest.raises(VideoError, match="packets that hold several frames") as refused:
        VideoFiles(tmp_path).probe(name)
    made = follow(str(refused.value), video)
    files = VideoFiles(tmp_path)
    facts = files.probe(made.name)
    found = barcode.numbers_of(files.read(made.name, np.arange(facts.frame_count), facts).frames)
    assert found == list(range(36))
    assert facts.times_seconds[-1] == pytest.approx(35 / 24, rel=0.1)


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="the ffmpeg program that is advised is not installed")
@pytest.mark.parametrize("make", MADE, ids=lambda make: make.__name__)
def test_what_a_refusal_advises_gives_a_video_with_every_frame(tmp_path, make):
    video = make(tmp_path)
    with pytest.raises(VideoError, match=MADE[make]) as refused:
        VideoFiles(tmp_path).probe(video.name)
    made = follow(str(refused.value), video)
    with av.open(str(video)) as container:
        there = [barcode.number_of(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    assert len(there) >= 25
    files = VideoFiles(tmp_path)
    facts = files.probe(made.name)
    found = barcode.numbers_of(files.read(made.name, np.arange(facts.frame_count), facts).frames)
    assert found == sorted(found)
    assert set(found) == set(there)


@pytest.mark.parametrize("make", MADE, ids=lambda make: make.__name__)
def test_a_video_that_is_not_read_exactly_is_refused_with_a_command(tmp_path, make):
    video = make(tmp_path)
    with pytest.raises(VideoError, match=f"{MADE[make]}.*ffmpeg -i IN"):
        VideoFiles(tmp_path).probe(video.name)


def test_a_video_without_any_key_frame_is_refused_without_one(tmp_path):
    sample = barcode.x264("one_key.mkv", "keyint=infinite:bframes=0", frames=20)
    copy_packets(barcode.write_sample(tmp_path, sample), tmp_path / "cut.mkv", lambda packets: packets[5:])
    with pytest.raises(VideoError, match="has no key frame") as refused:
        VideoFiles(tmp_path).probe("cut.mkv")
    assert "ffmpeg" not in str(refused.value)
