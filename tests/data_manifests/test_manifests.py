"""Manifests: what is written reads back, and every fault is refused with the file and line it stands in."""

import errno
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmkd.data_manifests.errors import InputError, StorageError
from mmkd.data_manifests.manifest import SCHEMA, Clip, FrameRate, Head, Manifest, manifest_lines
from mmkd.data_manifests.manifest_file import load_manifest, save_manifest

# Any character but controls and lone surrogates, so also U+0085 and U+2028, at which str.splitlines() breaks.
texts = st.text(st.characters(exclude_categories=["Cs"], min_codepoint=32), min_size=1, max_size=6)
names = st.from_regex(r"[a-z_][a-z0-9_]{0,5}", fullmatch=True)
seconds = st.floats(0, 1e5, allow_nan=False)


@st.composite
def manifests(draw):
    heads = tuple(
        Head(name, tuple(draw(st.lists(texts, min_size=2, max_size=4, unique=True))))
        for name in draw(st.lists(names, min_size=1, max_size=2, unique=True))
    )
    ids = draw(st.lists(texts, min_size=1, max_size=5, unique_by=str.casefold))
    clips = []
    for clip_id in ids:
        start = draw(seconds)
        labels = {head.name: draw(st.none() | st.integers(0, len(head.classes) - 1)) for head in heads}
        clip = Clip(
            clip_id=clip_id,
            video="videos/" + draw(texts.map(lambda text: text.replace("/", "-").replace(":", "-"))) + ".webm",
            split=draw(st.sampled_from(["train", "validation"])),
            labels=labels,
            start_seconds=start,
            end_seconds=draw(st.none() | st.floats(start + 0.1, start + 100)),
            groups=tuple(draw(st.lists(texts, max_size=2))),
        )
        clips.append(clip)
    return Manifest(draw(texts), heads, tuple(clips), draw(st.booleans()))


@settings(
    deadline=None,
    database=None,
    derandomize=True,
    max_examples=100,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(manifests(), st.sampled_from(["\n", "\r\n"]), st.booleans(), st.booleans())
def test_what_is_saved_loads_back_in_any_dress(tmp_path, manifest, newline, mark, ascii_only):
    path = tmp_path / "manifest.jsonl"
    save_manifest(manifest, path)
    assert load_manifest(path) == manifest
    assert load_manifest(path).fingerprint() == manifest.fingerprint()
    lines = [
        json.dumps(json.loads(line), ensure_ascii=ascii_only, indent=None) for line in manifest_lines(manifest)
    ]
    dressed = newline.join(lines) + newline * 2
    path.write_bytes((b"\xef\xbb\xbf" if mark else b"") + dressed.encode())
    assert load_manifest(path) == manifest


def test_lines_are_json_and_equal_parts_of_clips_are_one_object(tmp_path):
    """A line as we write it is read without JSON's parser: the clips are those of another form of the same JSON."""
    clips = [
        Clip(f"c{n}", f"v{n}.mp4", "train", {"verb": n % 2}, float(n % 3), n + 5.5 if n % 2 else None, groups)
        for n, groups in enumerate([(), ("tail",), ("tail", "é"), (), ("tail",), ("a]",), ('"',)])
    ]
    path = tmp_path / "manifest.jsonl"
    save_manifest(Manifest("d", (Head("verb", ("open", "close")),), tuple(clips)), path)
    loaded = load_manifest(path).clips
    assert loaded == tuple(clips)
    assert loaded[0].labels is loaded[2].labels
    assert loaded[1].groups is loaded[4].groups
    assert loaded[0].split is loaded[1].split
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines == [json.dumps(json.loads(line), ensure_ascii=False) for line in lines]


@pytest.mark.parametrize("number", ["1_0", "\uff10", "1.", ".5", "+1", "01", "0x1", "1e", "NaN1"])
def test_a_number_that_json_does_not_know_is_refused(tmp_path, number):
    # The second of two alike: the first one's labels and groups are read by JSON's parser in any case.
    clips = CLIP, replace(CLIP, clip_id="second", start_seconds=1.25)
    save_manifest(replace(MANIFEST, clips=clips), tmp_path / "m")
    text = (tmp_path / "m").read_text().replace("1.25", number)
    assert number in text
    (tmp_path / "m").write_text(text, encoding="utf-8")
    assert "not JSON" in refused(tmp_path / "m")


HEADS = (Head("verb", ("open", "close")), Head("noun", ("door", "jar", "lid")))
CLIP = Clip("P01_101_0", "P01/P01_101.MP4", "train", {"verb": 1, "noun": None}, 2.5, 4.0, ("unseen",))
OTHER = replace(CLIP, clip_id="P01_101_1", split="validation", labels={"verb": 0, "noun": 2}, groups=())
MANIFEST = Manifest("epic", HEADS, (CLIP, OTHER))


def test_the_file_is_one_json_object_a_line(tmp_path):
    path = tmp_path / "new" / "folder" / "manifest.jsonl"
    save_manifest(MANIFEST, path)
    header, first, _ = map(json.loads, path.read_text().splitlines())
    assert header == {
        "schema": SCHEMA,
        "dataset": "epic",
        "flip_allowed": False,
        "heads": {"verb": ["open", "close"], "noun": ["door", "jar", "lid"]},
    }
    assert first == {
        "clip_id": "P01_101_0",
        "video": "P01/P01_101.MP4",
        "split": "train",
        "labels": {"verb": 1, "noun": None},
        "start_seconds": 2.5,
        "end_seconds": 4.0,
        "groups": ["unseen"],
    }
    assert list(path.parent.iterdir()) == [path]


def test_a_short_row_has_the_documented_defaults(tmp_path):
    rows = [{"clip_id": "a", "video": "a.webm", "split": "train", "labels": {"verb": 0, "noun": None}}]
    (clip,) = load_manifest(write_lines(tmp_path, rows)).clips
    assert clip == Clip("a", "a.webm", "train", {"verb": 0, "noun": None}, 0.0, None, ())


def test_the_fingerprint_tells_every_change_and_no_form():
    same = replace(MANIFEST, clips=(replace(CLIP, labels={"noun": None, "verb": 1}), replace(OTHER)))
    assert same.fingerprint() == MANIFEST.fingerprint()
    whole = [replace(MANIFEST, clips=(replace(CLIP, start_seconds=start, end_seconds=4),)) for start in (2, 2.0)]
    assert whole[0].fingerprint() == whole[1].fingerprint()
    changed = [
        replace(MANIFEST, dataset="other"),
        replace(MANIFEST, flip_allowed=True),
        replace(MANIFEST, clips=(OTHER, CLIP)),
        replace(MANIFEST, clips=(CLIP,)),
        replace(MANIFEST, heads=(Head("verb", ("close", "open")), HEADS[1])),
        *(
            replace(MANIFEST, clips=(replace(CLIP, **value), OTHER))
            for value in (
                {"clip_id": "x"},
                {"video": "x.mp4"},
                {"split": "test"},
                {"labels": {"verb": 0, "noun": None}},
                {"start_seconds": 2.6},
                {"end_seconds": None},
                {"groups": ()},
            )
        ),
    ]
    assert len({manifest.fingerprint() for manifest in [MANIFEST, *changed]}) == len(changed) + 1


def test_splits_are_served_in_order_of_appearance():
    assert MANIFEST.splits == ("train", "validation")
    assert MANIFEST.split("validation") == (OTHER,)
    with pytest.raises(InputError, match="no split 'test'; it has: train, validation"):
        MANIFEST.split("test")


# ---- refusals of a file

GOOD_HEADER = {"schema": SCHEMA, "dataset": "epic", "heads": {"verb": ["open", "close"], "noun": ["a", "b"]}}
GOOD_ROW = {"clip_id": "a", "video": "a.mp4", "split": "train", "labels": {"verb": 0, "noun": None}}


def write_lines(directory: Path, rows, header=None) -> Path:
    path = directory / "manifest.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in [header or GOOD_HEADER, *rows]]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def refused(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_manifest(path)
    message = str(caught.value)
    assert message.count(str(path)) == 1
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"clip_id": ""}, "is empty"),
        ({"clip_id": "a\tb"}, "control characters"),
        ({"clip_id": "\ud800"}, "control characters"),
        ({"clip_id": 7}, "'clip_id' must be a string, got 7"),
        ({"clip_id": None}, "'clip_id' must be a string"),
        ({"video": ""}, "must be a path inside the video root"),
        ({"video": "."}, "must be a path inside the video root"),
        ({"video": ".."}, "must be a path inside the video root"),
        ({"video": "/etc/passwd"}, "must be a path inside the video root"),
        ({"video": "a/../../b.mp4"}, "must be a path inside the video root"),
        ({"video": "C:/b.mp4"}, "must be a path inside the video root"),
        ({"video": "http://host/b.mp4"}, "must be a path inside the video root"),
        ({"video": "a\0.mp4"}, "control characters"),
        ({"video": ["a.mp4"]}, "'video' must be a string"),
        ({"split": "my split"}, "'my split' is not an identifier"),
        ({"split": "../train"}, "is not an identifier"),
        ({"split": None}, "'split' must be a string"),
        ({"labels": None}, "'labels' must map each head"),
        ({"labels": [0, None]}, "'labels' must map each head"),
        ({"labels": {"verb": 0}}, "has labels for ['verb'], the heads are ['noun', 'verb']"),
        ({"labels": {"verb": 0, "noun": 0, "tool": 0}}, "the heads are ['noun', 'verb']"),
        ({"labels": {"verb": 2, "noun": 0}}, "verb label 2 is outside the class list (0..1)"),
        ({"labels": {"verb": -1, "noun": 0}}, "verb label -1 is outside"),
        ({"labels": {"verb": True, "noun": 0}}, "must map each head to a whole number or null"),
        ({"labels": {"verb": 1.0, "noun": 0}}, "must map each head to a whole number or null"),
        ({"labels": {"verb": "open", "noun": 0}}, "must map each head to a whole number or null"),
        ({"start_seconds": "1"}, "must be numbers"),
        ({"start_seconds": True}, "must be numbers"),
        ({"start_seconds": -0.1}, "is not a part of a video"),
        ({"start_seconds": float("nan")}, "is not a part of a video"),
        ({"start_seconds": float("inf")}, "is not a part of a video"),
        ({"start_seconds": 10**400}, "too large a number"),
        ({"start_seconds": 2, "end_seconds": 1}, "the segment 2.0 s to 1.0 s is not a part of a video"),
        ({"end_seconds": float("inf")}, "is not a part of a video"),
        ({"end_seconds": float("nan")}, "is not a part of a video"),
        ({"groups": "unseen"}, "'groups' must be a list of names"),
        ({"groups": None}, "'groups' must be a list of names"),
        ({"groups": [1]}, "'groups' must be a list of names"),
        ({"duration": 3}, "unknown key 'duration'; allowed: clip_id, end_seconds, groups"),
    ],
)
def test_a_wrong_row_is_refused_with_its_line(tmp_path, change, reason):
    path = write_lines(
        tmp_path, [GOOD_ROW | {"clip_id": "first"}, "", GOOD_ROW | change, GOOD_ROW | {"clip_id": "z"}]
    )
    message = refused(path)
    assert message.startswith(f"{path}:4: ")
    assert reason in message


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ("[]", "expected a JSON object"),
        ("null", "expected a JSON object"),
        ("[" * 100_000, "not JSON"),
        ('{"clip_id": "a", "clip_id": "b"}', "key 'clip_id' stands in an object twice"),
        ('{"start_seconds": ' + "9" * 5000 + "}", "not JSON"),
        (json.dumps(GOOD_ROW) * 2, "not JSON"),
    ],
)
def test_a_line_that_is_no_json_object_is_refused(tmp_path, line, reason):
    message = refused(write_lines(tmp_path, [GOOD_ROW, line]))
    assert message.startswith(f"{tmp_path / 'manifest.jsonl'}:3: ")
    assert reason in message


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"schema": "mmkd-manifest-2"}, f"not a manifest of schema '{SCHEMA}'"),
        ({"schema": None}, "not a manifest"),
        ({"version": 1}, "unknown key 'version'; allowed: dataset, flip_allowed, frame_rates, heads, schema"),
        ({"dataset": None}, "'dataset' must be a name"),
        ({"dataset": 3}, "'dataset' must be a name"),
        ({"flip_allowed": "false"}, "'flip_allowed' must be true or false, got 'false'"),
        ({"flip_allowed": 1}, "'flip_allowed' must be true or false"),
        ({"heads": None}, "'heads' must map each head"),
        ({"heads": ["verb"]}, "'heads' must map each head"),
        ({"heads": {"verb": "open"}}, "'heads' must map each head"),
        ({"heads": {"verb": {"open": 0, "close": 1}}}, "'heads' must map each head"),
        ({"heads": {"verb": [0, 1]}}, "'heads' must map each head"),
        ({"heads": {"verb": ["open"]}}, "head 'verb' needs at least two classes, got 1"),
        ({"heads": {"verb": ["open", "open"]}}, "head 'verb' lists class 'open' twice"),
        ({"heads": {"verb": ["open", "\udc80"]}}, "control characters"),
        ({"heads": {"Verb": ["open", "close"]}}, "'Verb' is not a lower-case identifier"),
        ({"heads": {"a/b": ["open", "close"]}}, "'a/b' is not a lower-case identifier"),
    ],
)
def test_a_wrong_header_is_refused_with_its_line(tmp_path, change, reason):
    path = write_lines(tmp_path, [GOOD_ROW], GOOD_HEADER | change)
    path.write_text("\n" + path.read_text())
    message = refused(path)
    assert message.startswith(f"{path}:2: ")
    assert reason in message


@pytest.mark.parametrize(
    ("header", "rows", "reason"),
    [
        ({"heads": {}}, [GOOD_ROW | {"labels": {}}], "needs at least one head"),
        ({"dataset": ""}, [GOOD_ROW], "data set name '' is empty"),
        ({}, [], "holds no clip"),
    ],
)
def test_a_manifest_that_is_wrong_as_a_whole_is_refused(tmp_path, header, rows, reason):
    assert reason in refused(write_lines(tmp_path, rows, GOOD_HEADER | header))


@pytest.mark.parametrize("again", ["clip", "CLIP", "Clip"])
def test_an_id_that_differs_in_case_alone_is_refused_with_both_lines(tmp_path, again):
    rows = [GOOD_ROW | {"clip_id": name} for name in ("clip", "other", again)]
    message = refused(write_lines(tmp_path, rows))
    assert message.endswith(f":4: clip id {again!r} already stands in line 2")
    with pytest.raises(InputError, match="clip 2: id 'STRASSE' is already that of clip 1"):
        replace(MANIFEST, clips=(replace(CLIP, clip_id="straße"), replace(CLIP, clip_id="STRASSE")))


def test_heads_named_twice_are_refused():
    with pytest.raises(InputError, match="each named once"):
        Manifest("epic", (HEADS[0], HEADS[0]), (replace(CLIP, labels={"verb": 0}),))


@pytest.mark.parametrize("data", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_refused(tmp_path, data):
    (tmp_path / "m").write_bytes(data)
    assert refused(tmp_path / "m").endswith("is empty; make it with `mmkd-cache manifest`")


def test_a_file_that_is_not_text_or_not_there_is_refused(tmp_path):
    (tmp_path / "m").write_bytes(b"\xff\xfe{\0}\0")
    for path in (tmp_path / "m", tmp_path / "none", tmp_path):
        with pytest.raises(InputError, match="cannot read the manifest") as caught:
            load_manifest(path)
        assert str(path) in str(caught.value)


def test_a_full_disk_leaves_the_old_manifest(tmp_path, monkeypatch):
    path = tmp_path / "manifest.jsonl"
    save_manifest(MANIFEST, path)
    before = path.read_bytes()

    def full(self, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(StorageError, match=re.escape(f"cannot write {path}: No space left")):
        save_manifest(replace(MANIFEST, dataset="new"), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_rates_of_pictures_are_part_of_a_manifest_only_where_they_are_stated(tmp_path):
    clips = (Clip("a", "P01/rgb_frames/P01_101", "train", {"verb": 0}),)
    heads = (Head("verb", ("open", "close")),)
    plain = Manifest("epic", heads, clips)
    rated = Manifest("epic", heads, clips, frame_rates=(FrameRate("*/P??_1??", 50), FrameRate("*", 60)))
    assert "frame_rates" not in next(iter(manifest_lines(plain)))
    assert plain.fingerprint() != rated.fingerprint()
    save_manifest(rated, tmp_path / "m.jsonl")
    found = load_manifest(tmp_path / "m.jsonl")
    assert found == rated
    assert [found.frame_rate(video) for video in ("P01/x/P01_101", "P01/x/P01_11", "P01/x/P01_1011")] == [
        50,
        60,
        60,
    ]
    assert plain.frame_rate("P01/x/P01_101") is None


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([["*", 0]], "frame rate 0.0 of '*' is not between 0 and 1000"),
        ([["*", "60"]], "'frame_rates' must be pairs"),
        ([["*", True]], "'frame_rates' must be pairs"),
        ([["", 60]], "frame rate pattern ''"),
        ({"*": 60}, "'frame_rates' must be pairs"),
        ([["*", 60, 1]], "'frame_rates' must be pairs"),
    ],
)
def test_rates_that_are_none_are_refused(tmp_path, value, reason):
    assert reason in refused(write_lines(tmp_path, [GOOD_ROW], GOOD_HEADER | {"frame_rates": value}))
