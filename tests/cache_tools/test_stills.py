"""Frames that are pictures: each layout against the pictures that were put into it, and what is wrong with one."""

import io
import os
import pickle
import shutil
import struct
import tarfile
import zlib

import cv2
import h5py
import numpy as np
import pytest

from mmkd.cache_tools.frames.data_frames import WITH_STILLS, DataFrames, decoder_rules, open_data_frames
from mmkd.cache_tools.frames.packets import Limits
from mmkd.cache_tools.frames.probe import probe_all
from mmkd.cache_tools.frames.source import DECODER_RULES, DEFAULT_LIMITS, VideoFiles
from mmkd.cache_tools.frames.still_files import BLOCK_BYTES, in_order
from mmkd.cache_tools.frames.stills import decode_still, still_size
from mmkd.data_manifests.errors import InputError, StorageError, VideoError
from mmkd.data_manifests.manifest import FrameRate
from tests.helpers.barcode_videos import EXACT, write_sample

COUNT, HEIGHT, WIDTH, FPS = 12, 48, 64, 50.0
RATES = (FrameRate("*", FPS),)


def picture(number):
    """A picture that shows its number, smooth enough to survive JPEG."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    return np.stack([rows * 3 + 5 * number, columns * 2, 20 * number + 0 * rows], -1).clip(0, 255).astype(np.uint8)


def encoded(number, suffix=".jpg", quality=90):
    options = [cv2.IMWRITE_JPEG_QUALITY, quality] if suffix == ".jpg" else []
    return cv2.imencode(suffix, picture(number)[..., ::-1], options)[1].tobytes()


FRAMES = [encoded(number) for number in range(COUNT)]


def folder(root, name="P01/rgb_frames/P01_101", pattern="frame_{:010d}.jpg", first=1, frames=FRAMES):
    place = root / name
    place.mkdir(parents=True)
    for number, data in enumerate(frames, first):
        (place / pattern.format(number)).write_bytes(data)
    return name


def tar(root, name="P01/rgb_frames/P01_101.tar", pattern="./frame_{:010d}.jpg", frames=FRAMES, mode="w"):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for number, data in enumerate(frames, 1):
            member = tarfile.TarInfo(pattern.format(number))
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return name


BYTES = {
    "vlen uint8": lambda file, name: vlen(
        file, name, h5py.vlen_dtype(np.uint8), lambda d: np.frombuffer(d, np.uint8)
    ),
    "fixed length": lambda file, name: file.create_dataset(name, data=np.array(FRAMES)),
    "opaque": lambda file, name: opaque(file, name),
}


def vlen(file, name, dtype, convert):
    dataset = file.create_dataset(name, (COUNT,), dtype=dtype)
    for number, data in enumerate(FRAMES):
        dataset[number] = convert(data)


def opaque(file, name):
    size = max(map(len, FRAMES))
    file[name] = np.array([np.void(data.ljust(size, b"\0")) for data in FRAMES])


def one_level(root, form):
    with h5py.File(root / "frames.h5", "w") as file:
        BYTES[form](file, "74225")
    return "74225.webm"


def two_level(root):
    with h5py.File(root / "frames.h5", "w") as file:
        for number, data in enumerate(FRAMES):
            file[f"P01_11/P01_11_0/{number}"] = np.frombuffer(data, np.uint8)
    return "P01_11/P01_11_0"


LAYOUTS = {
    "folder": folder,
    "folder from 0": lambda root: folder(root, "74225", "{:05d}.jpg", 0),
    "folder of PNG": lambda root: folder(
        root, "74225", "img_{:05d}.png", 1, [encoded(n, ".png") for n in range(COUNT)]
    ),
    "tar": tar,
    "HDF5 of arrays": lambda root: one_level(root, "vlen uint8"),
    "HDF5 of strings": lambda root: one_level(root, "fixed length"),
    "HDF5 of opaque values": lambda root: one_level(root, "opaque"),
    "HDF5 of groups": two_level,
}


def source_of(root, rates=RATES, limits=DEFAULT_LIMITS):
    file = root / "frames.h5"
    return open_data_frames(file if file.is_file() else root, limits, "own", rates)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_pictures_at_their_times(tmp_path, layout):
    video = LAYOUTS[layout](tmp_path)
    source = pickle.loads(pickle.dumps(source_of(tmp_path)))
    facts = source.probe(video)
    assert (facts.width, facts.height, facts.frame_count) == (WIDTH, HEIGHT, COUNT)
    np.testing.assert_allclose(facts.times_seconds, np.arange(COUNT) / FPS)
    indices = np.array([0, 3, 7, COUNT - 1])
    found = source.read(video, indices, facts)
    suffix = ".png" if "PNG" in layout else ".jpg"
    for frame, index in zip(found.frames, indices.tolist(), strict=True):
        bgr = cv2.imdecode(np.frombuffer(encoded(index, suffix), np.uint8), cv2.IMREAD_COLOR)
        np.testing.assert_array_equal(frame, cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB))
        assert np.abs(frame.astype(int) - picture(index)).mean() < 3
    streamed = list(source.stream(video, indices, facts))
    np.testing.assert_array_equal(np.stack(streamed), found.frames)
    assert decoder_rules([facts]) == WITH_STILLS != DECODER_RULES


def test_a_video_of_which_only_frames_are_there_is_found_by_its_name(tmp_path):
    folder(tmp_path, "74225")
    tar(tmp_path, "80962.tar")
    source = source_of(tmp_path)
    assert source.probe("74225.webm").decoder == "stills folder"
    assert source.probe("80962.webm").decoder == "stills tar"
    with pytest.raises(VideoError, match=r"video not found: 1\.webm"):
        source.probe("1.webm")


def test_the_identity_is_the_pictures_and_never_the_path(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    folder(one, "a"), folder(other, "deep/b")
    first = source_of(one).probe("a").identity
    assert source_of(other).probe("deep/b").identity == first
    folder(tmp_path / "again", "a", frames=[encoded(number, quality=80) for number in range(COUNT)])
    assert source_of(tmp_path / "again").probe("a").identity != first


def test_a_folder_that_changes_after_the_probe_is_noticed(tmp_path):
    video = folder(tmp_path)
    source = source_of(tmp_path)
    facts = source.probe(video)
    for number in range(COUNT):
        (tmp_path / video / f"frame_{number + 1:010d}.jpg").write_bytes(encoded(number, quality=50))
    with pytest.raises(VideoError, match="has changed since it was probed"):
        source.read(video, np.array([0]), facts)
    shutil.rmtree(tmp_path / video)
    with pytest.raises(StorageError, match="though it was there before"):
        source.read(video, np.array([0]), facts)


def test_a_rate_has_to_be_stated_and_the_first_pattern_counts(tmp_path):
    video = folder(tmp_path)
    with pytest.raises(VideoError, match="state their rate in the manifest"):
        source_of(tmp_path, ()).probe(video)
    rates = (FrameRate("*/P??_1??", 50.0), FrameRate("*", 60.0))
    assert source_of(tmp_path, rates).probe(video).times_seconds[1] == 1 / 50
    other = folder(tmp_path, "P01/rgb_frames/P01_11")
    assert source_of(tmp_path, rates).probe(other).times_seconds[1] == 1 / 60


def test_official_frame_numbers_are_the_times_of_the_nominal_rate(tmp_path):
    """EPIC's row P01_11_1: start 1.56 s is frame 93 or 94 of a folder that counts from 1 at 60 frames a second."""
    video = folder(tmp_path, "P01/rgb_frames/P01_11", frames=FRAMES * 10)
    facts = source_of(tmp_path, (FrameRate("*", 60.0),)).probe(video)
    assert abs(int(np.searchsorted(facts.times_seconds, 1.56)) + 1 - 93) <= 2


def test_facts_are_kept_and_probed_again_when_frames_come(tmp_path):
    video = folder(tmp_path / "data")
    source = source_of(tmp_path / "data")
    store = tmp_path / "facts"
    found = probe_all(source, [video], store=store, workers=0)[video]
    assert found.frame_count == COUNT
    assert probe_all(source, [video], store=store, workers=0)[video].identity == found.identity
    (tmp_path / "data" / video / f"frame_{COUNT + 1:010d}.jpg").write_bytes(encoded(COUNT))
    assert probe_all(source, [video], store=store, workers=0)[video].frame_count == COUNT + 1
    other = source_of(tmp_path / "data", (FrameRate("*", 10.0),))
    assert probe_all(other, [video], store=store, workers=0)[video].times_seconds[1] == 0.1


def test_a_lost_folder_is_the_machine_s_fault(tmp_path):
    video = folder(tmp_path / "data")
    store = tmp_path / "facts"
    probe_all(source_of(tmp_path / "data"), [video], store=store, workers=0)
    shutil.rmtree(tmp_path / "data" / "P01")
    with pytest.raises(StorageError, match="is its disk mounted"):
        probe_all(source_of(tmp_path / "data"), [video], store=store, workers=0)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["frame_1.jpg", "frame_3.jpg"], "a frame is missing before frame_3.jpg"),
        (["frame_7.jpg", "frame_8.jpg"], "its first frame is frame_7.jpg"),
        (["a_1.jpg", "b_2.jpg"], "frames of several kinds"),
        (["frame_1.jpg", "frame_01.jpg"], "frame 1 is there twice"),
        (["notes.txt"], "no frame"),
        ([], "no frame"),
    ],
)
def test_frames_that_are_not_one_sequence_are_refused(names, message):
    with pytest.raises(VideoError, match=message):
        in_order(names)


def test_hidden_and_other_files_are_passed_over():
    assert in_order(["._frame_1.jpg", "frame_2.jpg", ".done", "frame_1.jpg", "list.txt"]) == [
        "frame_1.jpg",
        "frame_2.jpg",
    ]


def huge_header():
    data = bytearray(encoded(0))
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = struct.pack(">HH", 60000, 60000)
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (FRAMES[4][: len(FRAMES[4]) // 2], "frame_0000000005.jpg: it is cut short"),
        (b"not a picture", "frame_0000000005.jpg: it is neither a JPEG nor a PNG"),
        (b"", "neither a JPEG nor a PNG"),
        (huge_header(), "60000 x 60000 pixels; the limit is"),
        (cv2.imencode(".jpg", np.zeros((20, 20, 3), np.uint8))[1].tobytes(), "is 20 x 20, the first is 64 x 48"),
    ],
)
def test_a_damaged_frame_is_named(tmp_path, data, message):
    video = folder(tmp_path)
    (tmp_path / video / "frame_0000000005.jpg").write_bytes(data)
    source = source_of(tmp_path)
    facts = source.probe(video)
    with pytest.raises(VideoError, match=message):
        source.read(video, np.array([4]), facts)
    source.read(video, np.array([3]), facts)


def test_padding_behind_a_picture_is_allowed_and_grey_is_rgb():
    np.testing.assert_array_equal(decode_still(FRAMES[0] + b"\0" * 5, Limits()), decode_still(FRAMES[0], Limits()))
    grey = cv2.imencode(".jpg", picture(3)[..., 0])[1].tobytes()
    found = decode_still(grey, Limits())
    assert found.shape == (HEIGHT, WIDTH, 3)
    assert (found[..., 0] == found[..., 2]).all()
    assert (still_size(grey).width, still_size(grey).height) == (WIDTH, HEIGHT)


@pytest.mark.parametrize("tool", ["w:gz", "w:xz", "w:bz2"])
def test_a_compressed_archive_says_how_to_unpack_it(tmp_path, tool):
    video = tar(tmp_path, mode=tool)
    with pytest.raises(VideoError, match="the archive is compressed; unpack it first: "):
        source_of(tmp_path).probe(video)


def test_an_archive_that_is_cut_or_damaged_in_the_middle_is_refused_at_every_place(tmp_path):
    """tarfile takes a damaged header for the end of the archive, and half of the frames would be gone in
    silence."""
    video = tar(tmp_path)
    path = tmp_path / video
    whole = path.read_bytes()
    facts = source_of(tmp_path).probe(video)
    ends = list(range(512, len(whole), 512))
    for place in [*ends[:: max(1, len(ends) // 12)], len(whole) - 700]:
        path.write_bytes(whole[:place])
        try:
            found = source_of(tmp_path).probe(video)
        except VideoError:
            continue
        assert found.identity == facts.identity, place  # only the empty blocks at the end are gone
    header = whole.index(b"./frame_0000000006.jpg")
    path.write_bytes(whole[: header + 3] + b"\xff" + whole[header + 4 :])
    with pytest.raises(VideoError, match="cut short, or one of its headers is damaged"):
        source_of(tmp_path).probe(video)


def test_an_archive_leads_nowhere_out_of_itself(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name, kind, target in (
            ("frame_1.jpg", tarfile.SYMTYPE, "/etc/passwd"),
            ("frame_2.jpg", tarfile.LNKTYPE, "/etc/passwd"),
            ("frame_3.jpg", tarfile.CHRTYPE, ""),
            ("../frame_1.jpg", tarfile.REGTYPE, ""),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            member.size = len(FRAMES[0]) if kind == tarfile.REGTYPE else 0
            archive.addfile(member, io.BytesIO(FRAMES[0]) if member.size else None)
    facts = source_of(tmp_path).probe("a.tar")
    assert facts.frame_count == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


def test_a_pipe_in_the_place_of_a_frame_does_not_hang(tmp_path):
    video = folder(tmp_path)
    place = tmp_path / video / "frame_0000000002.jpg"
    source = source_of(tmp_path)
    facts = source.probe(video)
    place.unlink()
    os.mkfifo(place)
    with pytest.raises((VideoError, StorageError)):
        source.read(video, np.array([1]), facts)


def test_hdf5_links_that_lead_out_are_refused(tmp_path):
    two_level(tmp_path / "." if (tmp_path / ".").exists() else tmp_path)
    (tmp_path / "frames.h5").rename(tmp_path / "other.h5")
    with h5py.File(tmp_path / "frames.h5", "w") as file:
        file["P01_11"] = h5py.ExternalLink("other.h5", "/P01_11")
        file.create_group("P01_12/P01_12_0")
        file["P01_12/P01_12_0/0"] = h5py.ExternalLink("other.h5", "/P01_11/P01_11_0/0")
        file["text"] = "hello"
        file["gap/0"], file["gap/2"] = b"x", b"y"
    source = source_of(tmp_path)
    for video, message in (
        ("P01_11/P01_11_0", "is a link"),
        ("P01_12/P01_12_0", "is a link"),
        ("text", "is no list of pictures"),
        ("gap", "holds no frames named 0, 1, 2"),
        ("absent", "video not found: absent"),
    ):
        with pytest.raises(VideoError, match=message):
            source.probe(video)


def test_stored_times_and_checksums_of_a_packed_file_are_used(tmp_path):
    one_level(tmp_path, "vlen uint8")
    times = np.arange(COUNT) * 0.04 + 0.5
    with h5py.File(tmp_path / "frames.h5", "r+") as file:
        file.move("74225", "pictures")
        file.move("pictures", "74225/frames")
        file["74225/times_seconds"] = times
        file["74225/crc32"] = np.array([zlib.crc32(data) for data in FRAMES], np.uint32)
    source = source_of(tmp_path, ())
    facts = source.probe("74225.webm")
    np.testing.assert_array_equal(facts.times_seconds, times)
    shutil.copytree(tmp_path, tmp_path / "other", ignore=shutil.ignore_patterns("other"))
    with h5py.File(tmp_path / "other" / "frames.h5", "r+") as file:
        file["74225/frames"][5] = np.frombuffer(FRAMES[4], np.uint8)
    damaged = source_of(tmp_path / "other", ())
    with pytest.raises(VideoError, match="frame 5 is damaged: its checksum differs"):
        damaged.probe("74225.webm")


def test_nothing_in_an_hdf5_file_leads_out_of_it_or_claims_more_than_memory(tmp_path):
    """A frame, or the times, stored in another file, put together from one, or of petabytes."""
    one_level(tmp_path, "vlen uint8")
    secret = np.frombuffer(FRAMES[0], np.uint8)
    (tmp_path / "secret.jpg").write_bytes(secret)
    (tmp_path / "times").write_bytes(np.arange(COUNT, dtype=float))
    with h5py.File(tmp_path / "virtual.h5", "w") as file:
        file["a"] = secret
    elsewhere = h5py.VirtualLayout(secret.shape, np.uint8)
    elsewhere[:] = h5py.VirtualSource(tmp_path / "virtual.h5", "a", secret.shape)
    with h5py.File(tmp_path / "frames.h5", "r+") as file:
        for name, part in (("times", "times_seconds"), ("claims", "times_seconds"), ("sums", "crc32")):
            file.copy("74225", f"{name}/frames")
            external = (
                {"external": [(tmp_path / "times", 0, 8 * COUNT)]} if name != "claims" else {"chunks": (1024,)}
            )
            shape = (2**45,) if name == "claims" else (COUNT,)
            file[name].create_dataset(part, shape, "f8" if name != "sums" else "u4", **external)
        at = [(tmp_path / "secret.jpg", 0, len(secret))]
        file.create_dataset("external/0", secret.shape, np.uint8, external=at)
        file.create_group("virtual").create_virtual_dataset("0", elsewhere)
        file.create_dataset("huge/0", (2**45,), np.uint8, chunks=(2**16,))
        file.create_dataset("many", (2**45,), h5py.vlen_dtype(np.uint8), chunks=(2**10,))
        file["nothing/0"] = h5py.Empty("u1")
    source = source_of(tmp_path)
    for video, message in (
        ("times", "times_seconds is no list of numbers in the file itself"),
        ("claims", "times_seconds is no list of numbers in the file itself, one for each frame"),
        ("sums", "crc32 is no list of numbers in the file itself"),
        ("external", "0 is no picture that lies in the file itself"),
        ("virtual", "0 is no picture that lies in the file itself"),
        ("huge", f"0 takes {2**45} bytes"),
        ("many", "is no list of pictures"),
        ("nothing", "frame 0 cannot be read"),
    ):
        with pytest.raises(VideoError, match=message):
            source.probe(video)


@pytest.mark.parametrize("size", [-1, -BLOCK_BYTES, -2 * BLOCK_BYTES])
def test_a_header_that_points_back_ends_the_archive(tmp_path, size):
    good, bad = tarfile.TarInfo("1.jpg"), tarfile.TarInfo("2.jpg")
    good.size = len(FRAMES[0])
    header = bytearray(bad.tobuf(tarfile.USTAR_FORMAT))
    header[124:136] = b"\xff" + (256**11 + size).to_bytes(11, "big")  # base 256, as GNU tar writes large sizes
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    padding = b"\0" * (-len(FRAMES[0]) % BLOCK_BYTES)
    data = good.tobuf(tarfile.USTAR_FORMAT) + FRAMES[0] + padding + header + b"\0" * 2 * BLOCK_BYTES
    (tmp_path / "v.tar").write_bytes(data)
    with pytest.raises(VideoError, match=f"the header of 2.jpg is damaged: its size is {size}"):
        source_of(tmp_path).probe("v.tar")


def test_pictures_encoded_again_in_their_folder_are_noticed_and_can_be_probed(tmp_path):
    name = folder(tmp_path)
    source = source_of(tmp_path)
    facts, stamp = source.probe(name), source.stamp(name)
    for number, path in enumerate(sorted((tmp_path / name).iterdir())):
        path.write_bytes(encoded(number, quality=30))
    with pytest.raises(VideoError, match=f"changed since it was probed; `touch {tmp_path / name}`, and run"):
        source.read(name, np.array([0]), facts)
    os.utime(tmp_path / name)
    assert source.stamp(name) != stamp
    source.read(name, np.array([0]), source.probe(name))


def test_what_is_no_folder_and_no_hdf5_file(tmp_path):
    with pytest.raises(InputError, match="does not exist; give it with --videos"):
        source_of(tmp_path / "nowhere")
    (tmp_path / "frames.h5").write_bytes(b"text")
    with pytest.raises(InputError, match=r"frames\.h5 is no HDF5 file, or a damaged one; --videos names"):
        source_of(tmp_path)


def test_video_files_are_read_as_before(tmp_path):
    sample = next(own for own in EXACT if own.name == "closed.mp4")
    write_sample(tmp_path, sample)
    ours, theirs = DataFrames(tmp_path), VideoFiles(tmp_path)
    assert ours.stamp(sample.name) == theirs.stamp(sample.name)
    facts = ours.probe(sample.name)
    assert facts.identity == theirs.probe(sample.name).identity
    indices = np.array([0, 17, 63])
    np.testing.assert_array_equal(
        ours.read(sample.name, indices, facts).frames, theirs.read(sample.name, indices, facts).frames
    )
