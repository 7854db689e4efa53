"""Anyone's own list of clips: columns, class lists, and what is wrong with a line."""

import io
import os
import tarfile

import cv2
import h5py
import numpy as np
import pytest

from mmkd.data_manifests.manifest import FrameRate
from mmkd.data_manifests.manifest_file import load_manifest
from tests.helpers.in_process import call_ok, refused

LIST = """video,start,end,split,groups,action,object
a.mp4,0,2.5,train,,open,door
a.mp4,00:00:02.5,00:00:04,train,night; far ,close,"door, big"
b/b.mp4,,,test,,open,
"""


PICTURE = cv2.imencode(".jpg", np.zeros((8, 8, 3), np.uint8))[1]
TWO = "video,start,end,action\n{0},0,1,open\n{0},1,2,close\n"


def frames_in_hdf5(root):
    with h5py.File(root / "frames.h5", "w") as file:
        file.create_dataset("a", (1,), h5py.vlen_dtype(np.uint8))[0] = PICTURE
    return root / "frames.h5"


def frames_in_a_tar(root):
    with tarfile.open(root / "a.tar", "w") as archive:
        member = tarfile.TarInfo("frame_0000000001.jpg")
        member.size = PICTURE.nbytes
        archive.addfile(member, io.BytesIO(PICTURE.tobytes()))
    return root


def frames_in_a_folder(root):
    (root / "a").mkdir()
    return root


@pytest.fixture
def listed(tmp_path):
    def run(text=LIST, *options, heads=("action",), ok=True):
        path = tmp_path / "clips.csv"
        path.write_text(text)
        named = [part for head in heads for part in ("--head", head)]
        line = (
            "mmkd-cache",
            "manifest",
            "csv",
            path,
            "--dataset",
            "mine",
            *named,
            "-o",
            tmp_path / "m.jsonl",
            *options,
        )
        if not ok:
            error = refused(*line)
            assert not (tmp_path / "m.jsonl").exists()
            return error
        call_ok(*line)
        return load_manifest(tmp_path / "m.jsonl")

    return run


def test_a_list_is_a_manifest(listed):
    made = listed(heads=("action", "thing=object"))
    assert [(head.name, head.classes) for head in made.heads] == [
        ("action", ("close", "open")),
        ("thing", ("door", "door, big")),
    ]
    first, second, third = made.clips
    assert (first.clip_id, first.start_seconds, first.end_seconds) == ("a.mp4", 0.0, 2.5)
    assert (second.clip_id, second.start_seconds, second.end_seconds) == ("a.mp4@2.5", 2.5, 4.0)
    assert second.groups == ("night", "far")
    assert second.labels == {"action": 0, "thing": 1}
    assert (third.split, third.start_seconds, third.end_seconds) == ("test", 0.0, None)
    assert third.labels == {"action": 1, "thing": None}
    assert made.frame_rates == ()
    assert not made.flip_allowed


def test_only_videos_and_labels_are_needed(listed):
    made = listed(
        "video,action\na,0\nb,2\n", "--split", "validation", "--frames-per-second", "12", "--flip-allowed"
    )
    assert made.heads[0].classes == ("0", "1", "2")
    assert [clip.labels["action"] for clip in made.clips] == [0, 2]
    assert made.splits == ("validation",)
    assert made.frame_rates == (FrameRate("*", 12.0),)
    assert made.frame_rate("a") == 12
    assert made.flip_allowed


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("classes.txt", "open\nclose\n\n"),
        ("classes.csv", "id,key,instances\n0,open,x\n1,close,y\n"),
        ("labels.json", '{"close": "1", "open": 0}'),
    ],
)
def test_class_lists_of_every_form_give_the_numbers(listed, tmp_path, name, text):
    (tmp_path / name).write_text(text)
    made = listed(LIST, "--classes", f"action={tmp_path / name}")
    assert made.heads[0].classes == ("open", "close")
    assert [clip.labels["action"] for clip in made.clips] == [0, 1, 0]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("vdeo,action\na,x\n", (), "no column 'video'; did you mean 'vdeo'?"),
        ("video,actoin\na,x\n", (), "no column 'action'; did you mean 'actoin'?"),
        ("video,action\na,x\na,y\n", (), "clips.csv:3: clip 'a' already stands in"),
        ("video,action,start,end\na,x,3,2\nb,y,,\n", (), "clips.csv:2: the segment ends at 2 s, and begins at 3 s"),
        ("video,action,start\na,x,soon\nb,y,1\n", (), "clips.csv:2: start 'soon' is no time"),
        ("video,action,start\na,x,-1\nb,y,1\n", (), "clips.csv:2: start '-1' is no time"),
        ("video,action\n../a,x\nb,y\n", (), "clips.csv:2: clip '../a': video '../a' must be a path inside"),
        ("video,action\n,x\nb,y\n", (), "clips.csv:2: video is empty"),
        ("video,action\na,x\nb,x\n", (), "clips.csv: head 'action' needs at least two classes"),
        ("video,action\na,x,y\n", (), "clips.csv:2: 3 values in a table of 2 columns"),
        ("video,action,action\na,x,y\n", (), "column 'action' stands there twice"),
        ("video,action\na,1\nb,99999999999\n", (), "clips.csv:3: action 99999999999 is too large a class number"),
        ("video,action\n", (), "holds no row below its header"),
        ("", (), "is empty"),
        (
            "video,action\na,7\nb,x\n",
            ("--classes", "action=CLASSES"),
            "clips.csv:2: action 7 is outside the action",
        ),
        (
            "video,action\na,x\nb,zz\n",
            ("--classes", "action=CLASSES"),
            "clips.csv:3: action 'zz' is no class of head",
        ),
        (
            "video,action\na,x\nb,y\n",
            ("--classes", "noun=CLASSES"),
            "--classes noun: there is no head of that name",
        ),
        (
            "video,action\na,x\nb,y\n",
            ("--head", "start"),
            "--head start=start: that column has a meaning of its own",
        ),
        ("video,action\na,x\nb,y\n", ("--frames-per-second", "0"), "frame rate 0.0 of '*' is not between"),
    ],
)
def test_a_fault_names_the_line_and_nothing_is_written(listed, tmp_path, text, options, message):
    (tmp_path / "classes.txt").write_text("x\ny\n")
    options = [str(option).replace("CLASSES", str(tmp_path / "classes.txt")) for option in options]
    assert message in listed(text, *options, ok=False)


def test_a_list_of_classes_is_a_file_of_utf_8_lines(listed, tmp_path):
    path = tmp_path / "classes.txt"
    path.write_bytes("\ufeffopen\u2028wide\r\nclose\r\n".encode())  # U+2028 ends no line
    text = "video,action\na,open\u2028wide\nb,close\n"
    assert listed(text, "--classes", f"action={path}").heads[0].classes == ("open\u2028wide", "close")
    (tmp_path / "m.jsonl").unlink()
    path.write_bytes(b"open\n\xff\n")
    assert "classes.txt: not UTF-8 text (byte 5)" in listed(LIST, "--classes", f"action={path}", ok=False)
    path.unlink()
    os.mkfifo(path)
    assert "classes.txt" in listed(LIST, "--classes", f"action={path}", ok=False)


def test_text_that_is_not_utf_8_is_named(tmp_path):
    (tmp_path / "clips.csv").write_bytes(b"video,action\n\xff,x\n")
    line = ("mmkd-cache", "manifest", "csv", tmp_path / "clips.csv", "--dataset", "d", "--head", "action")
    assert "not UTF-8 text (byte 13)" in refused(*line, "-o", tmp_path / "m.jsonl")


@pytest.mark.parametrize("there", [frames_in_hdf5, frames_in_a_tar, frames_in_a_folder])
def test_videos_are_looked_for_as_training_reads_them(listed, tmp_path, there):
    """Frames in an HDF5 file, a tar or a folder stand for the video file that the list names."""
    (tmp_path / "videos").mkdir()
    videos = there(tmp_path / "videos")
    listed(TWO.format("a.mp4"), "--videos", videos)
    (tmp_path / "m.jsonl").unlink()
    error = listed(TWO.format("b.mp4"), "--videos", videos, ok=False)
    assert f"none of 1 video is in {videos}, e.g. b.mp4" in error


def test_a_place_of_videos_that_is_none_is_one_line(listed, tmp_path):
    error = listed(LIST, "--videos", tmp_path / "nowhere", ok=False)
    assert f"the video folder {tmp_path / 'nowhere'} does not exist; give it with --videos" in error
    tar = frames_in_a_tar(tmp_path) / "a.tar"
    error = listed(LIST, "--videos", tar, ok=False)
    assert f"{tar} is no HDF5 file, or a damaged one; --videos names an HDF5 file of frames, or the folder" in error
