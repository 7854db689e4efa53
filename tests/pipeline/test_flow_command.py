"""`mmkd-cache flow`: the files of denseflow and EPIC byte for byte; one file; resuming, stopping, failures."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest
import torch

from mmkd.cache_tools.frames.source import VideoFiles
from mmkd.pipeline.flow.methods import dis_flow
from mmkd.pipeline.flow_command import blocks as flow_blocks
from mmkd.pipeline.flow_command import run as flow_command
from mmkd.pipeline.flow_command.readers import jpeg_pairs, read_hdf5, read_i3d, read_jpeg_folder
from mmkd.pipeline.tvl1 import TVL1Params, tvl1_flow
from tests.helpers.commands import ENVIRONMENT
from tests.helpers.flow_videos import write_texture
from tests.helpers.in_process import call, call_ok, refused
from tests.helpers.places import DATA, skip_without_data

REAL = DATA / "videos"
QUICK = ("--preset", "fast", "--device", "cpu", "--workers", 0)


def flow(*arguments):
    return call_ok("mmkd-cache", "flow", *QUICK, *arguments)


def files_below(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flow_files(folder):
    return {name: data for name, data in files_below(folder).items() if name.endswith((".jpg", ".npy"))}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    root = tmp_path_factory.mktemp("videos")
    write_texture(root / "one.webm", 9, seed=1)
    write_texture(root / "more" / "two.webm", 5, size=(50, 66), shift=(-1, 2), seed=2)
    return root


# ---- parity with straightforward computations of the same conventions


def bgr_frames(path):
    capture = cv2.VideoCapture(str(path))
    while True:
        ok, frame = capture.read()
        if not ok:
            return
        yield frame


def one_pair(first, second):
    images = (torch.from_numpy(image)[None] for image in (first, second))
    return tvl1_flow(*images, params=TVL1Params.fast())[0].numpy().astype(np.float64)


def denseflow_files(path, *, bound, step, new_short):
    """What denseflow's main loop writes, with our flow in the place of OpenCV's."""
    greys = []
    for frame in bgr_frames(path):
        height, width = frame.shape[:2]
        grey = cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY)
        if 0 < new_short < min(width, height):
            size = (new_short, round(height / width * new_short))
            if width >= height:
                size = (round(width / height * new_short), new_short)
            grey = cv2.resize(grey, size)
        greys.append(grey)
    files = {}
    for i in range(len(greys) - abs(step)):
        a, b = (i, i + step) if step > 0 else (i - step, i)
        middle = f"p{step}_" if step > 1 else f"m{-step}_" if step < 0 else ""
        for axis, plane in zip("xy", one_pair(greys[a], greys[b]), strict=True):
            codes = np.rint(255 * (plane + bound) / (2 * bound)).clip(0, 255).astype(np.uint8)
            files[f"flow_{axis}_{middle}{a:05d}.jpg"] = cv2.imencode(".jpg", codes)[1].tobytes()
    return files


def epic_files(path, *, bound, stride, dilation):
    """What furnari-flow's main loop writes, likewise."""
    queue, files, size = deque(), {}, None
    for index, frame in enumerate(bgr_frames(path)):
        if size is None:
            factor = max(np.float32(256) / np.float32(side) for side in frame.shape[1::-1])
            size = tuple(int(np.float32(side) * factor) // 2 * 2 for side in frame.shape[1::-1])
        small = cv2.resize(frame, size, interpolation=cv2.INTER_CUBIC)
        queue.append(cv2.cvtColor(small, cv2.COLOR_BGR2GRAY))
        if len(queue) <= dilation:
            continue
        first = queue.popleft()
        if (index - dilation) % stride == 0:
            for folder, plane in zip("uv", one_pair(first, queue[-1]), strict=True):
                codes = np.rint(255 * (plane + bound) / (2 * bound)).clip(0, 255).astype(np.uint8)
                name = f"{folder}/frame_{len(files) // 2 + 1:010d}.jpg"
                files[name] = cv2.imencode(".jpg", codes)[1].tobytes()
    return files


def a_video(tmp_path, kind):
    if kind == "synthetic":
        return write_texture(tmp_path / "clip.webm", 6, size=(96, 130), shift=(3, -2))
    skip_without_data()
    return REAL / "rubber-whale.mp4"


@pytest.mark.parametrize("kind", ["synthetic", "real"])
@pytest.mark.parametrize("step", [1, 2, -1])
def test_denseflow_s_files_are_those_of_its_own_loop(tmp_path, kind, step):
    path = a_video(tmp_path, kind)
    flow(path, "-o", tmp_path / "out", "--bound", 8, "--step", step, "--new-short", 80)
    expected = denseflow_files(path, bound=8, step=step, new_short=80)
    assert len(expected) >= 6
    assert files_below(tmp_path / "out" / path.stem) == expected
    assert (tmp_path / "out" / ".done" / path.stem).is_file()


@pytest.mark.parametrize(("kind", "stride", "step"), [("synthetic", 2, 3), ("synthetic", 1, 1), ("real", 2, 3)])
def test_epic_s_files_are_those_of_its_own_loop(tmp_path, kind, stride, step):
    path = a_video(tmp_path, kind)
    sizes = ("--layout", "epic", "--enlarge", "--bound", 25)
    flow(path, "-o", tmp_path / "out", *sizes, "--stride", stride, "--step", step)
    expected = epic_files(path, bound=25, stride=stride, dilation=step)
    assert len(expected) >= 4
    assert files_below(tmp_path / "out" / path.stem) == expected


def test_mmaction_s_names_and_size(tmp_path, videos):
    flow(videos / "one.webm", "-o", tmp_path, "--layout", "mmaction", "--new-width", 40, "--new-height", 30)
    names = {f"one/{axis}_{number:05d}.jpg" for axis in "xy" for number in range(1, 9)}
    assert set(flow_files(tmp_path)) == names
    assert read_jpeg_folder(tmp_path / "one", np.arange(8), layout="mmaction", bound_px=20).shape == (8, 2, 30, 40)


def test_i3d_s_floats_at_25_frames_a_second(tmp_path, videos):
    flow(videos / "one.webm", "-o", tmp_path, "--layout", "i3d", "--short-side", 48)
    stored = np.load(tmp_path / "one.npy")
    assert stored.shape == (18, 48, 64, 2)  # 9 frames at 12 a second last 0.75 s: 19 frames at 25 a second
    still = np.abs(stored).max((1, 2, 3)) == 0
    assert still.sum() == 10, "a frame that is shown twice has not moved"
    assert np.median(stored[~still][..., 0]) == pytest.approx(2 / 20, abs=0.02)
    assert read_i3d(tmp_path / "one.npy", np.array([1])).max() > 1


# ---- independence of blocks, processes and devices


def test_files_do_not_depend_on_where_blocks_are_cut_or_who_computes(tmp_path, videos, monkeypatch):
    options = (videos, "--layout", "denseflow", "--step", 2)
    flow(*options, "-o", tmp_path / "whole")
    monkeypatch.setattr(flow_blocks, "pairs_per_block", lambda size, compute: 2)
    asked = []
    stream = VideoFiles.stream

    def counted(self, video, indices, facts):
        asked.append(len(indices))
        return stream(self, video, indices, facts)

    monkeypatch.setattr(VideoFiles, "stream", counted)
    flow(*options, "-o", tmp_path / "blocks")
    assert max(asked) == 4, "a block of two pairs at step 2 needs four frames"
    assert flow_files(tmp_path / "blocks") == flow_files(tmp_path / "whole")
    monkeypatch.undo()
    flow(*options, "-o", tmp_path / "processes", "--workers", 2)
    assert flow_files(tmp_path / "processes") == flow_files(tmp_path / "whole")


def test_what_another_device_computes_goes_the_same_way(tmp_path, videos, monkeypatch):
    """As on a GPU: processes decode, the command computes; here on the CPU, by calling it another device."""

    class Elsewhere:
        type = "elsewhere"

    block_flow = flow_command.block_flow
    monkeypatch.setattr(flow_command, "method_device", lambda *_: Elsewhere())
    monkeypatch.setattr(flow_command, "chosen_path", lambda _: "torch")
    monkeypatch.setattr(flow_command, "block_flow", lambda block, frames, _: block_flow(block, frames, "cpu"))
    options = (videos, "--preview", tmp_path / "preview")
    flow(*options, "-o", tmp_path / "elsewhere")
    monkeypatch.undo()
    flow(*options, "-o", tmp_path / "cpu")
    assert len(flow_files(tmp_path / "cpu")) == 2 * (8 + 4)
    assert flow_files(tmp_path / "elsewhere") == flow_files(tmp_path / "cpu")
    assert "flow of 0 videos written, 2 there already" in flow(*options, "-o", tmp_path / "cpu")
    with pytest.raises(AssertionError, match="computed_by 'elsewhere, torch', now 'cpu, "):
        flow(*options, "-o", tmp_path / "elsewhere")


def test_other_methods_by_name(tmp_path, videos):
    call_ok("mmkd-cache", "flow", videos / "one.webm", "-o", tmp_path, "--method", "dis", "--workers", 0)
    greys = [cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY) for frame in bgr_frames(videos / "one.webm")]
    images = torch.from_numpy(np.stack(greys))
    expected = dis_flow(images[:-1], images[1:], preset="medium").numpy()
    read = read_jpeg_folder(tmp_path / "one", np.arange(8), layout="denseflow", bound_px=20)
    assert np.abs(read - expected).mean() < 0.2
    assert json.loads((tmp_path / "mmkd-flow.json").read_text())["parameters"]["preset"] == "medium"


def test_raft_is_given_colour(tmp_path, videos, monkeypatch):
    from safetensors.torch import save_file
    from torchvision.models.optical_flow import raft_small

    from mmkd.pipeline.flow import raft

    torch.manual_seed(0)
    network = raft_small(weights=None, progress=False)
    save_file(network.state_dict(), tmp_path / "raft.safetensors")
    given = []
    monkeypatch.setattr(
        raft, "raft_flow", lambda first, second, weights: given.append(first) or torch.zeros(4, 2, 66, 50)
    )
    path = videos / "more" / "two.webm"
    raft_options = (
        "--method",
        "raft",
        "--weights",
        tmp_path / "raft.safetensors",
        "--device",
        "cpu",
        "--workers",
        0,
    )
    call_ok("mmkd-cache", "flow", path, "-o", tmp_path / "out", *raft_options, "--preview", tmp_path / "preview")
    frames = np.stack(list(bgr_frames(path)))[:-1, ..., ::-1].transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(given[0].numpy(), frames)
    assert len(json.loads((tmp_path / "out" / "mmkd-flow.json").read_text())["parameters"]["weights_sha256"]) == 64


# ---- one file


def test_one_hdf5_file_grows_and_equals_the_folders(tmp_path, videos):
    target = tmp_path / "flow.h5"
    flow(videos / "one.webm", "-o", target)
    assert not (tmp_path / "flow.h5.parts").exists()
    said = flow(videos, "-o", target, "--json")
    assert (json.loads(said)["videos"], json.loads(said)["skipped"]) == (1, 1)
    flow(videos, "-o", tmp_path / "folders")
    flow(videos, "-o", tmp_path / "shards", "--layout", "hdf5")
    for name, pairs in (("one", 8), ("more/two", 4)):
        folder = read_jpeg_folder(tmp_path / "folders" / name, np.arange(pairs), layout="denseflow", bound_px=20)
        for path in (target, tmp_path / "shards" / f"{name}.h5"):
            np.testing.assert_array_equal(read_hdf5(path, name, np.arange(pairs), bound_px=20), folder)
    with h5py.File(target) as file:
        assert dict(file["one"].attrs)["bound_px"] == 20
    before = target.read_bytes()
    assert "nothing left to do" in flow(videos, "-o", target)
    assert target.read_bytes() == before


def test_i3d_s_floats_in_one_file(tmp_path, videos):
    more = ("--layout", "i3d", "--short-side", 48)
    flow(videos / "one.webm", "-o", tmp_path / "i3d.h5", *more)
    flow(videos / "one.webm", "-o", tmp_path, *more)
    read = read_hdf5(tmp_path / "i3d.h5", "one", np.arange(18), bound_px=20)
    np.testing.assert_array_equal(read, read_i3d(tmp_path / "one.npy", np.arange(18)))


# ---- resuming


def test_a_video_that_is_done_is_left_alone_and_a_changed_one_done_again(tmp_path, videos):
    source = tmp_path / "in"
    shutil.copytree(videos, source)
    flow(source, "-o", tmp_path / "out")
    before = flow_files(tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.jpg")}
    shutil.copy(videos / "one.webm", source / "one.webm")  # a copy: another time, the same packets
    write_texture(source / "more" / "two.webm", 4, size=(50, 66), shift=(-1, 2), seed=3)
    assert "flow of 1 video written, 1 there already" in flow(source, "-o", tmp_path / "out")
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "one").rglob("*.jpg")}
    assert after.items() <= times.items()
    assert jpeg_pairs(tmp_path / "out" / "more" / "two", layout="denseflow").tolist() == [0, 1, 2]
    assert "flow of 0 videos written, 2 there already" in flow(source, "-o", tmp_path / "out")
    (tmp_path / "out" / "one" / "flow_y_00007.jpg").unlink()
    assert "flow of 1 video written, 1 there already" in flow(source, "-o", tmp_path / "out")
    ours = {name: data for name, data in flow_files(tmp_path / "out").items() if name.startswith("one/")}
    assert ours.items() <= before.items()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--bound", 8), "bound_px 20, now 8"),
        (("--step", 2), "step 1, now 2"),
        (("--layout", "mmaction"), "layout 'denseflow', now 'mmaction'"),
        (("--preset", "opencv"), "preset 'fast', now 'opencv'"),
        (("--new-short", 30), "new_short 0, now 30"),
    ],
)
def test_other_parameters_are_refused(tmp_path, videos, options, text):
    flow(videos / "one.webm", "-o", tmp_path)
    before = files_below(tmp_path)
    assert text in refused("mmkd-cache", "flow", *QUICK, videos, "-o", tmp_path, *options)
    assert files_below(tmp_path) == before


def test_flow_of_another_program_is_not_mixed_with_ours(tmp_path, videos):
    (tmp_path / ".done").mkdir()
    (tmp_path / ".done" / "one").touch()  # denseflow's marker
    assert "another program" in refused("mmkd-cache", "flow", *QUICK, videos, "-o", tmp_path)
    (tmp_path / "x.h5").write_bytes(b"something")
    assert "is not an HDF5 file of this command" in refused(
        "mmkd-cache", "flow", *QUICK, videos, "-o", tmp_path / "x.h5"
    )


@pytest.mark.parametrize("layout", ["denseflow", "epic", "mmaction", "i3d", "hdf5"])
def test_files_that_another_program_wrote_are_neither_replaced_nor_deleted(tmp_path, videos, layout):
    """A published data set's flow has no record of ours: a longer one would even lose its last files."""
    made, theirs = tmp_path / "made", tmp_path / "theirs"
    flow(videos, "-o", made, "--layout", layout)
    last = max(files_below(made))
    (theirs / last).parent.mkdir(parents=True)
    (theirs / last).write_text("published")
    before = files_below(theirs)
    message = refused("mmkd-cache", "flow", *QUICK, videos, "-o", theirs, "--layout", layout)
    assert "holds flow that this command did not write; name another folder" in message
    assert files_below(theirs) == before
    assert (theirs / last).read_text() == "published"


def test_a_killed_run_s_own_files_and_those_of_other_names_do_not_stop_a_run(tmp_path, videos):
    flow(videos, "-o", tmp_path)
    shutil.rmtree(tmp_path / ".done")
    flow(videos, "-o", tmp_path)
    (tmp_path / "other" / "a").mkdir(parents=True)
    (tmp_path / "other" / "a" / "notes.jpg").write_text("mine")
    flow(videos, "-o", tmp_path / "other")
    assert (tmp_path / "other" / "a" / "notes.jpg").read_text() == "mine"


def test_sigterm_stops_with_exit_75_and_a_killed_run_goes_on_to_the_same_files(tmp_path):
    count, pairs = 30, 6
    for number in range(count):
        write_texture(tmp_path / "in" / f"v{number:02d}.webm", pairs + 1, size=(48, 32), seed=number)
    program = Path(sys.executable).with_name("mmkd-cache")
    options = (tmp_path / "in", "--device", "cpu", "--preset", "fast")
    command = [program, "flow", *options, "-o", tmp_path / "out", "--workers", 1]
    done = tmp_path / "out" / ".done"

    def stop_by(number, after):
        process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
        deadline = time.monotonic() + 120
        while len(list(done.glob("v*"))) < after:
            assert process.poll() is None
            assert time.monotonic() < deadline, "no progress"
            time.sleep(0.002)
        process.send_signal(number)
        return process.communicate(timeout=60)[1], process.returncode

    said, code = stop_by(signal.SIGTERM, 2)
    assert code == 75, said
    assert "run the same command again" in said
    assert not list((tmp_path / "out").rglob(".part/*"))
    stopped = {path.name for path in done.iterdir()}
    _, code = stop_by(signal.SIGKILL, len(stopped) + 1)
    assert code == -signal.SIGKILL
    finished = {path.name for path in done.glob("v*")}
    assert stopped < finished
    assert len(finished) < count, "killed too late to mean anything"
    for folder in (tmp_path / "out").glob("v*"):
        assert len(list(folder.iterdir())) == 2 * pairs, "a folder that shows is whole"
    said = call_ok("mmkd-cache", "flow", *options, "-o", tmp_path / "out", "--workers", 0)
    assert f"{len(finished)} there already" in said
    call_ok("mmkd-cache", "flow", *options, "-o", tmp_path / "again", "--workers", 0)
    assert flow_files(tmp_path / "out") == flow_files(tmp_path / "again")
    assert not (tmp_path / "out" / ".part").exists()


# ---- videos that fail


def test_videos_that_fail_are_named_and_the_others_finished(tmp_path, videos):
    source = tmp_path / "in"
    shutil.copytree(videos, source)
    (source / "bad.mp4").write_bytes(b"no video")
    (source / "cut.webm").write_bytes((videos / "one.webm").read_bytes()[:-200])
    write_texture(source / "short.webm", 1)
    result = call("mmkd-cache", "flow", *QUICK, source, "-o", tmp_path / "out")
    assert result.code == 3
    assert "flow of 2 videos written, 0 there already" in result.out
    assert "3 failed" in result.out
    lines = result.err.splitlines()
    for name, reason in (
        ("bad.mp4", "not a video file"),
        ("cut.webm", "truncated"),
        ("short.webm", "1 frame holds no"),
    ):
        assert sum(f"{source / name}: " in line and reason in line for line in lines) == 1
    assert lines[-1].startswith("error: 3 videos have no flow, more than --max-unusable 0")
    assert set(jpeg_pairs(tmp_path / "out" / "one", layout="denseflow").tolist()) == set(range(8))
    tolerant = ("--max-unusable", 3)
    assert "2 there already" in flow(source, "-o", tmp_path / "out", *tolerant)


def test_a_video_that_breaks_half_way_leaves_nothing(tmp_path, videos, monkeypatch):
    """Its first block is written already; the blocks behind it and the other video go on."""
    source = tmp_path / "in"
    shutil.copytree(videos, source)
    monkeypatch.setattr(flow_blocks, "pairs_per_block", lambda size, compute: 2)
    stream = VideoFiles.stream

    def breaks(self, video, indices, facts):
        if video.endswith("one.webm") and indices[-1] > 3:
            from mmkd.data_manifests.errors import VideoError

            raise VideoError("frame 4 is damaged")
        return stream(self, video, indices, facts)

    monkeypatch.setattr(VideoFiles, "stream", breaks)
    for out in (tmp_path / "out", tmp_path / "out.h5"):
        result = call("mmkd-cache", "flow", *QUICK, source, "-o", out)
        assert result.code == 3
        assert result.err.count("one.webm: frame 4 is damaged") == 1
        assert "flow of 1 video written" in result.out
    assert not (tmp_path / "out" / "one").exists()
    assert not (tmp_path / "out" / ".part").exists()
    with h5py.File(tmp_path / "out.h5") as file:
        assert list(file) == ["more"]


# ---- which videos


def test_files_folders_and_lists(tmp_path, videos):
    (tmp_path / "list.txt").write_text(f"{videos / 'one.webm'}\n\n{videos / 'more' / 'two.webm'}\n")
    for arguments in ((f"@{tmp_path / 'list.txt'}",), ("--list", tmp_path / "list.txt")):
        out = tmp_path / arguments[0][:3].strip("-@/")
        flow(*arguments, "-o", out)
        assert {name.split("/")[0] for name in flow_files(out)} == {"one", "two"}
    flow(videos / "more" / "two.webm", "-o", tmp_path / "class", "--class-folder")
    assert (tmp_path / "class" / "more" / "two" / "flow_x_00000.jpg").is_file()
    assert (tmp_path / "class" / ".done" / "more" / "two").is_file()
    flow(videos, "-o", tmp_path / "folder")
    assert {name.rpartition("/")[0] for name in flow_files(tmp_path / "folder")} == {"one", "more/two"}


def test_wrong_usage_is_refused_in_one_line(tmp_path, videos, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.txt").write_text(f"{videos / 'one.webm'}\nnone.mp4\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    shutil.copy(videos / "one.webm", tmp_path / "one.webm")
    one = videos / "one.webm"
    for arguments, text in (
        ((), "no video is named"),
        (("none.mp4",), "video not found: none.mp4"),
        (("@list.txt",), "list.txt:2: video not found: none.mp4"),
        (("@none.txt",), "none.txt cannot be read"),
        (("empty",), "no video lies below empty"),
        ((one, "one.webm"), "would both be 'one'; give --class-folder"),
        ((one, "--step", 0), "--step must not be 0"),
        ((one, "--step", -1, "--layout", "epic"), "cannot tell backward flow"),
        ((one, "--stride", 2), "--stride is EPIC's"),
        ((one, "--bound", 0), "--bound 0: from 1 to 16384"),
        ((one, "--new-width", 10**9), "--new-width 1000000000: from 0 to 16384"),
        ((one, "--enlarge"), "--enlarge needs --short-side"),
        ((one, "--bound", 15, "--layout", "i3d"), "I3D's flow is clipped to 20 px"),
        ((one, "--new-width", 9, "--new-short", 9), "exclude --short-side"),
        ((one, "--method", "raft"), "the method raft has no presets"),
        ((one, "--weights", "file"), "takes no --weights"),
        ((one, "--method", "dis", "--preset", "medium", "--device", "cuda"), "DIS computes on the CPU"),
        ((one, "-o", "x.h5", "--layout", "epic"), "needs a folder; one file holds hdf5 or i3d"),
        ((one, "-o", "file"), "is a file; name a folder, or a file that ends in .h5"),
    ):
        assert text in refused("mmkd-cache", "flow", "-o", "out", *QUICK, *arguments), arguments
    assert not (tmp_path / "out").exists()


def test_a_preview_is_a_picture_of_each_video(tmp_path, videos):
    flow(videos, "-o", tmp_path / "out", "--preview", tmp_path / "preview")
    assert set(files_below(tmp_path / "preview")) == {"one.png", "more/two.png"}
    image = cv2.imread(str(tmp_path / "preview" / "one.png"))[..., ::-1]
    colours = image[18 + 160 + 4 : 18 + 160 + 4 + 160, :200].reshape(-1, 3)
    assert (np.median(colours, axis=0) - [255, 150, 30] < [1, 80, 120]).all(), "right and down is orange"
    assert np.median(colours, axis=0)[0] > np.median(colours, axis=0)[2] + 60
