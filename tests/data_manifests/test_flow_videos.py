"""Which videos a command line names: links, hidden files, lists as editors save them, two files of one name."""

import os
import shutil

import pytest

from mmkd.data_manifests.errors import InputError
from mmkd.data_manifests.video_files import Naming, find_videos
from tests.helpers.flow_videos import write_texture
from tests.helpers.in_process import call_ok, refused

QUICK = ("--method", "dis", "--preset", "ultrafast", "--workers", 0)


def names(*arguments, **naming):
    return [video.name for video in find_videos([str(argument) for argument in arguments], naming=Naming(**naming))]


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_linked_folders_and_files_are_taken_and_hidden_ones_are_not(tmp_path):
    root = tmp_path / "v"
    touch(root / "P01" / "a.mp4", tmp_path / "disk2" / "b.mp4", tmp_path / "elsewhere.mp4")
    touch(root / "._c.mp4", root / ".ipynb_checkpoints" / "d.mp4", root / "P01" / "._a.mp4", root / "notes.txt")
    (root / "P02").symlink_to(tmp_path / "disk2")
    (root / "e.mp4").symlink_to(tmp_path / "elsewhere.mp4")
    (root / "gone.mp4").symlink_to(tmp_path / "nothing.mp4")
    os.mkfifo(root / "pipe.mp4")
    assert names(root) == ["P01/a", "P02/b", "e", "gone"], "a link to nothing is a missing video, a pipe is none"


def test_links_that_lead_round_end_and_a_folder_keeps_its_own_name(tmp_path):
    root = tmp_path / "v"
    touch(root / "z" / "a.mp4")
    (root / "z" / "up").symlink_to(root)
    (root / "again").symlink_to(root / "z")
    (root / "self").symlink_to(root / "self")
    for number in range(6):  # each links to each other: 720 ways through them
        (tmp_path / "net" / str(number)).mkdir(parents=True)
        for other in range(6):
            (tmp_path / "net" / str(number) / f"to{other}").symlink_to(tmp_path / "net" / str(other))
    touch(tmp_path / "net" / "3" / "b.mp4")
    assert names(root) == ["z/a"]
    assert names(tmp_path / "net") == ["3/b"]


@pytest.mark.parametrize(
    "encode",
    [
        lambda text: b"\xef\xbb\xbf" + text.encode(),
        lambda text: text.replace("\n", "\r\n").encode(),
        lambda text: b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode(),
        lambda text: text.encode("utf-16"),
        lambda text: text.rstrip("\n").encode(),
    ],
)
def test_a_list_is_read_as_any_editor_saves_it(tmp_path, encode):
    paths = [tmp_path / name for name in ("a.mp4", "b\u2028c.mp4", " d.mp4", "é.mp4")]
    touch(*paths)
    (tmp_path / "list.txt").write_bytes(encode("".join(f"{path}\n" for path in paths) + "\n"))
    assert names(f"@{tmp_path / 'list.txt'}") == ["a", "b\u2028c", " d", "é"]


def test_a_list_may_hold_names_that_are_not_utf8(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.mp4"
    os.close(os.open(path, os.O_CREAT))
    (tmp_path / "list.txt").write_bytes(path + b"\n")
    assert names(f"@{tmp_path / 'list.txt'}") == ["caf\udce9"]


def test_a_list_that_is_a_video_is_refused(tmp_path):
    (tmp_path / "a.mp4").write_bytes(bytes(100))
    with pytest.raises(InputError, match=r"a\.mp4 is not a text file; give one with a video's path on each line"):
        names(f"@{tmp_path / 'a.mp4'}")


def test_the_advice_for_two_endings_of_one_name_works(tmp_path):
    write_texture(tmp_path / "v" / "x.webm", 4)
    shutil.copy(tmp_path / "v" / "x.webm", tmp_path / "v" / "x.mkv")
    command = ("mmkd-cache", "flow", *QUICK, tmp_path / "v", "-o", tmp_path / "out")
    for more in ((), ("--class-folder",)):
        assert refused(*command, *more).endswith("give --keep-ending, and their results keep the endings")
    call_ok(*command, "--keep-ending")
    assert {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()} == {".done", "x.mkv", "x.webm"}


def test_the_advice_for_two_folders_with_one_name_works(tmp_path):
    touch(tmp_path / "A" / "x.mp4", tmp_path / "B" / "x.mp4", tmp_path / "B" / "A" / "x.mp4")
    files = (tmp_path / "A" / "x.mp4", tmp_path / "B" / "x.mp4")
    with pytest.raises(InputError, match="would both be 'x'; give --class-folder"):
        names(*files)
    assert names(*files, class_folder=True) == ["A/x", "B/x"]
    for arguments, more in (
        ((tmp_path / "A", tmp_path / "B"), {}),
        ((tmp_path / "A" / "x.mp4", tmp_path / "B" / "A" / "x.mp4"), {"class_folder": True}),
    ):
        with pytest.raises(InputError, match=f"name the folder {tmp_path}, and results keep the paths below it"):
            names(*arguments, **more)
    assert names(tmp_path) == ["A/x", "B/A/x", "B/x"]


def test_one_file_by_two_ways_is_one_video(tmp_path):
    touch(tmp_path / "a" / "x.mp4")
    assert names(tmp_path / "a" / "x.mp4", tmp_path / "a" / ".." / "a" / "x.mp4", tmp_path / "a" / "x.mp4") == ["x"]


def test_a_hidden_file_that_is_named_is_refused_with_what_helps(tmp_path):
    touch(tmp_path / "._x.mp4")
    with pytest.raises(InputError, match="is a hidden file; leave it out, or give it a name that does not begin"):
        names(tmp_path / "._x.mp4")
