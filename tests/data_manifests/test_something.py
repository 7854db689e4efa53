import json
import logging

import pytest

from mmkd.data_manifests.errors import InputError
from mmkd.data_manifests.manifest import Clip
from mmkd.data_manifests.manifest_file import load_manifest, save_manifest
from mmkd.data_manifests.published.something import (
    LEAK_WARNING,
    read_class_list,
    read_something_else,
    read_something_something,
)
from tests.helpers.in_process import call_ok
from tests.helpers.places import DATA, needs_data

REAL = DATA / "something_something"
LABELS = {"Tipping something over": "1", "Something colliding with something": "0", "Opening something": "2"}
OPENING = {"id": "007", "label": "opening box", "template": "Opening [something]", "placeholders": ["box"]}
TIPPING = {
    "id": "7",
    "label": "tipping x over",
    "template": "Tipping [something in it] over",
    "placeholders": ["x"],
}


@pytest.fixture
def write(tmp_path):
    def write_json(name, value):
        path = tmp_path / name
        path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
        return path

    return write_json


@pytest.fixture
def labels(write):
    return write("labels.json", LABELS)


def refusal(splits, labels):
    with pytest.raises(InputError) as caught:
        read_something_something(splits, labels)
    return str(caught.value).replace(f"{labels.parent}/", "")


def test_splits_labels_and_videos(write, labels):
    collision = {**OPENING, "id": "9", "template": "[Something] colliding with [something]"}
    manifest = read_something_something(
        {
            "train": write("train.json", [OPENING]),
            "compositional": write("c.json", [collision]),
            "test": write("test.json", [{"id": "1"}, {"id": "0"}]),
        },
        labels,
    )
    assert manifest.dataset == "something-something-v2"
    assert not manifest.flip_allowed
    assert manifest.heads[0].classes == (
        "Something colliding with something",
        "Tipping something over",
        "Opening something",
    )
    assert manifest.splits == ("train", "compositional", "test")
    assert manifest.split("train") == (Clip("007", "007.webm", "train", {"action": 2}),)
    assert [clip.labels["action"] for clip in manifest.clips] == [2, 0, None, None]
    assert [clip.clip_id for clip in manifest.split("test")] == ["1", "0"]


def test_only_the_brackets_of_a_template_are_dropped(write):
    labels = write("labels.json", {"Tipping something in it over": 0, "Opening something": 1})
    manifest = read_something_something({"train": write("a.json", [TIPPING])}, labels)
    assert manifest.clips[0].labels == {"action": 0}


def test_ids_keep_leading_zeros_and_the_suffix_is_an_option(write, labels):
    path = write("a.json", [OPENING, {**OPENING, "id": "7"}])
    manifest = read_something_something({"train": path}, labels, dataset="mine", video_suffix=".mp4")
    assert [clip.video for clip in manifest.clips] == ["007.mp4", "7.mp4"]
    assert manifest.dataset == "mine"


@pytest.mark.parametrize(
    ("element", "words"),
    [
        ({**OPENING, "id": 7}, 'a.json: element 2: "id" must be a string (leading zeros count), got 7'),
        (
            {"template": "Opening [something]"},
            'a.json: element 2: "id" must be a string (leading zeros count',
        ),
        ({"id": "8"}, "a.json: element 2: id '8' has no \"template\", while other elements have one"),
        ({"id": "8", "template": None}, "a.json: element 2: id '8' has no \"template\""),
        (
            {**OPENING, "id": "8", "template": "Opening [it]"},
            "a.json: element 2: template 'Opening [it]' names no",
        ),
        (
            {**OPENING, "id": "../8"},
            "a.json: element 2: clip '../8': video '../8.webm' must be",
        ),
        ({**OPENING, "id": ""}, "a.json: element 2: clip id '' is empty"),
        ({**OPENING, "id": "8\r"}, "a.json: element 2: clip id '8\\r' is empty or holds control characters"),
        (OPENING, "a.json: element 2: id '007' already stands in a.json: element 1"),
        ("007", "a.json: element 2: expected an object"),
    ],
)
def test_bad_element_is_named(write, labels, element, words):
    assert words in refusal({"train": write("a.json", [OPENING, element])}, labels)


def test_clip_of_two_splits_is_refused(write, labels):
    splits = {
        "train": write("a.json", [OPENING]),
        "validation": write("b.json", [{**OPENING, "id": "8"}, OPENING]),
    }
    assert "b.json: element 2: id '007' already stands in a.json: element 1" in refusal(splits, labels)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "a.json: expected a list of elements"),
        ("{}", "a.json: expected a list of elements"),
        ('[{"id": "1"},\n]', "a.json: not valid JSON: "),
        ('[{"id": "1", "id": "2"}]', "a.json: not valid JSON: key 'id' stands in an object twice"),
        ('[{"id": NaN}]', "a.json: not valid JSON: NaN is no JSON number"),
        ("[" * 200_000, "a.json: not valid JSON: "),
    ],
)
def test_bad_file_is_named(write, labels, text, words):
    assert words in refusal({"train": write("a.json", text)}, labels)


def test_missing_and_wrongly_encoded_files_are_named(tmp_path, labels):
    assert "cannot read none.json: No such file" in refusal({"train": tmp_path / "none.json"}, labels)
    latin = tmp_path / "latin.json"
    latin.write_bytes(b'[{"id": "\xe9"}]')
    assert "latin.json: not UTF-8 text (byte 9)" in refusal({"train": latin}, labels)
    assert "no split file was given" in refusal({}, labels)


def test_byte_order_mark_and_crlf_are_read(tmp_path, labels):
    path = tmp_path / "windows.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps([OPENING], indent=1).replace("\n", "\r\n").encode())
    assert read_something_something({"train": path}, labels).clips[0].clip_id == "007"


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"a": 0, "b": 2}, "2 classes, but none has number 1"),
        ({"a": 1, "b": 2}, "2 classes, but none has number 0"),
        ({"a": 0, "b": "0"}, "number 0 belongs to 'a' and to 'b'"),
        ({"a": 0, "b": "01"}, "class 'b' has '01'"),
        ({"a": 0, "b": -1}, "class 'b' has -1"),
        ({"a": 0, "b": True}, "class 'b' has True"),
        ({"a": 0, "b": 1.0}, "class 'b' has 1.0"),
        ({"a": 0, "b": "٣"}, "class 'b' has"),
        ({"a": 0}, "needs at least two classes"),
        (["a", "b"], "expected an object of class names and numbers"),
    ],
)
def test_bad_class_list_is_refused(write, table, words):
    with pytest.raises(InputError, match=r"labels\.json: ") as caught:
        read_class_list(write("labels.json", table))
    assert words in str(caught.value)


def test_something_else_has_its_own_name_order_and_warning(write, labels, caplog):
    own = write(
        "own.json",
        {"Opening something": 0, "Tipping something over": 1, "Something colliding with something": 2},
    )
    path = write("train.json", [OPENING])
    with caplog.at_level(logging.WARNING):
        manifest = read_something_else({"train": path}, own)
    assert LEAK_WARNING in caplog.text
    assert manifest.dataset == "something-else"
    assert manifest.clips[0].labels == {"action": 0}
    assert manifest.fingerprint() != read_something_something({"train": path}, labels).fingerprint()


@needs_data
def test_published_files_become_a_manifest_that_survives_saving(tmp_path):
    folder = REAL
    splits = {name: folder / f"{name}.json" for name in ("train", "validation", "test")}
    manifest = read_something_something(splits, folder / "labels.json")
    assert len(manifest.heads[0].classes) == 174
    sizes = {name: len(manifest.split(name)) for name in manifest.splits}
    assert sizes == {
        "train": 3,
        "validation": 2,
        "test": 4,
    }
    assert all((folder / clip.video).is_file() for clip in manifest.clips)
    names = {clip.clip_id: manifest.heads[0].classes[clip.labels["action"]] for clip in manifest.split("train")}
    assert names["80962"] == "Poking something so it slightly moves"
    save_manifest(manifest, tmp_path / "m.jsonl")
    assert load_manifest(tmp_path / "m.jsonl") == manifest


@needs_data
def test_published_class_lists_hold_the_same_names_in_other_orders():
    folder = REAL
    ours = read_class_list(folder / "labels.json")
    theirs = read_class_list(folder / "something_else_compositional_labels.json")
    assert set(ours) == set(theirs)
    assert sum(a == b for a, b in zip(ours, theirs, strict=True)) == 1


@pytest.mark.parametrize("name", ["something-something", "something-else"])
def test_json_says_what_was_made(write, labels, tmp_path, name):
    split = f"train={write('a.json', [OPENING])}"
    said = call_ok(
        "mmkd-cache", "manifest", name, "--split", split, "--labels", labels, "-o", tmp_path / "m.jsonl", "--json"
    )
    assert json.loads(said) == {"splits": {"train": {"clips": 1}}, "classes": {"action": 3}, "missing_videos": None}
