"""Exact frames: barcode videos over containers, codecs and GOP structures, and files that must be refused."""

import errno
import os
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmkd.cache_tools.frames import source as frames_module
from mmkd.cache_tools.frames.containers import is_cut_short
from mmkd.cache_tools.frames.frame_headers import is_hidden
from mmkd.cache_tools.frames.packets import index_packets, open_video
from mmkd.cache_tools.frames.records import VideoFacts
from mmkd.cache_tools.frames.source import Limits, VideoFiles, choose_decoder, clip_facts
from mmkd.data_manifests.errors import StorageError, VideoError
from mmkd.data_manifests.manifest import Clip
from tests.helpers import barcode_videos as barcode
from tests.helpers.places import DATA, needs_data

BY_NAME = {sample.name: sample for sample in barcode.EXACT}
needs_decord = pytest.mark.skipif(not frames_module.HAS_DECORD, reason="decord has no wheel here")
SEEKING = ["open.mp4", "hevc.mp4", "uneven.mp4", "vp9.webm", "dense_keys.mp4"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("videos")


@pytest.fixture(scope="module")
def write(root):
    """Return a function that writes a sample once and gives its name."""

    def write_once(name: str) -> str:
        if not (root / name).exists():
            barcode.write_sample(root, BY_NAME[name])
        return name

    return write_once


def read_numbers(files: VideoFiles, video: str, indices, facts: VideoFacts | None = None) -> list[int]:
    facts = facts or files.probe(video)
    return barcode.numbers_of(files.read(video, np.asarray(indices, dtype=np.int64), facts).frames)


def check_random_access(files: VideoFiles, video: str, expected: list[int]) -> None:
    facts = files.probe(video)
    assert facts.frame_count == len(expected)
    rng = np.random.default_rng(0)
    draws = [np.arange(facts.frame_count), np.array([facts.frame_count - 1]), np.array([0])]
    draws += [np.sort(rng.choice(facts.frame_count, size, replace=False)) for size in (1, 1, 3, 8, 16)]
    draws += [first + np.arange(2) for first in rng.integers(facts.frame_count - 1, size=6)]
    for indices in draws:
        assert read_numbers(files, video, indices, facts) == [expected[i] for i in indices]


@pytest.mark.parametrize("name", BY_NAME)
def test_every_frame_asked_for_is_the_frame_given(root, write, name):
    sample = BY_NAME[name]
    facts = VideoFiles(root).probe(write(name))
    assert (facts.width, facts.height) == sample.size
    times = np.array([sample.pts(i) / 24 for i in range(sample.frames)])
    np.testing.assert_allclose(facts.times_seconds, times, atol=0.0011)  # WebM counts in milliseconds
    assert facts.times_seconds[0] == 0
    check_random_access(VideoFiles(root), name, list(range(sample.frames)))


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), name=st.sampled_from(SEEKING))
def test_any_set_of_indices_is_read_exactly(root, write, data, name):
    indices = sorted(data.draw(st.sets(st.integers(0, BY_NAME[name].frames - 1), min_size=1, max_size=12)))
    assert read_numbers(VideoFiles(root), write(name), indices) == indices


def test_packed_b_frames_are_counted_from_the_start(tmp_path):
    """The form of many old AVI files: time stamps name no frame, and decord and torchcodec go wrong."""
    path = barcode.write_packed(tmp_path)
    with open_video(path, Limits()) as (container, stream):
        assert index_packets(path, container, stream).counted
    check_random_access(VideoFiles(tmp_path), path.name, list(range(60)))


def test_a_hidden_reference_frame_is_not_a_frame(tmp_path):
    path = barcode.write_hidden(tmp_path, 40)
    files = VideoFiles(tmp_path)
    assert files.probe(path.name).decoder == "pyav"
    check_random_access(files, path.name, [i for i in range(100) if i != 40])


@pytest.mark.parametrize(
    ("codec", "data", "hidden"),
    [
        ("vp8", b"\x10\x00", False),
        ("vp8", b"\x00\x00", True),
        ("vp9", b"\x82\x00", False),  # shown
        ("vp9", b"\x80\x00", True),
        ("vp9", b"\x88\x00", False),  # shows an existing frame
        ("vp9", b"\x80\x00\xc0", False),  # superframe
        ("vp9", b"\xb0\x00", True),  # profile 3: one bit later
        ("vp9", b"\xb1\x00", False),
        ("h264", b"\x00\x00", False),
    ],
)
def test_hidden_packets_are_known_by_their_header_bits(codec, data, hidden):
    assert is_hidden(codec, data) == hidden


@pytest.mark.parametrize("cut", [30, 70])
def test_frames_before_an_edit_list_are_none(tmp_path, cut):
    """A trimmed MP4 holds frames that are decoded but not shown; the clock starts at the first shown one."""
    sample = barcode.x264("trimmed.mp4", barcode.LONG_GOP, pts=lambda i: i - cut)
    barcode.encode(tmp_path / sample.name, sample, container_options={"avoid_negative_ts": "disabled"})
    files = VideoFiles(tmp_path)
    assert files.probe(sample.name).times_seconds[0] == 0
    check_random_access(files, sample.name, list(range(cut, 100)))


@pytest.mark.parametrize("name", ["upright_left.mp4", "upside_down.mp4", "upright_right.mp4"])
def test_rotation_is_that_of_opencv(root, write, name):
    capture = cv2.VideoCapture(str(root / write(name)))
    _, expected = capture.read()
    files = VideoFiles(root)
    ours = files.read(name, np.array([0]), files.probe(name)).frames[0]
    assert ours.shape == expected.shape
    assert np.abs(ours.astype(int) - expected[..., ::-1]).mean() < 3


def test_a_mirrored_video_is_refused(tmp_path):
    path = tmp_path / "mirrored.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = barcode.WIDTH, barcode.HEIGHT, "yuv420p"
        stream.set_display_rotation(0, vflip=True)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(barcode.draw(1), format="rgb24")))
        container.mux(stream.encode())
    with pytest.raises(VideoError, match="quarter turn"):
        VideoFiles(tmp_path).probe(path.name)


@needs_decord
def test_the_barcodes_find_decord_wrong_where_the_table_avoids_it(root, write):
    """Otherwise all tests above might pass for any decoder."""
    import decord

    wrong = 0
    for name in ("open.mp4", "hevc.mp4"):
        reader = decord.VideoReader(str(root / write(name)), num_threads=1)
        for index in range(0, len(reader), 3):
            try:
                wrong += barcode.number_of(reader[index].asnumpy()) != index
            except ValueError:
                wrong += 1
    assert wrong > 0


@needs_decord
@pytest.mark.parametrize("name", ["vp8.webm", "vp9.webm", "vp9_odd_width.webm", "vp9_alt_ref.webm"])
def test_both_decoders_give_the_same_bits(root, write, name):
    table, pyav = VideoFiles(root), VideoFiles(root, force_pyav=True)
    facts, pyav_facts = table.probe(write(name)), pyav.probe(name)
    assert (facts.decoder, pyav_facts.decoder) == ("decord", "pyav")
    indices = np.array([0, 1, 33, 34, 99])
    np.testing.assert_array_equal(
        table.read(name, indices, facts).frames, pyav.read(name, indices, pyav_facts).frames
    )
    assert table.rules != pyav.rules


@needs_decord
def test_odd_heights_are_not_read_by_decord(root, write):
    """There it differs from libvpx, the reference decoder; PyAV does not."""
    files = VideoFiles(root)
    facts = files.probe(write("vp9_odd.webm"))
    assert facts.decoder == "pyav"
    with av.open(str(root / "vp9_odd.webm")) as container:
        reference = av.codec.CodecContext.create("libvpx-vp9", "r")
        packets = [packet for packet in container.demux(video=0) if packet.size]
        decoded = [frame for packet in [*packets, None] for frame in reference.decode(packet)]
    expected = np.stack([frame.to_ndarray(format="rgb24") for frame in decoded])
    np.testing.assert_array_equal(files.read("vp9_odd.webm", np.arange(100), facts).frames, expected)


def test_without_decord_the_rule_says_so(monkeypatch, root, write):
    path = root / write("vp9.webm")
    with open_video(path, Limits()) as (container, stream):
        index = index_packets(path, container, stream)
    monkeypatch.setattr(frames_module, "HAS_DECORD", False)
    assert choose_decoder(index, 128, 72) == "pyav"
    assert "decord" not in frames_module.PYAV_RULES


def refused(files: VideoFiles, video: str, match: str) -> str:
    with pytest.raises(VideoError, match=match) as caught:
        files.probe(video)
    assert str(files.root) not in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_mpeg_ts_is_refused_with_advice(tmp_path):
    barcode.write_sample(tmp_path, barcode.NOT_EXACT)
    refused(VideoFiles(tmp_path), barcode.NOT_EXACT.name, "remux it: ffmpeg")


def audio_only(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libopus", rate=48000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 960), dtype=np.int16), format="s16", layout="mono")
        frame.sample_rate = 48000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def no_frame(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.start_encoding()


NO_MOOV = b"\0\0\0\x08free\0\0\0\x10mdat12345678"
BAD_FILES = {
    "zero_bytes.webm": (lambda path: path.write_bytes(b""), "not a video"),
    "text.webm": (lambda path: path.write_text("label,video\n" * 100), "not a video"),
    "random.mp4": (lambda path: path.write_bytes(np.random.default_rng(0).bytes(5000)), "not a video"),
    "playlist.m3u8": (
        lambda path: path.write_text("#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n"),
        "not a video",
    ),
    "concat.txt": (lambda path: path.write_text("ffconcat version 1.0\nfile vp9.webm\n"), "not a video"),
    "picture.png": (lambda path: cv2.imwrite(str(path), np.zeros((8, 8, 3), np.uint8)), "not a video"),
    "audio.webm": (audio_only, "no video stream"),
    "no_frame.mp4": (no_frame, "."),
    "moov_missing.mp4": (
        lambda path: path.write_bytes(b"\0\0\0\x08free\0\0\0\x10mdat12345678"),
        "not a video",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_what_is_no_video_is_refused_with_a_reason(tmp_path, name):
    make, match = BAD_FILES[name]
    make(tmp_path / name)
    refused(VideoFiles(tmp_path), name, match)


@pytest.mark.parametrize("name", ["vp9.webm", "closed.mkv", "closed.mp4", "mpeg4.avi"])
def test_a_file_cut_anywhere_is_refused(root, write, tmp_path, name):
    data = (root / write(name)).read_bytes()
    assert not is_cut_short(root / name)
    for length in np.linspace(1, len(data) - 1, 25).astype(int):
        (tmp_path / name).write_bytes(data[:length])
        with pytest.raises(VideoError):
            VideoFiles(tmp_path).probe(name)


def test_a_truncated_webm_without_sizes_is_known_by_its_duration(root, write, tmp_path):
    """Every decoder returns the frames that are left, in silence."""
    data = bytearray((root / write("vp9.webm")).read_bytes())
    at = data.index(b"\x18\x53\x80\x67") + 4
    data[at : at + 8] = b"\x01" + b"\xff" * 7  # an unknown size, as live recordings have
    path = tmp_path / "live.webm"
    path.write_bytes(data)
    assert VideoFiles(tmp_path).probe(path.name).frame_count == 100
    path.write_bytes(data[: len(data) // 3])
    assert not is_cut_short(path)
    refused(VideoFiles(tmp_path), path.name, "truncated: the header says 4.1")


def test_a_packet_lost_from_the_middle_is_noticed(root, write, tmp_path):
    data = bytearray((root / write("mpeg4.avi")).read_bytes())
    at = data.index(b"00dc", len(data) // 2)
    data[at : at + 4] = b"JUNK"
    (tmp_path / "lost.avi").write_bytes(data)
    refused(VideoFiles(tmp_path), "lost.avi", "damaged: 99 of the 100 packets")


def test_a_video_cut_before_its_first_key_frame_is_refused(root, write, tmp_path):
    path = tmp_path / "headless.mkv"
    with av.open(str(root / write("closed.mkv"))) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in list(old.demux(video=0))[5:-1]:
            packet.stream = stream
            new.mux(packet)
    refused(VideoFiles(tmp_path), path.name, "does not begin with a key frame")


def test_undecodable_frames_fail_loudly_and_others_are_right(root, write, tmp_path):
    def spoil(packets):
        return [b"\xff" * len(data) if 70 <= i < 80 else data for i, data in enumerate(packets)]

    barcode.rewrite(root / write("closed.mp4"), tmp_path / "spoilt.mp4", spoil)
    files = VideoFiles(tmp_path)
    facts = files.probe("spoilt.mp4")
    assert read_numbers(files, "spoilt.mp4", [0, 30, 59], facts) == [0, 30, 59]
    with pytest.raises(VideoError):
        files.read("spoilt.mp4", np.arange(60, 100), facts)


def test_large_frames_are_refused_before_one_is_decoded(root, write, monkeypatch):
    def never(*_):
        raise AssertionError("decoded")

    monkeypatch.setattr(frames_module, "PyavDecoder", never)
    pixels = barcode.WIDTH * barcode.HEIGHT
    refused(VideoFiles(root, Limits(max_pixels=pixels - 1)), write("vp9.webm"), "128 x 72 pixels; the")
    refused(VideoFiles(root, Limits(max_duration_seconds=4)), write("vp9_odd.webm"), "the limit is 4 s")
    refused(VideoFiles(root, Limits(max_duration_seconds=4)), write("closed.mp4"), "the limit is 4 s")
    with pytest.raises(AssertionError, match="decoded"):
        VideoFiles(root, Limits(max_pixels=pixels, max_duration_seconds=4.2)).probe("vp9.webm")


def test_a_header_that_lies_about_size_does_not_pass_the_limit(root, write, tmp_path):
    """The pixels of the coded frames count, not those that the container claims."""
    data = (root / write("vp9.webm")).read_bytes()
    claim = b"\xb0\x81\x80\xba\x81\x48"  # PixelWidth 128, PixelHeight 72
    assert data.count(claim) == 1
    (tmp_path / "small.webm").write_bytes(data.replace(claim, b"\xb0\x81\x10\xba\x81\x10"))
    with pytest.raises(VideoError):
        VideoFiles(tmp_path, Limits(max_pixels=16 * 16)).probe("small.webm")


@pytest.mark.parametrize("bad", [{"max_pixels": 0}, {"max_duration_seconds": -1}, {"clip_timeout_seconds": 0}])
def test_limits_must_be_positive(bad):
    with pytest.raises(ValueError, match="positive"):
        Limits(**bad)


def test_paths_stay_in_the_root(root, write, tmp_path):
    inner = tmp_path / "root"
    (inner / "folder").mkdir(parents=True)
    (inner / "folder" / "in.webm").write_bytes((root / write("vp9.webm")).read_bytes())
    (inner / "alias.webm").symlink_to("folder/in.webm")
    (tmp_path / "root_alias").symlink_to(inner)
    for files in (VideoFiles(inner), VideoFiles(tmp_path / "root_alias")):
        assert files.probe("alias.webm").frame_count == 100
        for video in ("../root_sibling/x.webm", str(root / "vp9.webm")):
            with pytest.raises(VideoError, match="out of the video root"):
                files.probe(video)
        for video in ("none.webm", "folder", "folder/none.webm"):
            with pytest.raises(VideoError, match=f"^video not found: {video}$"):
                files.probe(video)


STRANGER = 54321


@pytest.mark.parametrize("kind", ["file", "folder", "chain"])
@pytest.mark.parametrize(("links", "owner", "follows"), [
    ("own", "me", True), ("own", "stranger", False), ("own", "stranger's file", True),
    ("allow", "stranger", True), ("refuse", "me", False),
])  # fmt: skip
def test_links_out_of_the_root_are_followed_where_their_owner_may(
    root, write, tmp_path, kind, links, owner, follows
):
    store, inner = tmp_path / "store", tmp_path / "root"
    store.mkdir()
    inner.mkdir()
    data = (root / write("vp9.webm")).read_bytes()
    (store / "5f2a.webm").write_bytes(data)
    if kind == "folder":
        link, video = inner / "linked", "linked/5f2a.webm"
        link.symlink_to(store)
    else:
        link, video = inner / "clip.webm", "clip.webm"
        (store / "latest").symlink_to("5f2a.webm")
        link.symlink_to(store / ("latest" if kind == "chain" else "5f2a.webm"))
    if owner != "me":
        try:
            os.lchown(link, STRANGER, -1)
            if owner == "stranger's file":
                os.chown(store / "5f2a.webm", STRANGER, -1)
        except PermissionError:
            pytest.skip("only root can give files away")
    files = VideoFiles(inner, links=links)
    if follows:
        assert files.probe(video).frame_count == 100
    else:
        with pytest.raises(VideoError, match=r"a link leads out of the video root.*; data.links=allow follows it"):
            files.probe(video)


def test_a_link_that_leads_nowhere_or_to_itself_is_no_video(tmp_path):
    (tmp_path / "a.webm").symlink_to("gone.webm")
    (tmp_path / "b.webm").symlink_to("b.webm")
    for video in ("a.webm", "b.webm", "x" * 300, "a.webm/b.webm"):
        with pytest.raises(VideoError, match=f"^video not found: {video}$"):
            VideoFiles(tmp_path).probe(video)


FAULTS = (
    "EACCES",
    "EPERM",
    "ESTALE",
    "ETIMEDOUT",
    "EIO",
    "ENOMEM",
    "EHOSTDOWN",
    "EHOSTUNREACH",
    "ENOTCONN",
    "EMFILE",
)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_the_system_cannot_look_at_is_the_machines_fault(root, write, monkeypatch, fault):
    """No file system here can be made to fail so, so `stat` is told to."""
    name, stat = write("vp9.webm"), os.stat

    def failing(path, **options):
        if str(path).endswith(name):
            raise OSError(getattr(errno, fault), os.strerror(getattr(errno, fault)))
        return stat(path, **options)

    files = VideoFiles(root)
    facts = files.probe(name)
    monkeypatch.setattr(os, "stat", failing)
    for method in (files.stamp, files.probe, lambda video: files.read(video, np.array([3]), facts)):
        with pytest.raises(StorageError, match=f"{name}: {os.strerror(getattr(errno, fault))}; nothing was lost"):
            method(name)


def test_a_file_whose_bytes_cannot_be_read_is_the_machines_fault(tmp_path):
    """The memory of a process is a regular file that gives EIO."""
    (tmp_path / "broken_disk.webm").symlink_to("/proc/self/mem")
    with pytest.raises(StorageError, match=r"cannot read /proc/\d+/mem: Input/output error"):
        VideoFiles(tmp_path).probe("broken_disk.webm")


def test_a_name_with_a_zero_byte_is_refused(tmp_path):
    refused(VideoFiles(tmp_path), "a\0b.webm", "zero byte")


def test_an_unknown_codec_is_refused(root, write, tmp_path):
    data = (root / write("closed.mp4")).read_bytes()
    (tmp_path / "unknown.mp4").write_bytes(data.replace(b"avc1", b"zzzz"))
    refused(VideoFiles(tmp_path), "unknown.mp4", r"codec is not known|no frame size")


def test_a_named_pipe_is_no_video(tmp_path):
    os.mkfifo(tmp_path / "pipe.webm")
    refused(VideoFiles(tmp_path), "pipe.webm", "video not found")


@pytest.mark.parametrize("name", ["vp9.webm", "closed.mp4"])
def test_a_file_changed_since_the_probe_is_noticed(root, write, tmp_path, name):
    path = tmp_path / name
    path.write_bytes((root / write(name)).read_bytes())
    files = VideoFiles(tmp_path)
    facts = files.probe(name)
    barcode.encode(path, BY_NAME[name], first=7)
    with pytest.raises(VideoError, match="has changed since it was probed"):
        files.read(name, np.array([3]), facts)
    assert read_numbers(files, name, [3], files.probe(name)) == [10]
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(VideoError, match=r"truncated|not a video"):
        files.read(name, np.array([3]), facts)
    path.unlink()
    with pytest.raises(StorageError, match=r"video not found: .*, though it was there before, below"):
        files.read(name, np.array([3]), facts)


def test_identity_is_of_the_content(root, write, tmp_path):
    (tmp_path / "copy.webm").write_bytes((root / write("vp9.webm")).read_bytes())
    files = VideoFiles(root)
    assert VideoFiles(tmp_path).probe("copy.webm").identity == files.probe("vp9.webm").identity
    assert files.probe(write("vp8.webm")).identity != files.probe("vp9.webm").identity


@pytest.mark.parametrize("indices", [[], [-1, 0], [100], [3, 3], [4, 3]])
def test_indices_out_of_order_or_range_are_a_bug(root, write, indices):
    files = VideoFiles(root)
    with pytest.raises(ValueError, match="frame indices"):
        files.read(write("vp9.webm"), np.array(indices, dtype=np.int64), files.probe("vp9.webm"))


def facts_of(times) -> VideoFacts:
    return VideoFacts(64, 48, np.asarray(times, dtype=np.float64), "pyav", "x")


def clip(start: float = 0.0, end: float | None = None) -> Clip:
    return Clip("c", "v.webm", "train", {}, start_seconds=start, end_seconds=end)


@pytest.mark.parametrize(
    ("start", "end", "first", "count"),
    [
        (0, None, 0, 10),
        (0, 1.0, 0, 10),
        (0, 0.1, 0, 1),  # the end is exclusive
        (0.1, 0.3, 1, 2),  # the start is not
        (0.11, 0.31, 2, 2),
        (0.9, None, 9, 1),
        (0.5, 1.09, 5, 5),  # rounded annotations may end a frame late
    ],
)
def test_a_clip_holds_the_frames_of_its_segment(start, end, first, count):
    found = clip_facts(clip(start, end), facts_of(np.arange(10) / 10))
    assert (found.first_frame, found.frame_count, found.width, found.height) == (first, count, 64, 48)


@pytest.mark.parametrize(
    ("start", "end", "match"),
    [
        (0, 1.2, r"ends at 1.2 s, the video at 1.000 s"),
        (0.91, None, "no frame from 0.91 s"),
        (0.41, 0.49, "no frame from 0.41 s to 0.49 s"),
        (5, None, "no frame"),
    ],
)
def test_a_segment_without_frames_or_past_the_end_is_refused(start, end, match):
    with pytest.raises(VideoError, match=match):
        clip_facts(clip(start, end), facts_of(np.arange(10) / 10))


def test_a_video_of_one_frame_is_a_clip():
    assert clip_facts(clip(), facts_of([0.0])).frame_count == 1
    assert clip_facts(clip(0, 1.0), facts_of([0.0])).frame_count == 1


@settings(deadline=None)
@given(
    steps=st.lists(st.floats(0.01, 1), min_size=1, max_size=30),
    start=st.floats(0, 10),
    length=st.floats(0.01, 10),
)
def test_clip_frames_are_those_within_the_segment(steps, start, length):
    times = np.concatenate([[0.0], np.cumsum(steps)])
    inside = np.flatnonzero((times >= start) & (times < start + length))
    try:
        found = clip_facts(clip(start, start + length), facts_of(times))
    except VideoError:
        assert not len(inside) or start + length > times[-1]
    else:
        assert inside.tolist() == list(range(found.first_frame, found.first_frame + found.frame_count))


def test_a_one_frame_video_is_read_once(tmp_path):
    sample = barcode.x264("one.mp4", barcode.LONG_GOP, frames=1)
    barcode.write_sample(tmp_path, sample)
    assert read_numbers(VideoFiles(tmp_path), sample.name, [0]) == [0]
    assert VideoFiles(tmp_path).probe(sample.name).frame_count == 1


def real_videos() -> list[Path]:
    folders = (DATA / "something_something", DATA / "videos")
    endings = {".webm", ".mkv", ".mp4", ".avi"}
    return sorted(path for folder in folders for path in folder.glob("*") if path.suffix in endings)


@needs_data
@pytest.mark.parametrize("path", real_videos(), ids=lambda path: path.name)
def test_real_videos_random_access_equals_decoding_in_order(path):
    with av.open(str(path)) as container:
        expected = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    files = VideoFiles(path.parent)
    facts = files.probe(path.name)
    assert facts.frame_count == len(expected)
    rng = np.random.default_rng(0)
    order = rng.permutation(facts.frame_count)[:40]
    for indices in [np.sort(part) for part in np.array_split(order, 8) if len(part)]:
        given_frames = files.read(path.name, indices, facts)
        for index, frame in zip(indices, given_frames.frames, strict=True):
            np.testing.assert_array_equal(frame, expected[index])
        np.testing.assert_array_equal(given_frames.times_seconds, facts.times_seconds[indices])
