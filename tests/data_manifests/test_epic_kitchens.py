"""EPIC-KITCHENS-100's published files as a manifest: groups, times, layouts, counts, and what is wrong with a
file."""

import csv
import json
import shutil

import pytest

from mmkd.data_manifests.manifest import FrameRate
from mmkd.data_manifests.manifest_file import load_manifest
from mmkd.data_manifests.published.epic_kitchens import LAYOUTS, PUBLISHED_COUNTS
from tests.helpers.epic_world import TAIL_NOUNS, TAIL_VERBS, write_epic
from tests.helpers.in_process import call, call_ok, refused
from tests.helpers.places import DATA, needs_data

REAL = DATA / "epic100"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_epic(tmp_path_factory.mktemp("epic"))


@pytest.fixture
def annotations(world, tmp_path):
    """A copy of the annotation files, to be damaged."""
    return shutil.copytree(world.root / "annotations", tmp_path / "annotations")


def command(folder, out, *options):
    return ("mmkd-cache", "manifest", "epic-kitchens", folder, "-o", out, *options)


def test_clips_have_times_labels_groups_and_the_paths_of_the_download(world, tmp_path):
    out = tmp_path / "m.jsonl"
    said = call_ok(*command(world.root / "annotations", out, "--videos", world.videos))
    made = load_manifest(out)
    assert [(head.name, len(head.classes)) for head in made.heads] == [("verb", 97), ("noun", 300)]
    assert made.frame_rates == ()
    assert made.heads[1].classes[250] == "noun:250"
    for split, rows in world.rows.items():
        for clip, row in zip(made.split(split), rows, strict=True):
            assert clip.clip_id == row["narration_id"]
            assert clip.video == f"{row['participant_id']}/videos/{row['video_id']}.MP4"
            assert clip.end_seconds - clip.start_seconds == pytest.approx(1.5)
            labelled = {"verb": int(row["verb_class"]), "noun": int(row["noun_class"])}
            assert clip.labels == (labelled if split != "test" else {"verb": None, "noun": None})
            verb, noun = labelled["verb"] in TAIL_VERBS, labelled["noun"] in TAIL_NOUNS
            groups = {"unseen": row["participant_id"] == "P18", "tail_verb": verb, "tail_noun": noun}
            groups["tail_action"] = verb or noun
            if split == "validation":
                assert set(clip.groups) == {name for name, member in groups.items() if member}
    assert all(not clip.groups for clip in made.split("train"))
    assert "validation: 9 clips (published: 9668)" in said
    assert "unseen 5 (published: 1065)" in said


def test_seconds_are_the_time_stamps_and_not_the_nominal_frames(world, tmp_path):
    call_ok(*command(world.root / "annotations", tmp_path / "m.jsonl"))
    clip = load_manifest(tmp_path / "m.jsonl").split("validation")[1]
    row = world.rows["validation"][1]
    assert row["start_timestamp"] == "00:00:02.00"
    assert (clip.start_seconds, clip.end_seconds) == (2.0, 3.5)


@pytest.mark.parametrize(
    ("layout", "video"),
    [
        ("videos", "P18/videos/P18_01.MP4"),
        ("trimmed", "P18/P18_01_0.mp4"),
        ("frames", "P18/rgb_frames/P18_01"),
        ("tars", "P18/rgb_frames/P18_01.tar"),
        ("{video_id}.mkv", "P18_01.mkv"),
    ],
)
def test_layouts(world, tmp_path, layout, video):
    out = tmp_path / "m.jsonl"
    call_ok(*command(world.root / "annotations", out, "--layout", layout, "--where", "video_id=P18_01"))
    made = load_manifest(out)
    clip = made.split("validation")[0]
    assert clip.video == video
    assert clip.end_seconds == (None if layout == "trimmed" else 1.75)
    stills = layout in ("frames", "tars")
    assert made.frame_rate(video) == (60.0 if stills else None)
    assert made.frame_rate(video.replace("P18_01", "P18_101")) == (50.0 if stills else None)


def test_participants_and_columns_filter(world, tmp_path):
    out = tmp_path / "m.jsonl"
    options = ("--participants", "P02,P18", "--where", "verb=verb-1")
    found = json.loads(call_ok(*command(world.root / "annotations", out, *options, "--json")))
    made = load_manifest(out)
    assert {clip.clip_id[:3] for clip in made.clips} == {"P02", "P18"}
    assert {clip.labels["verb"] for clip in made.clips} == {1}
    assert found["splits"]["train"] == {"clips": len(made.split("train"))}
    assert found["splits"]["validation"]["unseen"] == sum("unseen" in c.groups for c in made.split("validation"))
    nothing = refused(*command(world.root / "annotations", out, "--participants", "P99"))
    assert "no row" in nothing


@needs_data
def test_the_published_files_give_the_counts_that_they_hold(tmp_path):
    for path in REAL.glob("*.csv"):
        shutil.copy(path, tmp_path / path.name)
    (tmp_path / "EPIC_100_validation_first800.csv").rename(tmp_path / "EPIC_100_validation.csv")
    found = json.loads(call_ok(*command(tmp_path, tmp_path / "m.jsonl", "--json")))["splits"]["validation"]
    rows = list(csv.DictReader((tmp_path / "EPIC_100_validation.csv").read_text().splitlines()))
    tail = {
        kind: {line.strip() for line in (REAL / f"EPIC_100_tail_{kind}s.csv").read_text().splitlines()[1:]}
        for kind in ("verb", "noun")
    }
    verb = [row["verb_class"] in tail["verb"] for row in rows]
    noun = [row["noun_class"] in tail["noun"] for row in rows]
    unseen = sum(row["participant_id"] in ("P18", "P32") for row in rows)
    either = sum(v or n for v, n in zip(verb, noun, strict=True))
    wanted = {"clips": 800, "tail_verb": sum(verb), "tail_noun": sum(noun), "tail_action": either}
    assert found == (wanted | {"unseen": unseen} if unseen else wanted)
    made = load_manifest(tmp_path / "m.jsonl")
    assert made.heads[0].classes[:2] == ("take", "put")
    assert (made.clips[0].start_seconds, made.clips[0].end_seconds) == (0.0, 1.89)
    assert PUBLISHED_COUNTS["validation"] == {
        "clips": 9668, "unseen": 1065, "tail_verb": 1760, "tail_noun": 1900, "tail_action": 3105,
    }  # fmt: skip


def test_rates_are_those_of_the_official_frames():
    rates = LAYOUTS["frames"].frame_rates
    assert rates == (FrameRate("*/P??_1??", 50.0), FrameRate("*", 60.0))


FAULTS = [
    ("EPIC_100_train.csv", "verb_class", "verb_klass", None, "rename"),
    ("EPIC_100_train.csv", "00:00:01.75", "00:00:00.10", "EPIC_100_train.csv:2: the segment ends at 0.1 s", "text"),
    (
        "EPIC_100_train.csv",
        "00:00:01.75",
        "00:00:71.75",
        "EPIC_100_train.csv:2: stop_timestamp '00:00:71.75'",
        "text",
    ),
    (
        "EPIC_100_train.csv",
        "verb-0,0,",
        "verb-0,97,",
        "EPIC_100_train.csv:2: verb_class 97 is outside the verb",
        "text",
    ),
    ("EPIC_100_train.csv", "verb-0,0,", f"verb-0,{'9' * 5000},", "is outside the verb classes (0..96)", "text"),
    ("EPIC_100_train.csv", "verb-0,0,", "verb-0,-1,", "verb_class '-1' is not a whole number", "text"),
    ("EPIC_100_train.csv", "P01_11_1,", "P01_11_0,", "EPIC_100_train.csv:3: 'P01_11_0' already stands in", "text"),
    ("EPIC_100_train.csv", "start_timestamp", "start_timestamps", "did you mean 'start_timestamps'?", "text"),
    ("EPIC_100_noun_classes.csv", "\n1,", "\n2,", "EPIC_100_noun_classes.csv:3: class id '2' where 1", "text"),
    ("EPIC_100_noun_classes.csv", "noun:1,", "noun:0,", "lists class 'noun:0' twice", "text"),
    ("EPIC_100_train.csv", "P01_11_2,P01,", "P01_11_2,P01,x,", "16 values in a table of 15 columns", "text"),
]


@pytest.mark.parametrize(("name", "old", "new", "message", "kind"), FAULTS)
def test_a_fault_names_file_and_line_and_nothing_is_written(annotations, tmp_path, name, old, new, message, kind):
    path = annotations / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    out = tmp_path / "m.jsonl"
    if kind == "rename":  # without its class column a split has no labels, as the test split
        call_ok(*command(annotations, out))
        assert all(clip.labels["verb"] is None for clip in load_manifest(out).split("train"))
        return
    assert message in refused(*command(annotations, out))
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--where", "verbs=x"), "no column 'verbs'; did you mean 'verb'?"),
        (("--where", "verb"), "--where 'verb': expected COLUMN=VALUE"),
        (("--layout", "video"), "--layout 'video': choose among videos, trimmed, frames, tars"),
        (("--layout", "{video}.mp4"), "'video' is no column in braces"),
        (("--participants", "P01,P99"), "--participants P99: no row of"),
        (("--split", "train=nowhere.csv"), "cannot read nowhere.csv"),
    ],
)
def test_bad_options_are_one_line(world, tmp_path, options, message):
    error = refused(*command(world.root / "annotations", tmp_path / "m.jsonl", *options))
    assert message in error
    assert not (tmp_path / "m.jsonl").exists()


def test_another_folder_is_not_taken_for_the_annotations(world, tmp_path):
    assert "lacks EPIC_100_verb_classes.csv" in refused(*command(world.videos, tmp_path / "m.jsonl"))


def test_windows_files_are_read(annotations, tmp_path):
    path = annotations / "EPIC_100_train.csv"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    call_ok(*command(annotations, tmp_path / "m.jsonl"))
    assert len(load_manifest(tmp_path / "m.jsonl").split("train")) == 12


def test_a_file_that_is_no_manifest_is_not_written_over(world, tmp_path):
    mine = tmp_path / "labels.json"
    mine.write_text('{"a": "0", "b": "1"}')
    error = refused(*command(world.root / "annotations", mine))
    assert "labels.json is there, and is not a manifest; it is a list of classes" in error
    assert mine.read_text() == '{"a": "0", "b": "1"}'
    call_ok(*command(world.root / "annotations", tmp_path / "m.jsonl"))
    call_ok(*command(world.root / "annotations", tmp_path / "m.jsonl"))  # a manifest is


def test_videos_that_are_not_there_are_counted(world, tmp_path):
    (tmp_path / "P01" / "videos").mkdir(parents=True)
    shutil.copy(world.videos / "P01/videos/P01_11.MP4", tmp_path / "P01/videos/P01_11.MP4")
    done = call(*command(world.root / "annotations", tmp_path / "m.jsonl", "--videos", tmp_path))
    assert done.code == 0
    assert "4 of 5 videos not found" in done.err


@pytest.mark.parametrize(
    ("path", "layout"),
    [
        ("P01/P01_11_0.mp4", "trimmed"),
        ("P01/rgb_frames/P01_11/frame_0000000001.jpg", "frames"),
        ("P01/rgb_frames/P01_11.tar", "tars"),
        ("P01_11.MP4", "{video_id}.MP4"),
        ("P01/P01_11.mp4", "{participant_id}/{video_id}.mp4"),
        ("elsewhere/P01_11.MP4", None),
    ],
)
def test_a_folder_of_another_layout_is_recognised(world, tmp_path, path, layout):
    videos = tmp_path / "videos"
    (videos / path).parent.mkdir(parents=True)
    (videos / path).write_bytes(b"")
    folder, out = world.root / "annotations", tmp_path / "m.jsonl"
    error = refused(*command(folder, out, "--videos", videos))
    assert "P01/videos/P01_11.MP4" in error
    assert not out.exists()
    assert (f"it has the layout of --layout '{layout}'" in error) if layout else ("--layout" not in error)
    if layout:  # what it says to give is taken
        call_ok(*command(folder, out, "--videos", videos, "--layout", layout))


@pytest.mark.parametrize(
    "path", ["{video_id}", "{participant_id}/{video_id}.tar", "{participant_id}/{narration_id}"]
)
def test_pictures_at_a_path_of_ones_own_have_the_nominal_rates(world, tmp_path, path):
    call_ok(*command(world.root / "annotations", tmp_path / "m.jsonl", "--layout", path))
    made = load_manifest(tmp_path / "m.jsonl")
    for video_id, rate in (("P18_01", 60.0), ("P18_11", 60.0), ("P18_101", 50.0)):
        named = path.format(participant_id="P18", video_id=video_id, narration_id=f"{video_id}_7")
        assert made.frame_rate(named) == rate


def test_segments_that_end_after_their_video_are_told(annotations, tmp_path, caplog):
    info = annotations / "EPIC_100_video_info.csv"
    info.write_text("video_id,duration,fps,resolution\nP01_11,1000,60,16x16\nP18_01,1.745,60,16x16\n")
    call_ok(*command(annotations, tmp_path / "m.jsonl", "--where", "narration_id=P18_01_0"))  # it ends at 1.75
    assert "after video" not in caplog.text
    done = call(*command(annotations, tmp_path / "m.jsonl"))
    assert done.code == 0
    said = done.err + caplog.text
    assert "the segment ends at 00:00:03.50, after video P18_01, which has 1.745 s" in said
    late = sum(c.video.endswith("P18_01.MP4") for c in load_manifest(tmp_path / "m.jsonl").clips) - 1
    assert late > 0
    assert f"({late} segment" in said
