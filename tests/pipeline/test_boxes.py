import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmkd.data_manifests.errors import InputError
from mmkd.pipeline.detections import json_members as boxes_json
from mmkd.pipeline.detections.json_members import iterate_members
from mmkd.pipeline.inputs.boxes import BoxesMissingError, boxes_at, load_boxes
from tests.helpers.places import DATA, needs_data

REAL = DATA / "something_something"


def label(track, x1, y1, x2, y2, **more):
    return {"box2d": {"x1": x1, "y1": y1, "x2": x2, "y2": y2}, "standard_category": track, **more}


def frame(number, *labels):
    return {"name": f"v/{number:04d}.jpg", "labels": list(labels), "nr_instances": len(labels)}


@pytest.fixture
def load(tmp_path):
    def load_value(value, **options):
        path = tmp_path / "boxes.json"
        path.write_text(value if isinstance(value, str) else json.dumps(value))
        return load_boxes([path], **options)

    return load_value


@pytest.fixture
def track(load):
    def load_track(*frames, **options):
        return load({"v": list(frames)}, **options).track("v.webm")

    return load_track


def at(found, *times, width=100, height=50):
    return boxes_at(found, np.array(times, np.float64), width=width, height=height)


def test_boxes_are_parts_of_the_frame_in_slots_that_keep_their_track(track):
    found = at(
        track(
            frame(1, label("0001", 50, 25, 100, 50), label("hand", 0, 0, 10, 10), label("0000", 10, 10, 20, 20)),
            frame(2, label("0001", 40, 20, 90, 45, score=0.5)),
        ),
        0.0,
        1 / 12,
    )
    assert found.boxes.shape == (2, 14, 4)
    assert found.boxes.dtype == np.float32
    assert found.categories.dtype == np.int64
    assert found.categories[:, :4].tolist() == [[1, 2, 2, 0], [0, 0, 2, 0]]
    np.testing.assert_allclose(found.boxes[0, :3], [[0, 0, 0.1, 0.2], [0.1, 0.2, 0.2, 0.4], [0.5, 0.5, 1, 1]])
    np.testing.assert_allclose(found.boxes[1, 2], [0.4, 0.4, 0.9, 0.9])
    assert not found.boxes[1, [0, 1]].any()
    assert found.scores[:, :3].tolist() == [[1, 1, 1], [0, 0, 0.5]]
    assert found.annotated.all()


def test_nearest_frame_at_most_half_a_period_away(track):
    frames = [frame(n, label("0000", n, 0, n + 10, 10)) for n in (1, 2, 5)]
    half = 0.5 / 12
    times = [
        0.0,
        half - 1e-3,
        half,
        half + 1e-3,
        1 / 12 + half,
        1 / 12 + half + 1e-3,
        4 / 12 - half,
        4 / 12 + half,
    ]
    found = at(track(*frames), *times, 5.0)
    assert np.round(found.boxes[:, 0, 0] * 100).tolist() == [1, 1, 1, 2, 2, 0, 5, 5, 0]
    assert found.annotated.tolist() == [True] * 5 + [False, True, True, False]
    assert found.categories[:, 0].tolist() == [2] * 5 + [0, 2, 2, 0]


@settings(deadline=None, max_examples=100)
@given(
    st.sets(st.integers(1, 30), min_size=1),
    st.lists(st.floats(0, 3, allow_nan=False), min_size=1, max_size=8),
)
def test_look_up_equals_a_slow_search(tmp_path_factory, numbers, times):
    path = tmp_path_factory.mktemp("boxes") / "b.json"
    # Written in falling order: the order of the list must not matter.
    frames = [frame(n, label("0000", n, 0, n + 10, 10)) for n in sorted(numbers, reverse=True)]
    path.write_text(json.dumps({"v": frames}))
    found = at(load_boxes([path]).track("v"), *times)
    for time, box in zip(times, found.boxes[:, 0], strict=True):
        gap, number = min((abs(time - (n - 1) / 12), n) for n in numbers)
        expected = number if gap <= 0.5 / 12 + 1e-6 else 0
        assert round(float(box[0]) * 100) == expected


def test_annotated_frame_without_boxes_is_told_from_a_missing_frame(track):
    found = at(track(frame(1), frame(3, label("hand", 0, 0, 5, 5))), 0.0, 1 / 12, 2 / 12)
    assert found.annotated.tolist() == [True, False, True]
    assert found.categories[:, 0].tolist() == [0, 0, 1]
    assert not at(track(frame(1)), 0.0).categories.any()


def test_two_hands_share_a_track_name_and_keep_two_slots(track):
    found = at(track(frame(1, label("hand", 0, 0, 10, 10), label("hand", 50, 0, 60, 10))), 0.0)
    assert found.categories[0, :3].tolist() == [1, 1, 0]
    np.testing.assert_allclose(found.boxes[0, :2, 0], [0, 0.5])


def test_of_too_many_tracks_the_most_seen_stay_in_order(track):
    one = [label(name, 0, 0, 5, 5) for name in ("0002", "hand", "0000", "0001")]
    two = [label(name, 0, 0, 5, 5) for name in ("0002", "0001", "0001")]
    found = at(track(frame(1, *one), frame(2, *two), max_boxes=3), 0.0, 1 / 12)
    assert found.categories.tolist() == [[1, 2, 2], [0, 2, 2]]


def test_boxes_are_clipped_and_outside_ones_dropped(track):
    found = at(
        track(
            frame(
                1,
                label("0000", -4, 10, 50, 50.0000001),
                label("0001", 30, 40, 10, 20),
                label("0002", 100, 0, 104, 9),
                label("0003", 5, 5, 5, 9),
            )
        ),
        0.0,
    )
    np.testing.assert_allclose(found.boxes[0, :2], [[0, 0.2, 0.5, 1], [0.1, 0.4, 0.3, 0.8]])
    assert found.categories[0, :4].tolist() == [2, 2, 0, 0]
    assert found.scores[0, :4].tolist() == [1, 1, 0, 0]


def test_boxes_of_a_resized_video_are_refused(track):
    found = track(frame(1, label("0000", 0, 0, 90, 45)))
    at(found, 0.0)
    with pytest.raises(BoxesMissingError, match="80 % of the side outside the 50 x 25 frame; was"):
        at(found, 0.0, width=50, height=25)
    assert not at(found, 9.0, width=50, height=25).categories.any()


@pytest.mark.parametrize(
    ("frames", "reason"),
    [
        ([], "no frame is annotated"),
        ({}, "no frame is annotated"),
        ([frame(1), frame(1)], "frame 1 is annotated twice"),
        ([frame(0)], "frame name 'v/0000.jpg' is not of the form id/0001.jpg"),
        ([{"labels": []}], "frame name 'None'"),
        (["x"], "frame name 'None'"),
        ([{"name": "v/0001.jpg"}], "frame 1 has no list of labels"),
        ([frame(7, {"standard_category": "hand"})], "frame 7 has a malformed box (KeyError('box2d'))"),
        ([frame(7, label("hand", None, 0, 1, 1))], "frame 7 has a malformed box"),
        ([frame(7, "x")], "frame 7 has a malformed box"),
        ([frame(7, label("hand", float("nan"), 0, 1, 1))], "frame 7 has a box that is not finite"),
        ([frame(7, label("hand", 0, 0, float("inf"), 1))], "frame 7 has a box that is not finite"),
        ([frame(7, label(3, 0, 0, 1, 1))], "frame 7 has a box whose standard_category is no text"),
        ([frame(7, label("hand", 0, 0, 1, 1, score=1.5))], "score outside 0..1"),
    ],
)
def test_malformed_annotation_takes_one_video_alone(load, frames, reason):
    found = load({"bad": frames, "good": [frame(1)]})
    assert found.track("good").times_seconds.tolist() == [0.0]
    with pytest.raises(BoxesMissingError) as caught:
        found.track("bad.webm")
    assert reason in str(caught.value)


def test_absent_video_is_named_as_such(load):
    with pytest.raises(BoxesMissingError, match="not in the box file"):
        load({"v": [frame(1)]}).track("w.webm")


def test_only_wanted_videos_are_kept(load):
    value = {name: [frame(1)] for name in ("1", "2", "003")}
    assert set(load(value, videos=["a/1.webm", "003"]).tracks) == {"1", "003"}


def test_several_files_are_joined_and_repeated_videos_refused(tmp_path):
    for name, video in (("a", "1"), ("b", "2"), ("c", "1")):
        (tmp_path / name).write_text(json.dumps({video: [frame(1)]}))
    joined = load_boxes([tmp_path / "a", tmp_path / "b"])
    assert set(joined.tracks) == {"1", "2"}
    with pytest.raises(InputError, match=r"c: video '1' is annotated in an earlier file"):
        load_boxes([tmp_path / "a", tmp_path / "c"])


@pytest.mark.parametrize("options", [{"fps": 0.0}, {"fps": float("nan")}, {"max_boxes": 0}])
def test_impossible_options_are_refused(load, options):
    with pytest.raises(InputError, match="fps > 0"):
        load({}, **options)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "`mmkd-cache boxes --form authors` makes a table"),
        ("", "expected one JSON object"),
        ('{"a": [1, 2', "not valid JSON, or cut off"),
        ('{"a": [1]', "expected ',' or the object's end"),
        ('{"a": ', "the file ends early"),
        ('{"a": [], ', "the file ends early"),
        ('{"a" [1]}', "expected a video id and ':'"),
        ("{1: []}", "expected a video id and ':'"),
        ('{"a": [], "a": []}', "video 'a' stands in the file twice"),
        ('{"a": []} {}', "text after the object"),
        ('{"a": ' + "[" * 100_000, "not valid JSON, or cut off"),
    ],
)
def test_broken_file_is_refused(load, text, words):
    with pytest.raises(InputError, match=r"boxes\.json: near character") as caught:
        load(text)
    assert words in str(caught.value)


def test_missing_or_wrongly_encoded_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*none\.json: No such file"):
        load_boxes([tmp_path / "none.json"])
    (tmp_path / "latin").write_bytes(b'{"\xe9": []}')
    with pytest.raises(InputError, match="latin: not UTF-8"):
        load_boxes([tmp_path / "latin"])


@settings(deadline=None, max_examples=100)
@given(
    st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), st.lists(st.integers() | st.text("{\"'é"))),
    st.integers(1, 9),
    st.sampled_from([None, 1]),
)
def test_members_equal_those_of_the_whole_file(tmp_path_factory, value, chunk, indent):
    path = tmp_path_factory.mktemp("members") / "m.json"
    path.write_text(json.dumps(value, indent=indent, ensure_ascii=False), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(boxes_json, "CHUNK_CHARACTERS", chunk)
        assert dict(iterate_members(path)) == value


def test_value_larger_than_the_limit_is_refused(load, monkeypatch):
    monkeypatch.setattr(boxes_json, "CHUNK_CHARACTERS", 16)
    monkeypatch.setattr(boxes_json, "MAX_MEMBER_CHARACTERS", 64)
    with pytest.raises(InputError, match="no value ends within 64 characters"):
        load({"v": [frame(1)] * 100})


@needs_data
def test_published_boxes_of_real_clips():
    found = load_boxes([REAL / "bounding_box_annotations.json"])
    assert len(found.tracks) == 9
    entry = json.loads((REAL / "bounding_box_annotations.json").read_text())["57082"][21]
    assert entry["name"] == "57082/0022.jpg"
    boxes = at(found.track("57082.webm"), 21 / 12, width=427, height=240)
    assert boxes.categories.astype(bool).sum() == len(entry["labels"]) == 3
    real = sorted([b["box2d"][k] for k in ("x1", "y1", "x2", "y2")] for b in entry["labels"])
    ours = sorted((boxes.boxes[0, :3] * [427, 240, 427, 240]).tolist())
    np.testing.assert_allclose(ours, real, atol=1e-3)
    late = at(found.track("22983.webm"), 52 / 12, width=427, height=240)
    assert not late.annotated.any()
