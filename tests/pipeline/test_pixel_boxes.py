"""Boxes in pixels through the table: what the expert sees is what it sees of the published file itself."""

import json

import cv2
import numpy as np
import pytest

from mmkd.data_manifests.manifest import Clip, Head, Manifest
from mmkd.data_manifests.manifest_file import save_manifest
from mmkd.pipeline.detections.table import DetectionTable
from mmkd.pipeline.inputs.boxes import boxes_at, load_boxes
from tests.helpers.in_process import call, call_ok, refused
from tests.helpers.places import DATA, needs_data

REAL = DATA / "something_something"
TIMES = np.arange(0, 6, 0.03)


def convert(form, *arguments):
    return ("mmkd-cache", "boxes", "--form", form, *arguments)


@pytest.fixture
def written(tmp_path):
    def write(value, name="boxes.json"):
        (tmp_path / name).write_text(json.dumps(value))
        return tmp_path / name

    return write


def same(first, second):
    for name, value in vars(first).items():
        np.testing.assert_array_equal(getattr(second, name), value, err_msg=name)


@needs_data
@pytest.mark.parametrize("max_boxes", [1, 2, 3, 14])
def test_the_published_boxes_are_the_same_through_a_table(tmp_path, max_boxes):
    source, table = REAL / "bounding_box_annotations.json", tmp_path / "t.h5"
    videos = json.loads(source.read_text())
    clips = tuple(Clip(video, f"{video}.webm", "train", {"action": 0}) for video in videos)
    save_manifest(Manifest("real", (Head("action", ("a", "b")),), clips), tmp_path / "m.jsonl")
    data = ("--manifest", tmp_path / "m.jsonl", "--videos", REAL, "--workers", 0)
    call_ok(*convert("something-else", source, *data, "-o", table))
    before, after = load_boxes([source], max_boxes=max_boxes), load_boxes([table], max_boxes=max_boxes)
    assert set(after.tracks) == set(before.tracks) == set(videos)
    seen = 0
    for video in videos:
        capture = cv2.VideoCapture(str(REAL / f"{video}.webm"))
        width, height = int(capture.get(cv2.CAP_PROP_FRAME_WIDTH)), int(capture.get(cv2.CAP_PROP_FRAME_HEIGHT))
        expected = boxes_at(before.track(video), TIMES, width=width, height=height)
        same(expected, boxes_at(after.track(video), TIMES, width=width, height=height))
        seen += int((expected.categories > 0).sum())
    assert seen > 100


def label(track, x1, y1, x2, y2):
    return {"box2d": {"x1": x1, "y1": y1, "x2": x2, "y2": y2}, "standard_category": track}


def frame(number, *labels):
    return {"name": f"v/{number:04d}.jpg", "labels": list(labels)}


@pytest.mark.parametrize("max_boxes", [1, 2, 3, 4, 6])
def test_tracks_that_come_and_go_keep_the_slots_that_they_have_without_a_table(written, tmp_path, max_boxes):
    random = np.random.default_rng(3)
    tracks = ["0002", "hand", "0000", "hand", "0001", "0010"]
    frames = []
    for number in (1, 2, 4, 5, 9):
        chosen = [track for track in tracks if random.random() < 0.6]
        corners = random.uniform([-3, -2, -3, -2], [103, 51, 103, 51], (len(chosen), 4))
        boxes = [label(track, *box) for track, box in zip(chosen, corners, strict=True)]
        outside = [label("0003", 100, 0, 102, 10)] * (number < 3)  # nothing of it is inside
        frames.append(frame(number, *boxes, *outside))
    source = written({"v": frames})
    call_ok(*convert("something-else", source, "--frame-size", "100x50", "-o", tmp_path / "t.h5"))
    expected, found = (
        boxes_at(load_boxes([path], max_boxes=max_boxes).track("v"), TIMES / 4, width=100, height=50)
        for path in (source, tmp_path / "t.h5")
    )
    same(expected, found)
    assert (expected.categories > 0).any()


def test_a_fault_costs_its_video_alone(written, tmp_path):
    good = [frame(1, label("hand", 0, 0, 10, 10))]
    source = written(
        {
            "outside": [frame(1, label("hand", 0, 0, 400, 10))],
            "nan": [frame(1, label("hand", 0, 0, float("nan"), 10))],
            "twice": [*good, *good],
            "good": good,
        }
    )
    options = ("--frame-size", "100x50", "-o", tmp_path / "t.h5", "--json")
    result = call(*convert("something-else", source, *options))
    assert result.code == 3
    report = json.loads(result.out)
    assert list(report["unusable"]) == ["outside", "nan", "twice"]
    assert "300 % of the side outside the 100 x 50 frame" in report["unusable"]["outside"]
    assert list(DetectionTable(tmp_path / "t.h5").rows) == ["good"]


def found_box(category, x1, y1, x2, y2, score):
    return {"x1": x1, "y1": y1, "x2": x2, "y2": y2, "category": category, "score": score}


def test_the_authors_detections_come_with_their_scores(written, tmp_path):
    frames = [[found_box("cup", 50, 0, 100, 50, 0.75), found_box("right hand", 0, 0, 25, 25, 0.5)], []]
    entry = {"id": "7", "template": "Moving [something]", "size": [100, 50], "frames": frames}
    bad = {"id": "8", "size": [0, 50], "frames": frames}
    source = written([entry, bad])
    call_ok(*convert("authors", source, "-o", tmp_path / "t.h5", "--max-unusable", "1"))
    track = load_boxes([tmp_path / "t.h5"], max_boxes=3).track("7.webm")
    found = boxes_at(track, np.array([0, 1 / 12]), width=1, height=1)
    assert found.annotated.tolist() == [True, True]
    assert found.categories.tolist() == [[1, 2, 0], [0, 0, 0]]  # hands first, as a category that names one is
    assert found.boxes[0].tolist() == [[0, 0, 0.25, 0.5], [0.5, 0, 1, 1], [0, 0, 0, 0]]
    assert found.scores.tolist() == [[0.5, 0.75, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{}", "expected one JSON list of videos"),
        ("[]", "no video can be used"),
        ("[1]", "entry 1 is no video"),
        ('[{"id": "7", "size": [1, 1], "frames": []}', "expected ',' or the list's end"),
        ('[{"id": "7", "size": [1, 1], "frames": [[]]}] 1', "text after the list"),
        ('[{"id": "7", "si', "cut off"),
    ],
)
def test_a_file_that_is_not_the_authors_is_refused(tmp_path, text, says):
    (tmp_path / "a.json").write_text(text)
    assert says in refused(*convert("authors", tmp_path / "a.json", "-o", tmp_path / "t.h5"))
    assert not (tmp_path / "t.h5").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ((), "give --manifest and --videos, or --frame-size"),
        (("--frame-size", "100"), "is not of the form 427x240"),
        (("--frame-size", "0x50"), "is not of the form 427x240"),
        (("--frame-size", "9x9", "--manifest", "m"), "not with --manifest"),
    ],
)
def test_sizes_come_from_one_place(written, tmp_path, options, says):
    source = written({"v": [frame(1, label("hand", 0, 0, 10, 10))]})
    assert says in refused(*convert("something-else", source, *options, "-o", tmp_path / "t.h5"))


def test_two_videos_of_one_name_are_refused(written, tmp_path):
    source = written({"v": [frame(1, label("hand", 0, 0, 10, 10))]})
    clips = tuple(Clip(part, f"{part}/v.webm", "train", {"action": 0}) for part in "ab")
    save_manifest(Manifest("d", (Head("action", ("a", "b")),), clips), tmp_path / "m.jsonl")
    data = ("--manifest", tmp_path / "m.jsonl", "--videos", tmp_path, "--workers", 0)
    error = refused(*convert("something-else", source, *data, "-o", tmp_path / "t.h5"))
    assert "a/v.webm and b/v.webm of the manifest have one name, 'v'" in error
    assert not (tmp_path / "t.h5").exists()
    data = (*data, "--weights", source, "--network", "fasterrcnn_resnet50_fpn", "--hand", 1)
    assert "a/v.webm and b/v.webm of the manifest have one name" in refused(
        "mmkd-cache", "detect", *data, "-o", tmp_path / "d.h5"
    )
