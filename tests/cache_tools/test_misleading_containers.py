"""Containers that mislead: false key marks, unknown sizes and durations, late pictures, bytes behind the end."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from mmkd.cache_tools.frames import source as frames_module
from mmkd.cache_tools.frames.containers import is_cut_short
from mmkd.cache_tools.frames.frame_headers import OWN_MARKS, coded_sizes
from mmkd.cache_tools.frames.source import VideoFiles, clip_facts
from mmkd.data_manifests.errors import VideoError
from mmkd.data_manifests.manifest import Clip
from tests.helpers import barcode_videos as barcode

BY_NAME = {sample.name: replace(sample, frames=min(sample.frames, 40)) for sample in barcode.EXACT}
needs_decord = pytest.mark.skipif(not frames_module.HAS_DECORD, reason="decord has no wheel here")


def numbers(folder: Path, name: str) -> list[int]:
    """Read each frame alone, then all, through random access and as a stream; the answers must agree."""
    files = VideoFiles(folder)
    facts = files.probe(name)
    whole = np.arange(facts.frame_count)
    found = barcode.numbers_of(files.read(name, whole, facts).frames)
    assert [barcode.number_of(files.read(name, whole[i : i + 1], facts).frames[0]) for i in whole[::-1]] == found[
        ::-1
    ]
    assert barcode.numbers_of(np.stack(list(files.stream(name, whole, facts)))) == found
    return found


MARKED = [
    "mpeg4.avi",
    "mpeg4_b.avi",
    "mpeg4_b.mp4",
    "h263.3gp",
    "flv1.flv",
    "msmpeg4.avi",
    "wmv2.asf",
    "cinepak.mov",
    "animation.mov",
    "mpeg2_b.mkv",
    "open.mp4",
    "h264_b.avi",
    "hevc.mp4",
    "vp8.webm",
    "vp9.webm",
]


@pytest.mark.parametrize("name", MARKED)
def test_frames_are_exact_where_every_packet_is_marked_as_a_key_frame(tmp_path, name):
    barcode.write_sample(tmp_path, BY_NAME[name])
    barcode.rewrite(tmp_path / name, tmp_path / f"marked_{name}", all_keys=True)
    assert numbers(tmp_path, f"marked_{name}") == list(range(40))


@pytest.mark.parametrize("name", ["mpeg4_b.mp4", "cinepak.mov"])
def test_a_video_read_otherwise_than_its_marks_say_has_another_identity(tmp_path, name):
    """A cache that was made by believing the marks holds other frames: it is not taken for current."""
    barcode.write_sample(tmp_path, BY_NAME[name])
    barcode.rewrite(tmp_path / name, tmp_path / f"same_{name}")
    barcode.rewrite(tmp_path / name, tmp_path / f"marked_{name}", all_keys=True)
    files = VideoFiles(tmp_path)
    found = {prefix: files.probe(f"{prefix}{name}").identity for prefix in ("", "same_", "marked_")}
    assert found[""] == found["same_"] != found["marked_"]


def test_a_stream_that_begins_with_a_predicted_frame_is_refused_whatever_its_mark(tmp_path):
    barcode.write_sample(tmp_path, BY_NAME["mpeg4.avi"])
    with av.open(str(tmp_path / "mpeg4.avi")) as old, av.open(str(tmp_path / "cut.mkv"), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in [packet for packet in old.demux(video=0) if packet.size][3:]:
            packet.is_keyframe = True
            packet.stream = stream
            new.mux(packet)
    with pytest.raises(VideoError, match="does not begin with a key frame"):
        VideoFiles(tmp_path).probe("cut.mkv")


@pytest.mark.parametrize(
    ("codec", "size"),
    [
        ("mpeg4", (64, 48)),
        ("h263", (176, 144)),
        ("h263p", (64, 48)),
        ("flv", (64, 48)),  # one byte for each side
        ("flv", (320, 240)),  # a number for the size
        ("flv", (640, 16)),  # two bytes
        ("msmpeg4v2", (64, 48)),
        ("msmpeg4", (64, 48)),
        ("wmv1", (64, 48)),
        ("wmv2", (64, 48)),
    ],
)
def test_a_frames_own_header_says_what_its_encoder_says(codec, size):
    encoder = av.codec.CodecContext.create(codec, "w")
    encoder.width, encoder.height, encoder.pix_fmt = *size, "yuv420p"
    encoder.time_base, encoder.framerate, encoder.gop_size = Fraction(1, 25), 25, 5
    images = [av.VideoFrame.from_ndarray(barcode.draw(i, size), format="rgb24") for i in range(12)]
    for number, image in enumerate(images):
        image.pts, image.time_base = number, encoder.time_base
    packets = [packet for image in [*images, None] for packet in encoder.encode(image)]
    marks = [packet.is_keyframe for packet in packets]
    assert len(set(marks)) == 2
    assert [OWN_MARKS[codec](bytes(packet)) for packet in packets] == marks


def test_reordered_pictures_in_avi_are_those_of_the_same_packets_in_matroska(tmp_path):
    sample = BY_NAME["h264_b.avi"]
    barcode.write_sample(tmp_path, sample)
    barcode.write_sample(tmp_path, replace(sample, name="same.mkv"))
    files = VideoFiles(tmp_path)
    facts = {name: files.probe(name) for name in (sample.name, "same.mkv")}
    some = np.array([0, 1, 7, 8, 30, 39])
    avi, matroska = (files.read(name, some, known).frames for name, known in facts.items())
    np.testing.assert_array_equal(avi, matroska)
    np.testing.assert_allclose(*(known.times_seconds for known in facts.values()), atol=0.0011)


def write_turned(path: Path, codec: str) -> Path:
    """Write 12 frames of 128 x 72 and then 12 of 72 x 128 into one stream, as a phone that is turned does."""
    packets = []
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=24, options=barcode.VP9)
        stream.width, stream.height, stream.pix_fmt = 128, 72, "yuv420p"
        for part, size in enumerate([(128, 72), (72, 128)]):
            encoder = av.codec.CodecContext.create(codec, "w")
            encoder.width, encoder.height, encoder.pix_fmt = *size, "yuv420p"
            encoder.time_base, encoder.framerate, encoder.options = Fraction(1, 24), 24, barcode.VP9
            for i in range(12):
                frame = av.VideoFrame.from_ndarray(barcode.draw(i, size), format="rgb24")
                frame.pts, frame.time_base = 12 * part + i, encoder.time_base
                packets += encoder.encode(frame)
            packets += encoder.encode(None)
        for packet in packets:
            packet.stream = stream
            container.mux(packet)
    return path


@pytest.mark.parametrize("codec", ["libvpx", "libvpx-vp9"])
def test_a_size_that_changes_in_mid_stream_is_refused_by_either_decoder(tmp_path, codec):
    write_turned(tmp_path / "turned.webm", codec)
    for files in (VideoFiles(tmp_path), VideoFiles(tmp_path, force_pyav=True)):
        facts = files.probe("turned.webm")
        assert (facts.decoder, facts.width, facts.height) == ("pyav", 128, 72)
        assert files.read("turned.webm", np.arange(12), facts).frames.shape == (12, 72, 128, 3)
        with pytest.raises(VideoError, match=r"frame 12 has another size \(72 x 128\) than the first \(128 x 72\)"):
            files.read("turned.webm", np.array([12]), facts)


def packed_bits(text: str) -> bytes:
    """Return the bits of a text of 0 and 1, other characters left out, padded with zeros."""
    bits = "".join(character for character in text if character in "01")
    return int(bits.ljust(-len(bits) // 8 * -8, "0"), 2).to_bytes(-(-len(bits) // 8), "big")


SYNC = "01001001 10000011 01000010"
SIZE = f"{319:016b} {179:016b}"


@pytest.mark.parametrize(
    ("bits", "sizes"),
    [
        (f"10 00 0 0 1 0 {SYNC} 010 0 {SIZE}", [(320, 180)]),  # profile 0
        (f"10 10 0 0 1 0 {SYNC} 010 0 110 {SIZE}", [(320, 180)]),  # profile 1: with the kind of subsampling
        (f"10 01 0 0 1 0 {SYNC} 1 010 0 {SIZE}", [(320, 180)]),  # profile 2: with the depth
        (f"10 11 0 0 0 1 0 {SYNC} 1 111 0 {SIZE}", [(320, 180)]),  # profile 3, RGB
        ("10 00 1 010", []),  # shows an existing frame
        (f"10 00 0 1 1 0 00 00000001 0000 0000 0000 1 {SIZE}", []),  # as large as its first reference
        (f"10 00 0 1 1 0 00 00000001 0000 0000 0000 000 {SIZE}", [(320, 180)]),  # predicted, at another size
        (f"10 00 0 1 1 1 00000001 0000 0000 0000 000 {SIZE}", [(320, 180)]),  # resilient to errors
        (f"10 00 0 1 0 0 1 00 {SYNC} 11111111 {SIZE}", [(320, 180)]),  # hidden, intra only
    ],
)
def test_the_size_that_a_vp9_header_states(bits, sizes):
    assert coded_sizes("vp9", packed_bits(bits)) == sizes


def test_each_frame_of_a_vp9_superframe_is_looked_at():
    key = packed_bits(f"10 00 0 0 0 0 {SYNC} 010 0 {SIZE}")
    other = packed_bits(f"10 00 0 0 1 0 {SYNC} 010 0 {99:016b} {49:016b}")
    index = b"\xc1" + bytes([len(key), len(other)]) + b"\xc1"
    assert coded_sizes("vp9", key + other + index) == [(320, 180), (100, 50)]
    assert coded_sizes("vp9", key + other) == [(320, 180)]


def test_the_size_that_a_vp8_header_states():
    assert coded_sizes("vp8", b"\x10\x02\x00\x9d\x01\x2a\x40\x41\xb4\x00") == [(320, 180)]
    assert coded_sizes("vp8", b"\x11\x02\x00\x9d\x01\x2a\x40\x41\xb4\x00") == []
    assert coded_sizes("h264", b"\0") == []


VP9_WEBM = BY_NAME["vp9.webm"]
NOT_FOR_DECORD = {
    "live.webm": (replace(VP9_WEBM, name="live.webm"), {"live": "1"}),
    "one.webm": (replace(VP9_WEBM, name="one.webm", frames=1), {}),
}


@needs_decord
@pytest.mark.parametrize("name", NOT_FOR_DECORD)
def test_what_decord_refuses_is_read_by_pyav(tmp_path, name):
    sample, options = NOT_FOR_DECORD[name]
    barcode.encode(tmp_path / name, sample, container_options=options)
    assert VideoFiles(tmp_path).probe(name).decoder == "pyav"
    assert numbers(tmp_path, name) == list(range(sample.frames))


@needs_decord
@pytest.mark.parametrize("side", [2, 8, 16, 30, 32])
def test_small_frames_are_read(tmp_path, side):
    """Decord fails on some of these sizes, and only when it gives the frame out."""
    path = barcode.encode(tmp_path / "small.webm", replace(VP9_WEBM, name="small.webm", size=(side, 32), frames=5))
    with av.open(str(path)) as container:
        expected = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    files = VideoFiles(tmp_path)
    facts = files.probe(path.name)
    assert facts.decoder == ("decord" if side >= 32 else "pyav")
    np.testing.assert_array_equal(files.read(path.name, np.arange(5), facts).frames, expected)


@needs_decord
def test_decords_refusal_at_read_time_is_not_the_videos_fault(tmp_path):
    sample, options = NOT_FOR_DECORD["live.webm"]
    barcode.encode(tmp_path / sample.name, sample, container_options=options)
    files = VideoFiles(tmp_path)
    facts = replace(files.probe(sample.name), decoder="decord")
    some = np.array([0, 3, 39])
    assert barcode.numbers_of(files.read(sample.name, some, facts).frames) == some.tolist()


TRAILERS = {
    "text": b"gps 51.05 13.74\n" * 20,
    "noise": np.random.default_rng(3).bytes(5000),
    "zeros": bytes(1000),
    "ones": b"\xff" * 1000,
    "large_box": b"\x7f\xff\xff\xffSEFT" + bytes(64),
    "large_box_of_64_bits": b"\0\0\0\x01camd" + b"\x7f" * 8,
    "jpeg": b"\xff\xd8\xff\xe0\x00\x10JFIF" + bytes(3000),
    "seven_bytes": b"1234567",
}


@pytest.mark.parametrize("trailer", TRAILERS)
@pytest.mark.parametrize("options", [{}, {"movflags": "faststart"}], ids=["moov_last", "moov_first"])
def test_what_a_camera_appends_to_an_mp4_is_no_part_of_it(tmp_path, options, trailer):
    path = barcode.encode(tmp_path / "v.mp4", replace(BY_NAME["closed.mp4"], frames=5), container_options=options)
    whole = path.read_bytes()
    path.write_bytes(whole + TRAILERS[trailer])
    assert not is_cut_short(path)
    assert numbers(tmp_path, path.name) == list(range(5))
    for length in (len(whole) // 3, len(whole) // 2, len(whole) - 50):
        path.write_bytes(whole[:length])
        with pytest.raises(VideoError):
            VideoFiles(tmp_path).probe(path.name)


def test_a_fragmented_mp4_that_is_cut_inside_a_later_fragment_is_refused(tmp_path):
    options = {"movflags": "frag_keyframe+empty_moov"}
    sample = barcode.x264("fragments.mp4", "keyint=10:min-keyint=10:bframes=0", frames=40)
    path = barcode.encode(tmp_path / sample.name, sample, container_options=options)
    data = path.read_bytes()
    last = data.rindex(b"moof")
    for length in (last + 20, data.rindex(b"mdat") + 30):
        path.write_bytes(data[:length])
        assert is_cut_short(path)
        with pytest.raises(VideoError, match="truncated"):
            VideoFiles(tmp_path).probe(path.name)


@pytest.mark.parametrize("size", [0, 0xFFFF_FFFF])
def test_a_riff_size_that_means_unknown_is_no_truncation(tmp_path, size):
    path = barcode.write_sample(tmp_path, BY_NAME["mpeg4.avi"])
    data = bytearray(path.read_bytes())
    data[4:8] = size.to_bytes(4, "little")
    path.write_bytes(data)
    assert numbers(tmp_path, path.name) == list(range(40))
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(VideoError):
        VideoFiles(tmp_path).probe(path.name)


def test_the_second_riff_chunk_of_a_long_avi_is_looked_at(tmp_path):
    path = tmp_path / "long.avi"
    first = b"RIFF" + (5).to_bytes(4, "little") + b"AVI x" + b"\0"
    for size, cut in ((4, False), (5, True)):
        path.write_bytes(first + b"RIFF" + size.to_bytes(4, "little") + b"AVIX")
        assert is_cut_short(path) == cut
    path.write_bytes(first + b"a trailer")
    assert not is_cut_short(path)


def write_late(path: Path, codec: str, sound: str, *, late_seconds: float, audio: bool = True) -> Path:
    """Write 24 numbered frames, 12 a second, that begin `late_seconds` after the sound, which begins at 0."""
    packets = []
    with av.open(str(path), "w") as container:
        pictures = container.add_stream(codec, rate=12)
        pictures.width, pictures.height, pictures.pix_fmt = barcode.WIDTH, barcode.HEIGHT, "yuv420p"
        pictures.codec_context.time_base = Fraction(1, 1200)
        if audio:
            stream = container.add_stream(sound, rate=48000, layout="mono")
            step, kind = (960, "s16") if sound == "libopus" else (1024, "fltp")
            silence = np.zeros((1, step), np.int16 if kind == "s16" else np.float32)
            for i in range(150):
                frame = av.AudioFrame.from_ndarray(silence, format=kind, layout="mono")
                frame.sample_rate, frame.time_base, frame.pts = 48000, Fraction(1, 48000), step * i
                packets += stream.encode(frame)
            packets += stream.encode(None)
        for i in range(24):
            image = av.VideoFrame.from_ndarray(barcode.draw(i), format="rgb24")
            image.pts, image.time_base = round(late_seconds * 1200) + 100 * i, Fraction(1, 1200)
            packets += pictures.encode(image)
        for packet in [*packets, *pictures.encode(None)]:
            container.mux(packet)
    return path


LATE = [("v.webm", "libvpx", "libopus"), ("v.mkv", "libx264", "aac"), ("v.mp4", "libx264", "aac")]


@pytest.mark.parametrize("late_seconds", [0.2, 1.5])
@pytest.mark.parametrize(("name", "codec", "sound"), LATE)
def test_seconds_count_from_the_containers_start(tmp_path, name, codec, sound, late_seconds):
    write_late(tmp_path / name, codec, sound, late_seconds=late_seconds)
    files = VideoFiles(tmp_path)
    facts = files.probe(name)
    np.testing.assert_allclose(facts.times_seconds, late_seconds + np.arange(24) / 12, atol=0.024)  # and priming
    start = late_seconds + 5.6 / 12
    found = clip_facts(Clip("c", name, "train", {}, start_seconds=start, end_seconds=start + 1), facts)
    assert (found.first_frame, found.frame_count) == (6, 12)
    read = files.read(name, np.array([found.first_frame]), facts)
    assert barcode.numbers_of(read.frames) == [6]
    assert read.times_seconds[0] == facts.times_seconds[6]
    with pytest.raises(VideoError, match=r"no frame from 0 s to 0\.1 s"):
        clip_facts(Clip("c", name, "train", {}, end_seconds=0.1), facts)


@pytest.mark.parametrize(("name", "codec", "sound"), LATE)
def test_an_encoders_priming_makes_no_late_start(tmp_path, name, codec, sound):
    """Muxers move the pictures by the 7 to 23 ms that the sound's encoder puts before its first sample."""
    write_late(tmp_path / name, codec, sound, late_seconds=0)
    times = VideoFiles(tmp_path).probe(name).times_seconds
    assert times[0] == 0
    np.testing.assert_allclose(times, np.arange(24) / 12, atol=0.0011)


@pytest.mark.parametrize(("name", "codec", "sound"), [*LATE, ("v.flv", "libx264", "aac")])
def test_a_container_that_starts_with_its_pictures_starts_at_0(tmp_path, name, codec, sound):
    write_late(tmp_path / name, codec, sound, late_seconds=3, audio=False)
    assert VideoFiles(tmp_path).probe(name).times_seconds[0] == 0


def test_a_late_start_is_part_of_the_videos_identity(tmp_path):
    """A cache that was made by counting from the first frame holds other frames of its segments."""
    write_late(tmp_path / "late.mkv", "libx264", "aac", late_seconds=1.5)
    with av.open(str(tmp_path / "late.mkv")) as old, av.open(str(tmp_path / "alone.mkv"), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.size:
                packet.stream = stream
                new.mux(packet)
    late, alone = (VideoFiles(tmp_path).probe(f"{name}.mkv") for name in ("late", "alone"))
    assert late.times_seconds[0] == pytest.approx(1.5, abs=0.024)
    assert alone.times_seconds[0] == 0
    assert late.identity != alone.identity
