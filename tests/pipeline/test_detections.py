"""Detections of others, their table, and what the boxes expert sees of it."""

import json
import os
import pickle
import signal
import struct
import zlib

import h5py
import numpy as np
import pytest

from mmkd.data_manifests.errors import InputError, InterruptedByUserError, VerificationError, VideoError
from mmkd.pipeline.detections import table_writer
from mmkd.pipeline.detections.epic_hand_objects import Thresholds, nominal_fps, read_epic_video
from mmkd.pipeline.detections.pickled_bytes import read_pickled_bytes
from mmkd.pipeline.detections.records import VideoDetections
from mmkd.pipeline.detections.table import DetectionTable
from mmkd.pipeline.detections.table_writer import write_table
from mmkd.pipeline.detections.wire import parse_message
from mmkd.pipeline.inputs.boxes import boxes_at, load_boxes
from tests.helpers.in_process import call, call_ok, refused

BOXES = ("mmkd-cache", "boxes", "--form", "epic-hand-objects")
# Bytes worked out by hand from the format's description: key = number * 8 + wire type, floats little-endian.
BOX = b"\x0a\x14\x0d\x00\x00\x80\x3e\x15\x00\x00\x00\x3f\x1d\x00\x00\x00\x3f\x25\x00\x00\x80\x3f"
"""Field 1, 20 bytes: left .25, top .5, right .5, bottom 1."""
SCORE = b"\x15\x00\x00\x40\x3f"
"""Field 2: .75."""
HAND = BOX + SCORE + b"\x18\x03\x28\x01"
"""State 3 (a portable object), side 1 (right)."""
FRAME = (
    b"\x0a\x06P01_01\x10\xac\x02\x1a"
    + bytes([len(HAND)])
    + HAND
    + b"\x22"
    + bytes([len(BOX + SCORE)])
    + BOX
    + SCORE
)
"""Frame 300 (a varint of two bytes) of P01_01 with a hand and an object."""


def part(number, data):
    assert len(data) < 128
    return bytes([number * 8 + 2, len(data)]) + data


def box(*corners):
    return part(1, b"".join(bytes([8 * i + 5]) + struct.pack("<f", v) for i, v in enumerate(corners, 1)))


def thing(*corners, score):
    return part(4, box(*corners) + b"\x15" + struct.pack("<f", score))


def hand(*corners, score, facts=b""):
    return part(3, box(*corners) + b"\x15" + struct.pack("<f", score) + facts)


def frame(number, *parts, video=b"P01_01"):
    return part(1, video) + bytes([16, number]) + b"".join(parts)


@pytest.fixture
def pickled(tmp_path):
    def write(value, name="P01_01.pkl", protocol=4):
        (tmp_path / name).write_bytes(pickle.dumps(value, protocol=protocol))
        return tmp_path / name

    return write


def read(path, **options):
    return read_epic_video(path, **{"fps": None, "thresholds": Thresholds()} | options)


def test_a_message_written_out_by_hand_is_read(pickled):
    found = read(pickled([FRAME]))
    assert found.video == "P01_01"
    assert found.times_seconds.tolist() == [299 / 60]  # frame numbers count from 1
    assert found.offsets.tolist() == [0, 2]
    assert found.boxes.tolist() == [[0.25, 0.5, 0.5, 1.0]] * 2
    assert found.scores.tolist() == [0.75, 0.75]
    assert found.categories.tolist() == [1, 2]
    assert found.sides.tolist() == [2, 0]
    assert found.states.tolist() == [4, 0]
    assert found.fault() is None


def test_what_proto3_leaves_out_is_zero_and_unknown_fields_are_passed_over(pickled):
    data = frame(1, hand(0.0, 0.0, 0.5, 0.5, score=0.5)) + b"\x78\x01" + part(14, b"new") + b"\x6d" + bytes(4)
    found = read(pickled([data]))
    assert (found.sides.tolist(), found.states.tolist()) == ([1], [1])  # LEFT and NO_CONTACT are 0 in the form
    assert parse_message(b"\x79" + bytes(8)) == {15: [bytes(8)]}


def test_thresholds_drop_boxes_and_frames_are_sorted(pickled):
    data = [
        frame(7, thing(0, 0, 1, 1, score=0.02)),
        frame(2, hand(0, 0, 1, 1, score=0.09), hand(0, 0, 0.5, 1, score=0.11), thing(0, 0, 1, 1, score=0.005)),
    ]
    path = pickled(data)
    found = read(path)
    assert found.times_seconds.tolist() == [1 / 60, 6 / 60]
    assert found.offsets.tolist() == [0, 1, 2]
    np.testing.assert_allclose(found.scores, [0.11, 0.02])
    assert read(path, thresholds=Thresholds(0.5, 0.5)).offsets.tolist() == [0, 0, 0]
    assert read(path, fps=30.0).times_seconds.tolist() == [1 / 30, 6 / 30]


def test_boxes_are_clipped_ordered_and_dropped_when_outside(pickled):
    parts = [thing(0.5, 0.5, 0.2, 1.02, score=1), thing(1.0, 0, 1.03, 1, score=1)]
    np.testing.assert_allclose(read(pickled([frame(1, *parts)])).boxes, [[0.2, 0.5, 0.5, 1.0]])


def test_the_rate_of_frame_numbers_is_the_nominal_one():
    assert (nominal_fps("P01_01"), nominal_fps("P01_101")) == (60.0, 50.0)
    with pytest.raises(InputError, match="give --fps"):
        nominal_fps("kitchen")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (FRAME[:-1], "message 1: field 4 is cut off"),
        (FRAME[:9], "message 1: the message is cut off"),
        (b"\x10" + b"\xff" * 11, "more than 10 bytes"),
        (b"\x0b", "unknown wire type 3"),
        (b"\x02\x00", "number 0"),
        (frame(0), "frame number 0; they count from 1"),
        (b"\x10\x01\x18\x01", "field 3 is no message"),
        (frame(1, thing(0, 0, 1, 1, score=float("nan"))), "its score is not within 0..1"),
        (frame(1, thing(0, 0, 1, 1, score=1.5)), "its score is not within 0..1"),
        (frame(1, thing(0, 0, float("inf"), 1, score=1)), "a box is not finite"),
        (frame(1, thing(0, 0, 300, 1, score=1)), "a box lies outside the frame"),
        (frame(1, hand(0, 0, 1, 1, score=1, facts=b"\x18\x05")), "hand state 5"),
    ],
)
def test_a_bad_message_is_one_line_with_its_place(pickled, data, says):
    with pytest.raises(VideoError, match=r"^P01_01\.pkl: message 1: ") as caught:
        read(pickled([data]))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_frames_twice_of_several_videos_or_none_are_refused(pickled):
    with pytest.raises(VideoError, match="message 2: frame 1 stands there twice"):
        read(pickled([frame(1), frame(1)]))
    with pytest.raises(VideoError, match="several videos"):
        read(pickled([frame(1), frame(2, video=b"P01_02")]))
    with pytest.raises(VideoError, match="no frame is in it"):
        read(pickled([]))


class Hostile:
    """What runs a command when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize(
    "value", [[b"a", "text"], [b"a", 1], {"a": b""}, [[b"a"]], (b"a",), [None], b"a", [bytearray(b"a")]]
)
def test_a_pickle_of_anything_but_a_list_of_bytes_is_refused(pickled, value):
    with pytest.raises(
        InputError, match=r"P01_01\.pkl: not a pickled list of byte strings: it holds .*not unpickled"
    ):
        read_pickled_bytes(pickled(value))


def test_nothing_in_a_pickle_runs(pickled, tmp_path):
    for value in ([Hostile(tmp_path / "ran")], Hostile(tmp_path / "ran")):
        with pytest.raises(InputError, match="it holds "):
            read_pickled_bytes(pickled(value))
    assert not (tmp_path / "ran").exists()
    itself = [b"a"]
    itself.append(itself)
    with pytest.raises(InputError, match="it holds itself"):
        read_pickled_bytes(pickled(itself))


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_lists_of_bytes_come_back_as_unpickling_gives_them(pickled, protocol):
    same = b"same" * 3
    value = [same, b"", b"x" * 300, same, b"y" * 70_000, *(bytes([i]) for i in range(256)), b"", same] * 9
    assert read_pickled_bytes(pickled(value, protocol=protocol)) == value


@pytest.mark.parametrize("data", [b"", b"hello", pickle.dumps([b"a" * 99])[:-20], b"\x80\x04]r\xff\xff\xff\xff"])
def test_a_file_that_is_cut_off_or_no_pickle_is_refused(tmp_path, data):
    (tmp_path / "x.pkl").write_bytes(data)
    with pytest.raises(InputError, match=r"x\.pkl: not a pickled list of byte strings"):
        read_pickled_bytes(tmp_path / "x.pkl")


@pytest.fixture
def table(pickled, tmp_path):
    first = pickled(
        [
            frame(1, thing(0.5, 0, 1, 1, score=0.9), hand(0, 0, 0.5, 1, score=0.2, facts=b"\x18\x04")),
            frame(3, *(thing(0, 0, 1, 1 - i / 10, score=0.5 + i / 100) for i in range(4))),
        ]
    )
    second = pickled([frame(2, hand(0, 0, 1, 1, score=0.8), video=b"P02_101")], "P02_101.pkl")
    call_ok(*BOXES, first, second, "-o", tmp_path / "t.h5")
    return tmp_path / "t.h5"


def test_a_table_gives_back_what_was_read(table, tmp_path):
    found = DetectionTable(table)
    assert list(found.rows) == ["P01_01", "P02_101"]
    for video in found.rows:
        expected, stored = read(tmp_path / f"{video}.pkl"), found.read(video)
        for name, value in vars(expected).items():
            np.testing.assert_array_equal(getattr(stored, name), value)
        assert stored.tracks is None
    assert found.about["object_threshold"] == 0.01
    assert len(found.about["sources_sha256"]) == 2


def test_the_expert_sees_the_nearest_frame_s_best_boxes_hands_first(table):
    track = load_boxes([table], ["P01/P01_01.MP4"], max_boxes=3).track("P01/P01_01.MP4")
    times = np.array([0.0, 1 / 60, 2 / 60, 5.0])
    found = boxes_at(track, times, width=456, height=256)
    assert found.annotated.tolist() == [True, False, True, False]
    assert found.categories.tolist() == [[1, 2, 0], [0, 0, 0], [2, 2, 2], [0, 0, 0]]
    np.testing.assert_allclose(found.boxes[0], [[0, 0, 0.5, 1], [0.5, 0, 1, 1], [0, 0, 0, 0]])
    np.testing.assert_allclose(found.boxes[2, :, 3], [0.7, 0.8, 0.9], rtol=1e-6)
    np.testing.assert_allclose(found.scores[[0, 2]], [[0.2, 0.9, 0], [0.53, 0.52, 0.51]], rtol=1e-6)
    assert found.sides.tolist() == [[1, 0, 0], *[[0] * 3] * 3]
    assert found.states.tolist() == [[5, 0, 0], *[[0] * 3] * 3]


@pytest.mark.parametrize("column", ["boxes", "scores", "times_seconds", "sides", "ends", "categories", "states"])
def test_a_changed_value_is_noticed_when_its_video_is_read(table, column):
    with h5py.File(table, "r+") as file:
        file[column][0] = file[column][0] + 1
    with pytest.raises(VerificationError, match=r"t\.h5 is damaged: the detections of 'P01_01' are not what"):
        DetectionTable(table).read("P01_01")
    assert DetectionTable(table).read("P02_101").scores.tolist() == [np.float32(0.8)]


def test_values_outside_the_file_are_refused(table, tmp_path):
    with h5py.File(table, "r+") as file:
        del file["scores"]
        file["scores"] = h5py.ExternalLink("other.h5", "/scores")
    with pytest.raises(VerificationError, match="scores is not there, or a link"):
        DetectionTable(table).read("P01_01")
    with h5py.File(table, "r+") as file:
        del file["videos"]
        file.create_dataset("videos", (4,), "u1", external=[(str(tmp_path / "other"), 0, 4)])
    with pytest.raises(VerificationError, match="videos holds no values of its own"):
        DetectionTable(table)


def test_another_file_is_refused_and_never_written_over(table, tmp_path):
    with h5py.File(tmp_path / "mine.h5", "w") as file:
        file["mine"] = [1]
    (tmp_path / "mine.txt").write_text("mine")
    for name in ("mine.h5", "mine.txt"):
        before = (tmp_path / name).read_bytes()
        assert name in refused(*BOXES, tmp_path / "P01_01.pkl", "-o", tmp_path / name)
        assert (tmp_path / name).read_bytes() == before
    before = table.read_bytes()
    twice = (tmp_path / "P01_01.pkl",) * 2
    assert "'P01_01': it comes twice" in refused(*BOXES, *twice, "-o", table)
    assert table.read_bytes() == before


def test_a_table_from_before_there_were_tracks_reads_as_it_did(table):
    with h5py.File(table, "r+") as file:
        del file["tracks"]
        for row in range(2):
            first, last = (int(file["box_ends"][row - 1]) if row else 0), int(file["box_ends"][row])
            start, end = (int(file["frame_ends"][row - 1]) if row else 0), int(file["frame_ends"][row])
            crc = zlib.crc32(file["periods_seconds"][row].tobytes())
            for name in ("times_seconds", "ends"):
                crc = zlib.crc32(file[name][start:end].tobytes(), crc)
            for name in ("boxes", "categories", "scores", "sides", "states"):
                crc = zlib.crc32(file[name][first:last].tobytes(), crc)
            file["crc32"][row] = crc
    found = DetectionTable(table)
    assert found.read("P01_01").tracks is None
    assert found.read("P02_101").scores.tolist() == [np.float32(0.8)]


def test_a_bad_video_is_left_out_and_named_and_the_others_go_on(pickled, tmp_path):
    good = pickled([frame(1, hand(0, 0, 1, 1, score=0.8))])
    bad = pickled([frame(1, thing(0, 0, 9, 1, score=1), video=b"P02_01")], "P02_01.pkl")
    out = tmp_path / "t.h5"
    result = call(*BOXES, bad, good, "-o", out)
    assert result.code == 3
    assert "1 video left out, more than --max-unusable 0" in result.err
    assert list(DetectionTable(out).rows) == ["P01_01"]
    report = json.loads(call_ok(*BOXES, bad, good, "-o", out, "--max-unusable", "1", "--json"))
    reason = "P02_01.pkl: message 1: a box lies outside the frame: [0.0, 0.0, 9.0, 1.0]"
    assert report["unusable"] == {"P02_01": reason}
    assert "no video can be used" in refused(*BOXES, bad, "-o", tmp_path / "none.h5")
    assert not (tmp_path / "none.h5").exists()


def test_a_hostile_pickle_is_refused_and_named_and_the_others_are_converted(pickled, tmp_path):
    good = pickled([frame(1, hand(0, 0, 1, 1, score=0.8))])
    hostile, mark = pickled([Hostile(tmp_path / "it-ran")], "P02_01.pkl"), tmp_path / "it-ran"
    cut = tmp_path / "P03_01.pkl"
    cut.write_bytes(good.read_bytes()[:-9])
    out = tmp_path / "t.h5"
    result = call(*BOXES, hostile, good, cut, "-o", out)
    assert result.code == 3
    assert "2 videos left out, more than --max-unusable 0" in result.err
    told = [line for line in result.out.splitlines() if line.startswith("left out: ")]
    assert [line.split(": ")[1] for line in told] == ["P02_01", "P03_01"]
    assert f"{hostile}: not a pickled list of byte strings: it holds" in told[0]
    assert told[0].endswith("it was not unpickled")
    assert list(DetectionTable(out).rows) == ["P01_01"]
    assert not mark.exists()
    alone = refused(*BOXES, hostile, "-o", tmp_path / "none.h5")
    assert "no video can be used; the first: P02_01" in alone
    assert not (tmp_path / "none.h5").exists()


def detections(video, frames=2, each=3, **values):
    total = frames * each
    columns = {
        "times_seconds": np.arange(frames) / 12,
        "offsets": np.arange(frames + 1) * each,
        "boxes": np.random.default_rng(total).random((total, 4), np.float32),
        "categories": np.full(total, 2, np.uint8),
        "scores": np.ones(total, np.float32),
        "sides": np.zeros(total, np.uint8),
        "states": np.zeros(total, np.uint8),
        "period_seconds": 1 / 12,
    }
    return VideoDetections(video=video, **columns | values)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"times_seconds": np.array([0.5, 0.5])}, "not in order"),
        ({"scores": np.full(6, np.nan, np.float32)}, "outside 0..1"),
        ({"boxes": np.full((6, 4), np.inf, np.float32)}, "not finite"),
        ({"tracks": np.arange(5)}, "not divided into tracks"),
        ({"tracks": np.full(6, -1)}, "not divided into tracks"),
    ],
)
def test_values_without_meaning_cost_their_video_alone(tmp_path, values, says):
    report = write_table(tmp_path / "t.h5", [detections("bad", **values), detections("good")], {})
    assert says in report.unusable["bad"]
    assert (report.videos, report.frames, report.boxes) == (1, 2, 6)


def test_gathered_writes_keep_every_video_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(table_writer, "GATHERED_ROWS", 20)
    videos = [detections(str(n), frames=n + 1, each=n % 3) for n in range(9)]
    report = write_table(tmp_path / "t.h5", iter(videos), {})
    found = DetectionTable(tmp_path / "t.h5")
    assert report.boxes == sum(len(video.boxes) for video in videos)
    for video in videos:
        for name, value in vars(video).items():
            if name != "tracks":
                np.testing.assert_array_equal(getattr(found.read(video.video), name), value)


def test_a_stop_leaves_nothing_behind(tmp_path):
    def videos():
        yield detections("first")
        os.kill(os.getpid(), signal.SIGTERM)
        yield detections("second")

    with pytest.raises(InterruptedByUserError, match="nothing is written"):
        write_table(tmp_path / "t.h5", videos(), {})
    assert not list(tmp_path.iterdir())
