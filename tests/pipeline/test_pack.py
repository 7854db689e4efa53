"""Packing: what is read back are the pictures that OpenCV makes of the exact frames, at the video's own times."""

import json
import os
import signal
import subprocess
import sys
import time

import cv2
import h5py
import numpy as np
import pytest

from mmkd.cache_tools.frames.clip_set import ClipSet, DataRecipe
from mmkd.cache_tools.frames.data_frames import DataFrames
from mmkd.cache_tools.frames.source import VideoFiles
from mmkd.pipeline.pack.pack import pack_videos
from mmkd.pipeline.pack.pack_video import PackParams
from tests.helpers.barcode_videos import numbers_of, write_world
from tests.helpers.commands import ENVIRONMENT
from tests.helpers.in_process import call, call_ok, refused

NAMES = ("closed.mp4", "vp9.webm", "uneven.mp4")


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Three barcode videos, a fourth that is broken, and two manifests: of all, and of those that are well."""
    root = tmp_path_factory.mktemp("pack")
    write_world(root, NAMES)
    return root


def command(root, out, *options, manifest="well"):
    data = ("--manifest", root / f"{manifest}.jsonl", "--videos", root / "videos", "--workers", 0)
    return ("mmkd-cache", "pack", *data, "-o", out, *options)


def content(path):
    """All that a packed file says, picture by picture."""
    with h5py.File(path, "r") as file:
        return {
            name: (
                [bytes(data) for data in file[name]["frames"]],
                file[name]["times_seconds"][()].tolist(),
                file[name]["crc32"][()].tolist(),
            )
            for name in file
        }


def test_frames_are_opencv_s_own_pictures_of_the_exact_ones(videos, tmp_path):
    out = tmp_path / "frames.h5"
    report = json.loads(call_ok(*command(videos, out, "--quality", 90, "--short-side", 40, "--json")))
    assert (report["videos"], report["packed"], report["unusable"]) == (3, 3, {})
    packed, files = DataFrames(out), VideoFiles(videos / "videos")
    for name in NAMES:
        facts, own = packed.probe(name), files.probe(name)
        np.testing.assert_array_equal(facts.times_seconds, own.times_seconds)
        indices = np.arange(0, own.frame_count, 7)
        exact = files.read(name, indices, own).frames
        found = packed.read(name, indices, facts).frames
        assert found.shape[1] == 40
        for frame, source in zip(found, exact, strict=True):
            width = round(source.shape[1] * 40 / source.shape[0])
            small = cv2.resize(cv2.cvtColor(source, cv2.COLOR_RGB2BGR), (width, 40), interpolation=cv2.INTER_AREA)
            data = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 90])[1]
            again = cv2.cvtColor(cv2.imdecode(data, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
            np.testing.assert_array_equal(frame, again)


def test_frames_keep_their_size_and_number_where_they_are_small(videos, tmp_path):
    call_ok(*command(videos, tmp_path / "frames.h5"))
    packed = DataFrames(tmp_path / "frames.h5")
    facts = packed.probe("closed.mp4")
    assert (facts.width, facts.height) == (128, 72)
    indices = np.array([0, 31, 99])
    assert numbers_of(packed.read("closed.mp4", indices, facts).frames) == [0, 31, 99]


def test_a_bad_video_is_left_out_and_named(videos, tmp_path):
    done = call(*command(videos, tmp_path / "frames.h5", manifest="all"))
    assert done.code == 3
    assert "left out: broken.mp4: " in done.out
    assert set(content(tmp_path / "frames.h5")) == set(NAMES)
    call_ok(*command(videos, tmp_path / "more.h5", "--max-unusable", 1, manifest="all"))


def test_killed_at_any_moment_it_continues_to_the_same_content(videos, tmp_path):
    call_ok(*command(videos, tmp_path / "undisturbed.h5"))
    out = tmp_path / "frames.h5"
    line = [sys.executable, "-m", "mmkd.pipeline.cli", *map(str, command(videos, out)[1:])]
    script = "import sys; from mmkd.pipeline.cli import main; sys.argv[0] = 'mmkd-cache'; main()"
    line[1:3] = ["-c", script]
    for attempt in range(6):
        process = subprocess.Popen(line, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        parts = tmp_path / "frames.h5.parts"
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if len(list(parts.glob("*.h5"))) > min(attempt, 2):
                os.kill(process.pid, signal.SIGKILL)
                break
            time.sleep(0.005)
        if process.wait() == 0 or out.exists():
            break
    if process.returncode != 0:
        late = out.exists()  # killed after the last step, while the parts went
        out.unlink(missing_ok=True)
        report = json.loads(call_ok(*command(videos, out, "--json")))
        assert late or report["packed"] < 3
    assert content(out) == content(tmp_path / "undisturbed.h5")
    assert not (tmp_path / "frames.h5.parts").exists()


def test_other_parameters_and_files_of_others_are_refused(videos, tmp_path):
    out, parts = tmp_path / "frames.h5", tmp_path / "frames.h5.parts"
    done = call(*command(videos, out, "--set", "data.max_pixels=64"))
    assert done.code == 2  # no video is small enough, so nothing is written
    assert not out.exists()
    assert "was begun with quality 95" in refused(*command(videos, out, "--quality", 80))
    assert parts.is_dir()
    call_ok(*command(videos, out))
    before = out.read_bytes()
    assert "frames.h5 is there; it is an HDF5 file" in refused(*command(videos, out))
    assert out.read_bytes() == before


def test_other_people_s_files_are_neither_packed_over_nor_deleted(videos, tmp_path):
    out, parts = tmp_path / "frames.h5", tmp_path / "frames.h5.parts"
    parts.mkdir()
    notes = parts / "notes.h5"
    notes.write_text("theirs")
    error = refused(*command(videos, out))
    assert error.endswith(f"{parts} holds other things, such as notes.h5; name another file with -o")
    assert [path.name for path in parts.iterdir()] == ["notes.h5"]
    notes.rename(tmp_path / "notes.h5")
    assert call(*command(videos, out, "--set", "data.max_pixels=64")).code == 2
    (tmp_path / "notes.h5").rename(notes)  # put there after it was begun
    call_ok(*command(videos, out))
    assert [path.name for path in parts.iterdir()] == ["notes.h5"]
    assert notes.read_text() == "theirs"


def test_a_damaged_part_is_deleted_and_packed_again(videos, tmp_path):
    out, parts = tmp_path / "frames.h5", tmp_path / "frames.h5.parts"
    call_ok(*command(videos, tmp_path / "undisturbed.h5"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmkd.pipeline.pack.pack.put_together", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        clip_set = ClipSet(DataRecipe(manifest=videos / "well.jsonl", videos=videos / "videos", workers=0))
        with pytest.raises(KeyboardInterrupt):
            pack_videos(clip_set, out, PackParams(256, 95))
    part = sorted(parts.glob("*.h5"))[0]
    part.write_bytes(part.read_bytes()[:100])
    error = refused(*command(videos, out), code=74)
    assert "is damaged and deleted" in error
    call_ok(*command(videos, out))
    assert content(out) == content(tmp_path / "undisturbed.h5")


def test_a_build_reads_the_packed_file(quick, tmp_path):
    data = ("--manifest", quick.root / "manifest.jsonl", "--workers", 0)
    call_ok("mmkd-cache", "pack", *data, "--videos", quick.root / "videos", "-o", tmp_path / "frames.h5")
    experts = ("--expert", quick.root / "experts" / "rgb", "--views", 2)
    line = ("mmkd-cache", "build", "-c", quick.root / "teacher.yaml", *data, *experts)
    call_ok(*line, "--videos", tmp_path / "frames.h5", "-o", tmp_path / "cache")
    call_ok("mmkd-cache", "verify", tmp_path / "cache")
    mixed = call(*line, "--videos", quick.root / "videos", "-o", tmp_path / "cache")
    assert mixed.code == 5  # the videos are not what the cache was built from
