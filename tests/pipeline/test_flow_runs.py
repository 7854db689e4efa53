"""Several flow runs into one output, runs that are killed, disks that are full, and videos that fail alone."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from mmkd.data_manifests.counted import counted
from mmkd.data_manifests.errors import StorageError
from mmkd.pipeline.flow_command import (
    blocks as flow_blocks,
)
from mmkd.pipeline.flow_command import (
    claims as flow_claims,
)
from mmkd.pipeline.flow_command import (
    output as flow_output,
)
from mmkd.pipeline.flow_command import (
    results as flow_results,
)
from mmkd.pipeline.flow_command import (
    run as flow_command,
)
from mmkd.pipeline.flow_command.claims import CARD, CLAIMS, WHOLE, FlowClaims
from mmkd.pipeline.flow_command.options import FlowOptions
from mmkd.pipeline.flow_command.readers import read_hdf5
from tests.helpers.commands import ENVIRONMENT
from tests.helpers.flow_forks import FlowForks
from tests.helpers.flow_videos import write_texture
from tests.helpers.in_process import call, call_ok, refused

QUICK = ("--method", "dis", "--preset", "ultrafast", "--workers", 0)


def flow(*arguments):
    return call_ok("mmkd-cache", "flow", *QUICK, *arguments)


def jpegs(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.jpg")}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    root = tmp_path_factory.mktemp("videos")
    for number in range(4):
        write_texture(root / f"v{number}.webm", 4 + number, seed=number)
    return root


@pytest.fixture(scope="module")
def expected(videos, tmp_path_factory):
    out = tmp_path_factory.mktemp("expected")
    flow(videos, "-o", out)
    return jpegs(out)


# ---- who is at work


def another_run(parts, *, host="elsewhere", name, age_seconds=0.0, machine="0123456789ab"):
    """Leave what a run of another machine has written when it has claimed `name`."""
    run = f"{machine}-7-99-aaaaaaaa"
    (parts / run).mkdir(parents=True)
    (parts / run / CARD).write_text(json.dumps({"host": host, "pid": 7, "since": "2026-01-01 00:00:00 UTC"}))
    then = time.time() - age_seconds
    os.utime(parts / run / CARD, (then, then))
    (parts / CLAIMS).mkdir(exist_ok=True)
    FlowClaims(parts)._path(name, 0).write_text(run)
    return run


def test_a_claim_is_one_run_s_until_it_is_given_up(tmp_path):
    one, other = FlowClaims(tmp_path / ".part"), FlowClaims(tmp_path / ".part")
    assert one.take("a/b") is None
    assert one.take("a/b") is None, "again"
    holder = other.take("a/b")
    assert (holder.host, holder.pid) == (socket.gethostname(), os.getpid())
    assert str(holder).startswith(f"process {os.getpid()} on {socket.gethostname()}, since 2")
    assert other.take("c") is None
    one.release("a/b")
    assert other.take("a/b") is None
    assert not one.holds("a/b")
    one.end()
    assert other.folder.is_dir()
    other.end()
    assert not (tmp_path / ".part").exists()


def test_the_claim_of_a_killed_run_is_taken_over_and_what_it_gathered_removed(tmp_path):
    program = (
        "import sys, time, pathlib; from mmkd.pipeline.flow_command.claims import FlowClaims; "
        "claims = FlowClaims(pathlib.Path(sys.argv[1])); claims.take('a'); claims.part('.h5').write_text('x'); "
        "print('taken', flush=True); time.sleep(60)"
    )
    parts = tmp_path / ".part"
    with subprocess.Popen([sys.executable, "-c", program, parts], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "taken\n"
        ours = FlowClaims(parts)
        assert ours.take("a").pid == process.pid
        process.send_signal(signal.SIGSTOP)  # asleep is not dead
        assert ours.take("a").pid == process.pid
        process.kill()
    assert ours.take("a") is None
    assert ours.holds("a")
    ours.end()
    assert not parts.exists()


def test_other_people_s_files_among_a_run_s_are_left_alone(tmp_path):
    dead = another_run(tmp_path, name="a", age_seconds=1e4)
    (tmp_path / "thesis").mkdir()
    theirs = [tmp_path / "notes.txt", tmp_path / "thesis" / "chapter.txt", tmp_path / CLAIMS / "list.txt"]
    for path in theirs:
        path.write_text("theirs")
    ours = FlowClaims(tmp_path)
    assert ours.take("a") is None
    ours.end()
    assert not (tmp_path / dead).exists()
    assert [path.read_text() for path in theirs] == ["theirs"] * 3


@pytest.mark.parametrize(("age_seconds", "is_taken"), [(0, False), (1e4, True)])
def test_a_run_of_another_machine_is_known_by_its_signs_of_life(tmp_path, age_seconds, is_taken):
    run = another_run(tmp_path, name="a", age_seconds=age_seconds)
    ours = FlowClaims(tmp_path)
    holder = ours.take("a")
    assert (holder is None) == is_taken
    assert (tmp_path / run).exists() != is_taken
    if holder is not None:
        assert str(holder) == "process 7 on elsewhere, since 2026-01-01 00:00:00 UTC"
    ours.end()


def test_where_the_file_system_has_neither_links_nor_locks_one_run_wins_all_the_same(tmp_path, monkeypatch):
    def none(*_):
        raise OSError("not on this file system")

    monkeypatch.setattr(os, "link", none)
    monkeypatch.setattr(flow_claims.fcntl, "flock", none)
    one, other = FlowClaims(tmp_path), FlowClaims(tmp_path)
    assert one.take("a") is None
    assert other.take("a").pid == os.getpid()
    one.end()
    assert other.take("a") is None
    other.end()


def test_an_unfinished_claim_is_waited_for_and_then_taken(tmp_path):
    ours = FlowClaims(tmp_path)
    ours.take("b")
    path = ours._path("a", 0)
    path.touch()
    assert ours.take("a") is not None
    os.utime(path, (0, 0))
    assert ours.take("a") is None
    ours.end()


# ---- sharing


def test_two_runs_share_a_folder_and_each_file_is_there_once_and_whole(tmp_path, videos, expected):
    out = tmp_path / "out"
    program = Path(sys.executable).with_name("mmkd-cache")
    command = [program, "flow", videos, "-o", out, *QUICK]
    both = [
        subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert jpegs(out) == expected
    written = [int(text.split("flow of ")[1].split()[0]) for text in said]
    assert sum(written) == 4, "each video is computed once"
    assert not (out / ".part").exists()


def test_a_run_leaves_the_video_of_another_one_alone_and_waits_for_it(tmp_path, videos, expected, monkeypatch):
    out = tmp_path / "out"
    run = another_run(out / ".part", name="v1")
    waited = []

    def another_finishes(seconds):
        waited.append(seconds)
        assert {path.name for path in (out / ".done").iterdir()} == {"v0", "v2", "v3"}
        shutil.rmtree(out / ".part" / run)

    monkeypatch.setattr(flow_command, "WAIT_SECONDS", 0.01)
    monkeypatch.setattr(flow_command.time, "sleep", another_finishes)
    result = call("mmkd-cache", "flow", *QUICK, videos, "-o", out)
    assert result.code == 0
    assert len(waited) == 1
    assert "waiting for 1 video of other runs: process 7 on elsewhere" in result.err
    assert jpegs(out) == expected


def test_a_run_that_was_taken_for_dead_moves_nothing_and_takes_the_other_s_result(tmp_path, videos, monkeypatch):
    out = tmp_path / "out"
    add = flow_output.JpegFolderWriter.add
    robbed = []

    def slept(writer, encoded):
        add(writer, encoded)
        claim = next((out / ".part" / CLAIMS).glob("*.0"), None)
        if claim is not None and not robbed:
            robbed.append(claim.with_suffix(".1"))
            robbed[0].write_text(another_run(out / ".part" / "x", name="v0"))
            shutil.move(next((out / ".part" / "x").glob("0*")), out / ".part")

    finish = flow_output.FlowOutput.finish

    def other_one_first(output, name, writer, record):
        moved = finish(output, name, writer, record)
        if not moved:  # the other one finishes
            assert not (out / name).exists()
            robbed[0].unlink()
        return moved

    monkeypatch.setattr(flow_output.JpegFolderWriter, "add", slept)
    monkeypatch.setattr(flow_output.FlowOutput, "finish", other_one_first)
    said = flow(videos / "v0.webm", "-o", out)
    assert robbed
    assert "flow of 1 video written" in said
    assert len(jpegs(out)) == 2 * 3


def test_one_file_has_one_writer_and_the_second_is_told_which(tmp_path, videos):
    out = tmp_path / "flow.h5"
    another_run(tmp_path / "flow.h5.parts" / ".part", name=WHOLE)
    said = refused("mmkd-cache", "flow", *QUICK, videos, "-o", out)
    assert "is being written by another run (process 7 on elsewhere, since 2026-01-01 00:00:00 UTC)" in said
    assert "wait until it ends, or stop it, or name another file" in said
    assert not out.exists()


# ---- done means counted


def test_a_hole_anywhere_makes_a_video_undone(tmp_path, videos, expected):
    flow(videos, "-o", tmp_path)
    (tmp_path / "v3" / "flow_y_00002.jpg").unlink()
    assert "flow of 1 video written, 3 there already" in flow(videos, "-o", tmp_path)
    assert jpegs(tmp_path) == expected


def test_a_file_that_was_cut_makes_a_video_undone(tmp_path, videos):
    for layout, ending in (("i3d", "npy"), ("hdf5", "h5")):
        flow(videos, "-o", tmp_path / layout, "--layout", layout)
        path = tmp_path / layout / f"v0.{ending}"
        whole = path.read_bytes()
        path.write_bytes(whole[:-1])
        assert "flow of 1 video written, 3 there already" in flow(
            videos, "-o", tmp_path / layout, "--layout", layout
        )
        assert path.stat().st_size == len(whole)


def test_markers_of_an_older_run_without_sizes_still_count(tmp_path, videos):
    flow(videos, "-o", tmp_path, "--layout", "hdf5")
    for marker in (tmp_path / ".done").iterdir():
        record = json.loads(marker.read_bytes())
        assert record.pop("size_bytes") > 0
        marker.write_text(json.dumps(record))
    assert "4 there already" in flow(videos, "-o", tmp_path, "--layout", "hdf5")


# ---- sizes


def test_epic_and_i3d_enlarge_only_when_asked_and_never_mix(tmp_path, videos):
    for layout, size, large in (("epic", (48, 64), (256, 340)), ("i3d", (48, 64), (256, 341))):
        options = (videos / "v0.webm", "-o", tmp_path / f"{layout}.h5" if layout == "i3d" else tmp_path / layout)
        flow(*options, "--layout", layout)
        small = refused("mmkd-cache", "flow", *QUICK, *options, "--layout", layout, "--enlarge")
        assert "flow of other parameters (enlarge False, now True)" in small
        chosen = FlowOptions(layout=layout), FlowOptions(layout=layout, enlarge=True)
        assert [options.size(64, 48)[::-1] for options in chosen] == [size, large]
    with h5py.File(tmp_path / "i3d.h5") as file:
        assert file["v0"]["flow"].shape[1:3] == (48, 64)


def test_an_output_from_before_enlarging_was_a_choice_goes_on_as_it_began(tmp_path, videos):
    flow(videos / "v0.webm", "-o", tmp_path, "--layout", "epic", "--enlarge")
    path = tmp_path / "mmkd-flow.json"
    stated = json.loads(path.read_bytes())
    assert stated["parameters"].pop("enlarge") is True
    path.write_text(json.dumps(stated))
    said = refused("mmkd-cache", "flow", *QUICK, videos / "v0.webm", "-o", tmp_path, "--layout", "epic")
    assert "enlarge True, now False" in said
    assert "1 there already" in flow(videos / "v0.webm", "-o", tmp_path, "--layout", "epic", "--enlarge")


# ---- killed anywhere


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    made = FlowForks(tmp_path_factory.mktemp("forks"))
    yield made
    made.close()


def test_one_file_goes_on_after_a_kill_at_any_instant(tmp_path, videos, forks):
    old, new = tmp_path / "old.h5", tmp_path / "new.h5"
    flow(videos / "v0.webm", "-o", old)
    shutil.copy(old, new)
    flow(videos / "v1.webm", "-o", new)
    whole = {name: read_hdf5(new, name, np.arange(3), bound_px=20) for name in ("v0", "v1")}
    for event in range(200):
        out = tmp_path / str(event) / "flow.h5"
        out.parent.mkdir()
        shutil.copy(old, out)
        code, _ = forks.run(*QUICK, videos / "v1.webm", "-o", out, die_at=event)
        flow(videos / "v1.webm", "-o", out)
        for name, fields in whole.items():
            np.testing.assert_array_equal(read_hdf5(out, name, np.arange(3), bound_px=20), fields)
        assert [path.name for path in out.parent.iterdir()] == ["flow.h5"], event
        if code == 0:
            break
    assert code == 0
    assert event > 20, "killed at each of the changes"


# ---- a full disk


@pytest.mark.parametrize(
    ("layout", "out"), [("i3d", "folder"), ("hdf5", "folder"), ("hdf5", "x.h5"), ("i3d", "x.h5")]
)
@pytest.mark.parametrize("limit", [2_000, 7_000, 40_000])
def test_a_file_that_cannot_grow_is_an_error_with_exit_code_74(tmp_path, videos, forks, layout, out, limit):
    more = ("--new-short", 256, "--enlarge") if layout == "hdf5" else ()
    options = (*QUICK, videos / "v3.webm", "-o", tmp_path / out, "--layout", layout, *more)

    code, said = forks.run(*options, limit=limit)
    assert code == 74, said
    assert "File too large; free some space and run again" in said
    assert not list(tmp_path.rglob("run.json")), "the run leaves nothing of its own"
    flow(*options[len(QUICK) :])


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a megabyte; needs root and the right to mount."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() or shutil.which("mount") is None or subprocess.run(mount, check=False).returncode:
        pytest.skip("cannot mount a small file system here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize(("layout", "out"), [("i3d", "folder"), ("hdf5", "x.h5"), ("denseflow", "folder")])
def test_a_full_disk_is_an_error_with_exit_code_74(small_disk, videos, forks, layout, out):
    (small_disk / "ballast").write_bytes(bytes(950_000))
    more = () if layout == "i3d" else ("--new-short", 256, "--enlarge")
    code, said = forks.run(*QUICK, videos, "-o", small_disk / out, "--layout", layout, *more)
    assert code == 74, said
    assert "No space left on device; free some space and run again" in said


# ---- one video's fault


def test_a_name_that_hdf5_cannot_hold_fails_alone(tmp_path, videos):
    source = tmp_path / "in"
    source.mkdir()
    shutil.copy(videos / "v0.webm", source / "other.webm")
    shutil.copy(videos / "v0.webm", os.fsencode(source) + b"/caf\xe9.webm")
    result = call("mmkd-cache", "flow", *QUICK, source, "-o", tmp_path / "x.h5")
    assert result.code == 3
    assert "its name is not valid UTF-8, as HDF5 needs; rename it, or write a folder" in result.err
    with h5py.File(tmp_path / "x.h5") as file:
        assert list(file) == ["other"]
    flow(source, "-o", tmp_path / "folder", "--preview", tmp_path / "preview")
    assert len(list((tmp_path / "folder").glob("*/flow_x_00000.jpg"))) == 2
    assert len(list((tmp_path / "preview").iterdir())) == 2


@pytest.mark.parametrize(("layout", "length", "failed"), [("denseflow", 250, 0), ("i3d", 250, 0), ("i3d", 255, 1)])
def test_a_name_as_long_as_names_may_be(tmp_path, videos, layout, length, failed):
    source = tmp_path / "in"
    source.mkdir()
    shutil.copy(videos / "v0.webm", source / "z.webm")
    long = source / "a.webm"
    long = source / ("a" * (length - 5) + ".webm") if length < 255 else source / ("a" * 252 + ".ts")
    shutil.copy(videos / "v0.webm", long)
    result = call("mmkd-cache", "flow", *QUICK, source, "-o", tmp_path / "out", "--layout", layout)
    assert result.code == (3 if failed else 0), result.err
    assert f"flow of {counted(2 - failed, 'video')} written" in result.out
    assert ("File name too long" in result.err) == bool(failed)


def test_whatever_is_raised_for_one_video_the_others_are_done(tmp_path, videos, monkeypatch):
    block_flow = flow_blocks.block_flow
    faults = {"v0": MemoryError(), "v1": RuntimeError("a bug"), "v2": StorageError("cannot read it: EIO")}

    def failing(block, frames, device):
        if block.plan.name in faults:
            raise faults[block.plan.name]
        return block_flow(block, frames, device)

    monkeypatch.setattr(flow_blocks, "block_flow", failing)
    result = call("mmkd-cache", "flow", *QUICK, videos, "-o", tmp_path)
    assert result.code == 74
    assert "v0.webm: not enough memory for frames of 64 x 48 pixels; give --workers or --short-side a" in result.err
    assert "v1.webm: its flow cannot be computed: RuntimeError: a bug" in result.err
    assert "v2.webm: cannot read it: EIO" in result.err
    assert "2 videos failed by a fault of the machine" in result.err
    assert len(list(tmp_path.glob("v3/*"))) == 2 * 6
    monkeypatch.undo()
    assert "flow of 3 videos written, 1 there already" in flow(videos, "-o", tmp_path)


def test_a_disk_that_has_gone_ends_the_run_and_not_each_video_by_itself(tmp_path, videos, monkeypatch):
    asked = []

    def gone(self, video):
        asked.append(video)
        raise StorageError(f"cannot read {video}: Stale file handle")

    monkeypatch.setattr(flow_results, "MOST_FAULTS", 3)
    monkeypatch.setattr(flow_command.VideoFiles, "probe", gone)
    assert "Stale file handle" in refused("mmkd-cache", "flow", *QUICK, videos, "-o", tmp_path, code=74)
    assert len(asked) == 3


def test_a_result_that_cannot_be_where_something_else_is_fails_alone(tmp_path, videos):
    (tmp_path / "v1").write_text("somebody's file")
    result = call("mmkd-cache", "flow", *QUICK, videos, "-o", tmp_path)
    assert result.code == 3
    assert "v1.webm: " in result.err
    assert "flow of 3 videos written" in result.out
    assert (tmp_path / "v1").read_text() == "somebody's file"


def test_a_preview_that_cannot_be_written_costs_nothing_else(tmp_path, videos):
    (tmp_path / "preview").mkdir()
    (tmp_path / "preview" / "v1.png").mkdir()
    result = call("mmkd-cache", "flow", *QUICK, videos, "-o", tmp_path / "out", "--preview", tmp_path / "preview")
    assert result.code == 0
    assert "v1.webm: no preview: cannot write" in result.err
    assert "flow of 4 videos written" in result.out
