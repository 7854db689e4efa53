"""What disks, files and people do to a cache: each fault is noticed, says what to do, and costs nothing else."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from mmkd.cache_tools.cache.reader import CacheReader
from mmkd.cache_tools.layout import Status
from tests.helpers.forked import Forked, contents
from tests.helpers.tiny_data import rows_of, write_rows

LOGITS = "targets.zarr/train/rgb/logits/action/c/1/0/0"


def one_line(text: str) -> str:
    """The error of a command: its last line."""
    assert "Traceback" not in text, text
    last = text.rstrip().splitlines()[-1]
    assert last.startswith("error: "), text
    return last


def heal(quick: Forked, out) -> None:
    result = quick.build(out)
    assert result.code == 0, result.err
    assert contents(out) == contents(quick.cache)


# ---- damage


@pytest.mark.parametrize("damage", ["truncated", "emptied"])
def test_a_truncated_shard_is_found_on_reading_and_by_verify_and_mended(quick, tmp_path, damage):
    out = quick.copy(tmp_path / "cache")
    data = (out / LOGITS).read_bytes()
    (out / LOGITS).write_bytes(data[: len(data) // 2] if damage == "truncated" else b"")
    found = quick.run("verify", out)
    assert found.code == 4
    assert f"{LOGITS}: its hash differs (rgb, train rows 6..11, views 0..1)" in found.out
    assert "run `mmkd-cache verify --repair`, then the build again" in one_line(found.err)
    with pytest.raises(Exception, match=r"c/1/0/0 is damaged .* run `mmkd-cache verify --repair`"):
        CacheReader(out).logits("train", "rgb")
    repaired = quick.run("verify", out, "--repair")
    assert repaired.code == 0
    assert "run the build again to compute train/1-0 again" in repaired.out
    assert quick.run("export", out, tmp_path / "x.h5").code == 2, "what was repaired is not finished"
    heal(quick, out)


@pytest.mark.parametrize("key", [LOGITS, "commits/train/rgb/*/1-0.json"])
def test_a_missing_shard_or_record_is_found_and_computed_anew(quick, tmp_path, key):
    out = quick.copy(tmp_path / "cache")
    (path,) = out.glob(key)
    path.unlink()
    found = quick.run("verify", out)
    assert found.code == 4
    assert path.relative_to(out).as_posix() in found.out
    if key == LOGITS:
        with pytest.raises(Exception, match=r"c/1/0/0 is missing; run"):
            CacheReader(out).logits("train", "rgb")
    else:
        assert quick.run("finalize", out).code == 4
    built = json.loads(quick.build(out, "--json").out)
    assert (built["shards"], built["skipped_shards"]) == (1, 5)
    assert contents(out) == contents(quick.cache)


def test_leftovers_are_named_by_verify_and_gone_after_repair_or_build(quick, tmp_path):
    out = quick.copy(tmp_path / "cache")
    leftovers = (
        ".tmp/0123456789abcdef/half",
        "targets.zarr/train/rgb/logits/action/c/9/0/0",
        "claims/train/0-0/0.json",
    )
    for mend in ("repair", "build"):
        for key in leftovers:
            (out / key).parent.mkdir(parents=True, exist_ok=True)
            (out / key).write_bytes(b'{"task": "gone"}')
        found = quick.run("verify", out)
        assert found.code == 0, "no reader sees them"
        assert "leftovers 3" in found.out
        if mend == "repair":
            assert quick.run("verify", out, "--repair").code == 0
        else:
            assert quick.build(out).code == 0
            (out / leftovers[1]).unlink()  # only verify looks at every object
        assert contents(out) == contents(quick.cache)


@pytest.mark.parametrize("key", ["init.json", "root.json", "index.jsonl"])
def test_a_damaged_root_is_mended_by_repair_and_build(quick, tmp_path, key):
    out = quick.copy(tmp_path / "cache")
    data = (out / key).read_bytes()
    for position in (data.index(b"mmkd-cache") + 11, len(data) // 2):  # also the schema's own digits
        (out / key).write_bytes(data[:position] + bytes([data[position] ^ 2]) + data[position + 1 :])
        with pytest.raises(Exception, match="damaged"):
            CacheReader(out)
        found = quick.run("verify", out)
        assert (found.code, key in found.out) == (4, True), found.err
        assert quick.run("verify", out, "--repair").code == 0
        heal(quick, out)


# ---- disks


def test_a_full_disk_is_named_and_the_build_goes_on_when_there_is_room(quick, tmp_path):
    disk, out = tmp_path / "disk", tmp_path / "disk" / "cache"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=240k", "tmpfs", disk], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted here: {mounted.stderr.strip()}")
    try:
        result = quick.build(out)
        assert result.code == 74, result.err
        assert re.search(r"cannot write .*No space left on device; free some space", one_line(result.err))
        subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)
        status = quick.run("status", out)
        assert (status.code, "not finished" in status.out or "is not a cache" in status.err) in (
            (0, True),
            (2, True),
        )
        heal(quick, out)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_disk_that_takes_no_large_file_fails_that_shard_and_loses_nothing(quick, tmp_path):
    out = tmp_path / "cache"
    acts = [{"match": r"opened targets\.zarr/standard/.*/c/1/0.*", "do": "enospc"}]
    result = quick.build(out, faults={"acts": acts})
    assert result.code == 74
    assert "No space left on device; free some space and run again" in one_line(result.err)
    status = json.loads(quick.run("status", out, "--json").out)
    assert (status["done"], list(status["failed"]), status["abandoned"]) == (4, ["standard/1-0"], [])
    assert "failed    standard/1-0: cannot write" in quick.run("status", out).out
    heal(quick, out)
    assert json.loads(quick.run("status", out, "--json").out)["failed"] == {}


ORDINARY = {"ordinary_user": True}
"""Root may write anywhere, so a child gives that up."""


def forbid(top: Path, mode: int) -> None:
    """Take rights on all folders below `top` away."""
    for folder in (top, *(path for path in top.rglob("*") if path.is_dir())):
        folder.chmod(folder.stat().st_mode & mode)


def test_a_place_where_nothing_may_be_written_is_refused_and_read_all_the_same(quick, tmp_path):
    cache, empty = quick.copy(tmp_path / "cache"), tmp_path / "empty"
    empty.mkdir()
    before = contents(cache)
    for folder in (cache, empty):
        forbid(folder, 0o555)
    for out in (cache, empty / "cache"):
        refused = quick.build(out, faults=ORDINARY)
        assert refused.code == 74, refused.err
        assert re.search(r"Permission denied; .*allow it there", one_line(refused.err))
    for command in ("finalize", "verify --repair"):
        name, *options = command.split()
        assert quick.run(name, cache, *options, faults=ORDINARY).code == 74
    for name in ("verify", "inspect", "status"):
        assert quick.run(name, cache, faults=ORDINARY).code == 0
    assert contents(cache) == before
    assert not (empty / "cache").exists()


def test_a_folder_that_cannot_be_read_does_not_pass_for_an_empty_one(quick, tmp_path):
    out = quick.copy(tmp_path / "cache")
    hidden = out / "targets.zarr" / "train"
    hidden.chmod(0)
    refused = quick.build(out, faults=ORDINARY)
    hidden.chmod(0o755)
    assert refused.code == 74, refused.err
    assert re.search(r"cannot read .*targets.zarr/train.*: Permission denied; fix that", one_line(refused.err))
    records = {key: data for key, data in contents(quick.cache).items() if key.startswith("commits/")}
    assert records.items() <= contents(out).items(), "no record was taken for one without objects"
    heal(quick, out)


# ---- other inputs


def test_a_changed_weights_file_is_refused(quick, tmp_path):
    changed = shutil.copytree(quick.expert("rgb"), tmp_path / "rgb")
    data = bytearray((changed / "weights.safetensors").read_bytes())
    data[-1] ^= 1
    (changed / "weights.safetensors").write_bytes(data)
    out = quick.copy(tmp_path / "cache")
    refused = quick.build(out, "--expert", changed, experts=("boxes",))
    assert refused.code == 4
    assert re.search(r"weights.safetensors is .* not the file that expert.json describes", one_line(refused.err))
    assert contents(out) == contents(quick.cache)


def test_another_class_order_is_refused(quick, tmp_path):
    header, *rows = rows_of(quick.root / "manifest.jsonl")
    classes = header["heads"]["action"]
    header["heads"]["action"] = [classes[1], classes[0], *classes[2:]]
    other = write_rows(tmp_path / "manifest.jsonl", [header, *rows])
    out = quick.copy(tmp_path / "cache")
    refused = quick.build(out, "--manifest", other)
    assert refused.code == 2
    assert "was trained for other classes than the manifest's (names or order differ)" in one_line(refused.err)
    assert contents(out) == contents(quick.cache)


def test_another_view_seed_is_refused_field_by_field(quick, tmp_path):
    out = quick.copy(tmp_path / "cache")
    refused = quick.build(out, "--set", "view_seed=7")
    assert refused.code == 5
    assert "base.view_seed: cache 0, now 7" in refused.err
    assert "Build into another directory" in refused.err
    assert contents(out) == contents(quick.cache)


# ---- faults while decoding


def faulty(quick: Forked, tmp_path, **source: object) -> dict:
    video = rows_of(quick.root / "manifest.jsonl")[3]["video"]  # row 2 of train
    return {"source": {"video": video, "marks": str(tmp_path / "marks"), **source}}


def status_of_row(out, row: int) -> np.ndarray:
    return CacheReader(out).status("train", "rgb")[row]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_io_error_fails_its_shard_alone_and_the_next_run_heals(quick, tmp_path, workers):
    out = tmp_path / "cache"
    result = quick.build(out, "--workers", workers, faults=faulty(quick, tmp_path, fault="eio"))
    assert result.code == 74, result.err
    line = one_line(result.err)
    assert re.search(r"1 shard failed; the first is train/0-0: clip '\d+': cannot read .*Input/output", line), line
    assert "run again" in line
    status = json.loads(quick.run("status", out, "--json").out)
    assert (status["done"], list(status["failed"]), status["finished"]) == (5, ["train/0-0"], False)
    assert (tmp_path / "marks").stat().st_size == (2 if workers else 1), "with workers it is tried twice"
    heal(quick, out)
    assert json.loads(quick.run("status", out, "--json").out)["failed"] == {}


@pytest.mark.parametrize("fault", ["eio", "broken", "death"])
def test_a_fault_that_does_not_repeat_leaves_no_status(quick, tmp_path, fault):
    out = tmp_path / "cache"
    result = quick.build(out, "--workers", 1, faults=faulty(quick, tmp_path, fault=fault, times=1))
    assert result.code == 0, result.err
    assert (tmp_path / "marks").stat().st_size == 1
    assert contents(out) == contents(quick.cache)


def test_a_fault_of_the_video_that_repeats_in_a_fresh_worker_becomes_a_status(quick, tmp_path):
    out = tmp_path / "cache"
    faults = faulty(quick, tmp_path, fault="broken")
    result = quick.build(out, "--workers", 1, faults=faults)
    assert result.code == 3, result.err
    assert re.search(r"1 clip is unusable, .* the first is train/\d+: a fault of the test", one_line(result.err))
    assert (tmp_path / "marks").stat().st_size == 2
    assert set(status_of_row(out, 2)) == {Status.DECODE_FAILED}
    assert (CacheReader(out).status("train", "rgb") == Status.OK).sum() == 2 * 13


# ---- videos that are not there


@pytest.mark.parametrize("mount_point", ["gone", "empty"])
def test_a_video_folder_that_is_lost_in_the_middle_leaves_no_status(quick, tmp_path, mount_point):
    out, videos = tmp_path / "cache", shutil.copytree(quick.root / "videos", tmp_path / "videos")
    facts = ["--facts", tmp_path / "facts", "--videos", videos]
    source = {"fault": "lost", "times": 1, "marks": str(tmp_path / mount_point)}
    result = quick.build(out, *facts, "--workers", 1, faults=faulty(quick, tmp_path, **source))
    assert result.code == 74, result.err
    assert re.search(
        r"video not found: .*, though it was there before, below .*run the same command again", one_line(result.err)
    )
    result = quick.build(out, *facts, "--workers", 1)
    assert result.code == (2 if mount_point == "gone" else 74), "nothing was recorded by the next run either"
    assert "does not exist" in result.err if mount_point == "gone" else "is its disk mounted" in result.err
    shutil.rmtree(videos, ignore_errors=True)
    (tmp_path / "videos-elsewhere").rename(videos)
    heal(quick, out)


def with_segments(quick: Forked, path: Path) -> list[str]:
    """Write the manifest with two segments that lie outside their video; return their names."""
    rows = rows_of(quick.root / "manifest.jsonl")
    rows[3].update(end_seconds=99.0)
    rows[7].update(start_seconds=98.0)
    write_rows(path, rows)
    return [f"train/{rows[number]['clip_id']}" for number in (3, 7)]


def test_a_segment_outside_its_video_is_recorded_and_the_build_goes_on(quick, tmp_path):
    late, outside = with_segments(quick, tmp_path / "m.jsonl")
    result = quick.build(tmp_path / "c", "--manifest", tmp_path / "m.jsonl", "--json")
    assert result.code == 3, result.err
    assert "2 of 28 clips, in 2 of 28 videos, cannot be used (segment " in result.err
    unusable = json.loads(result.out)["unusable"]
    assert set(unusable) == {late, outside}
    assert "data.clip_segments=true clips it" in unusable[late]
    clip = ["--set", "data.clip_segments=true"]
    clipped = quick.build(tmp_path / "d", "--manifest", tmp_path / "m.jsonl", *clip, "--json")
    assert set(json.loads(clipped.out)["unusable"]) == {outside}


def test_missing_videos_are_counted_first_and_no_process_looks_for_them(quick, tmp_path):
    """Its workers would count: the source notes every read."""
    videos = shutil.copytree(quick.root / "videos", tmp_path / "videos")
    rows = rows_of(quick.root / "manifest.jsonl")[1:]
    kept = {rows[0]["video"], rows[-1]["video"]}
    for row in rows:
        if row["video"] not in kept:
            (videos / row["video"]).unlink()
    places = ["--videos", videos, "--facts", tmp_path / "facts", "--workers", 1]
    counts = "26 of 28 clips, in 26 of 28 videos, cannot be used (video not found: 26 clips of 26 videos)"
    planned = quick.run("plan", *quick.options(), *places, "-o", tmp_path / "c", "--json")
    assert planned.code == 0, planned.err
    assert counts in planned.err
    splits = json.loads(planned.out)["splits"]
    assert [(split["clips"], split["unusable"], split["clips_left"]) for split in splits.values()] == [
        (14, 13, 1)
    ] * 2
    result = quick.build(tmp_path / "c", *places, "--max-unusable", 26)
    assert result.code == 0, result.err
    assert result.err.index(counts) < result.err.index("building:")
    assert set(status_of_row(tmp_path / "c", 0)) == {Status.OK}
    assert (CacheReader(tmp_path / "c").status("train", "rgb")[1:] == Status.DECODE_FAILED).all()


def test_missing_videos_that_are_back_are_computed_when_asked_for(quick, tmp_path):
    """To the bytes of a build that had them all along; killed in between, the same command continues."""
    out, videos = tmp_path / "c", shutil.copytree(quick.root / "videos", tmp_path / "videos")
    places = ["--videos", videos, "--facts", tmp_path / "facts"]
    names = [rows_of(quick.root / "manifest.jsonl")[number]["video"] for number in (2, 9, 20)]
    for name in names:
        (videos / name).rename(tmp_path / name)
    assert quick.build(out, *places, "--max-unusable", 3).code == 0
    for name in names:
        (tmp_path / name).rename(videos / name)
    refused = quick.build(out, *places)
    assert refused.code == 5
    assert "build with --retry-unusable" in one_line(refused.err)
    before = contents(out)
    assert quick.build(out, *places, "--retry-unusable", experts=("rgb",)).code == 2, "boxes saw them, too"
    assert quick.build(out, *places, "--retry-unusable", "--set", "view_seed=7").code == 5
    assert contents(out) == before
    for step in ("deleted root.json", "deleted commits/.*", "opened init.json", "synced init.json"):
        stopped = quick.build(out, *places, "--retry-unusable", faults={"acts": [{"match": step, "do": "kill"}]})
        assert stopped.code == -9, (step, stopped.err)
    result = quick.build(out, *places, "--retry-unusable")
    assert result.code == 0, result.err
    assert contents(out) == contents(quick.cache)
    again = quick.build(out, *places, "--retry-unusable", "--json")
    assert json.loads(again.out)["shards"] == 0
    assert "no clip that is recorded as unusable can be read now" in again.err


def test_clips_that_a_dying_decoder_took_are_computed_again_when_asked_for(quick, tmp_path):
    out = tmp_path / "c"
    result = quick.build(out, "--workers", 1, faults=faulty(quick, tmp_path, fault="broken"))
    assert result.code == 3, result.err
    assert quick.build(out).code == 3, "a status is for good"
    built = quick.build(out, "--retry-unusable", "--json")
    assert built.code == 0, built.err
    assert json.loads(built.out)["shards"] == 1
    assert "1 unusable clip can be read now, and computed again" in built.err
    assert contents(out) == contents(quick.cache)
