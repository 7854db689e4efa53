"""Bad input that is recorded: broken videos, dying and hanging decoders, missing boxes, logits that are not finite.

Each clip gets a status and its reason, the build continues, and `--max-unusable` decides on the exit code.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mmkd.cache_tools.cache.fingerprints import file_sha256
from mmkd.cache_tools.cache.reader import CacheReader
from mmkd.cache_tools.layout import Status
from mmkd.pipeline.experts.expert import read_card, write_card
from tests.helpers.commands import ENVIRONMENT, Result
from tests.helpers.in_process import call, call_ok, refused
from tests.helpers.tiny import Tiny
from tests.helpers.tiny_data import SHORT, expert, rows_of, stage_one, write_rows


def write_video(path: Path, width: int, height: int, pts: list[int], *, rate: int = 12) -> None:
    """Write a small VP9 WebM whose frames have these time stamps, in frames."""
    with av.open(str(path), "w", format="webm") as out:
        stream = out.add_stream("libvpx-vp9", rate=rate, options={"deadline": "realtime", "cpu-used": "8"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        out.start_encoding()  # a video without frames has a header, too
        for number in pts:
            frame = av.VideoFrame.from_ndarray(np.full((height, width, 3), 3 * number % 256, np.uint8))
            frame.pts = number
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))


SELF_CONTAINED = {"deadline": "realtime", "cpu-used": "8", "lag-in-frames": "0", "error-resilient": "1"}
"""A packet of this encoder may follow any other: it needs no probabilities learnt from those before it."""


def write_slow_video(path: Path, packets: int = 16000) -> None:
    """Write 16 s of 1280 x 720: one key frame, then one small packet again and again: half a minute of decoding."""
    with av.open(str(path), "w", format="webm") as out:
        stream = out.add_stream("libvpx-vp9", rate=1000, options=SELF_CONTAINED)
        stream.width, stream.height, stream.pix_fmt = 1280, 720, "yuv420p"
        picture = np.random.default_rng(0).integers(0, 255, (45, 80, 3), np.uint8).repeat(16, 0).repeat(16, 1)
        encoded = []
        for number in range(2):
            frame = av.VideoFrame.from_ndarray(picture)
            frame.pts = number
            encoded += list(stream.encode(frame))
        encoded += list(stream.encode(None))
        assert not encoded[-1].is_keyframe
        out.mux(encoded[0])
        for number in range(1, packets):
            packet = av.Packet(bytes(encoded[-1]))
            packet.pts = packet.dts = number
            packet.time_base, packet.stream = Fraction(1, 1000), stream
            out.mux(packet)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "missing": ("train", Path.unlink, "video not found"),
    "truncated": ("train", truncate, "truncated: the file ends before"),
    "killed": ("train", write_slow_video, "decoder died"),
    "text": ("standard", lambda path: path.write_text("not a video\n" * 50), "not a video file"),
    "empty": ("standard", lambda path: path.write_bytes(b""), "not a video file"),
    "zero frames": ("standard", lambda path: write_video(path, 96, 72, []), "cannot be decoded"),
    "oversized": ("standard", lambda path: write_video(path, 1920, 1080, [0, 1, 2]), "the limit of 1000000 pixels"),
    "too long": ("standard", lambda path: write_video(path, 96, 72, [0, 480, 960]), "the limit is 60 s"),
    "hanging": ("standard", write_slow_video, "took longer than 3 s"),
}
"""Name -> split, what is done to the video, part of the reason."""
LIMITS = ["--set", "data.max_pixels=1000000", "--set", "data.max_duration_seconds=60"]


@dataclass(frozen=True)
class Broken:
    """A data set with damaged videos, and what a build made of it."""

    tiny: Tiny
    root: Path
    clips: dict[str, dict[str, Any]]
    """Name of the damage (or `boxes train`, `boxes standard`) -> the clip's row."""
    taught: Result
    """The boxes expert, trained on them."""
    result: Result
    """The build."""
    kills: int
    """How many of its workers were killed."""

    @property
    def stage_one(self) -> list[object]:
        """Options of teach and build."""
        data = {
            "manifest": self.root / "m.jsonl",
            "videos": self.root / "videos",
            "boxes": self.root / "boxes.json",
        }
        return [*stage_one(self.tiny, **data), *LIMITS, "--set", "data.clip_timeout_seconds=3"]

    @property
    def build(self) -> list[object]:
        """The build's command line."""
        experts = [*expert(self.tiny, "rgb"), "--expert", self.root / "boxes"]
        return ["mmkd-cache", "build", *self.stage_one, *experts, "-o", self.root / "cache", "--json"]

    @property
    def data(self) -> list[object]:
        """Options of train and evaluate."""
        videos = ["--manifest", self.root / "m.jsonl", "--videos", self.root / "videos", "--workers", 0]
        return ["-c", self.tiny.root / "student.yaml", *videos, *LIMITS, "--cache", self.root / "cache"]


def children_reading(parent: int, video: Path) -> list[int]:
    """Child processes that have the video open, from /proc."""
    found = []
    for children in Path(f"/proc/{parent}/task").glob("*/children"):
        for child in children.read_text().split():
            try:
                files = [str(link.readlink()) for link in Path(f"/proc/{child}/fd").iterdir()]
            except OSError:  # it has just ended
                continue
            if str(video) in files:
                found.append(int(child))
    return found


def run_killing(command: list[object], video: Path, log: Path) -> tuple[Result, int]:
    """Run a build, and kill -9 every worker that reads `video` once the build itself has begun."""
    program = Path(sys.executable).with_name(str(command[0]))
    killed: set[int] = set()
    with log.open("w") as err, (log.with_suffix(".out")).open("w") as out:
        process = subprocess.Popen([program, *map(str, command[1:])], stdout=out, stderr=err, env=ENVIRONMENT)
        try:
            while process.poll() is None:
                if "building:" in log.read_text():
                    for child in children_reading(process.pid, video):
                        os.kill(child, signal.SIGKILL)
                        killed.add(child)
                time.sleep(0.02)
        finally:
            process.kill()
    return Result(process.returncode, log.with_suffix(".out").read_text(), log.read_text()), len(killed)


@pytest.fixture(scope="module")
def broken(tiny, tmp_path_factory):
    root = tmp_path_factory.mktemp("broken")
    shutil.copytree(tiny.root / "videos", root / "videos")
    rows = [row for row in rows_of(tiny.root / "manifest.jsonl") if row.get("split") != "compositional"]
    write_rows(root / "m.jsonl", rows)
    free = {split: [row for row in rows if row.get("split") == split] for split in ("train", "standard")}
    clips = {}
    for name, (split, damage, _) in DAMAGE.items():
        clips[name] = free[split].pop()
        damage(root / "videos" / clips[name]["video"])
    boxes = json.loads((tiny.root / "bounding_boxes.json").read_text())
    for split in free:
        clips[f"boxes {split}"] = free[split].pop()
        del boxes[clips[f"boxes {split}"]["clip_id"]]
    (root / "boxes.json").write_text(json.dumps(boxes))
    made = Broken(tiny, root, clips, Result(0, "", ""), Result(0, "", ""), 0)
    none_held_out = ["--set", "held_out.fraction=0"]
    taught = call("mmkd-cache", "teach", "boxes", *made.stage_one, *none_held_out, "-o", root / "boxes", "--json")
    command = [*made.build, "--workers", 2]
    result, kills = run_killing(command, root / "videos" / clips["killed"]["video"], root / "log.err")
    return Broken(tiny, root, clips, taught, result, kills)


def test_a_build_goes_on_over_broken_videos_and_ends_with_exit_3(broken):
    assert broken.result.code == 3, broken.result.err[-3000:]
    assert "Traceback" not in broken.result.err
    assert broken.kills in (2, 3), "one worker, a fresh one that tried again, and one with the machine to itself"
    report = json.loads(broken.result.out)
    assert report["clips"] == 28
    assert len(report["unusable"]) == len(broken.clips) == 11
    for name, (split, _, reason) in DAMAGE.items():
        assert reason in report["unusable"][f"{split}/{broken.clips[name]['clip_id']}"], name
    for split in ("train", "standard"):
        found = report["unusable"][f"{split}/{broken.clips[f'boxes {split}']['clip_id']}"]
        assert found == "the video is not in the box file"
    last = broken.result.err.splitlines()[-1]
    assert last.startswith("error: 11 clips are unusable, more than --max-unusable 0; the first is ")


def test_status_and_logits_of_a_build_over_broken_videos(broken):
    reader = CacheReader(broken.root / "cache")
    undecodable = {broken.clips[name]["clip_id"] for name in DAMAGE}
    boxless = {broken.clips[f"boxes {split}"]["clip_id"] for split in ("train", "standard")}
    seen = 0
    for split in ("train", "standard"):
        table = reader.split(split)
        for name in ("rgb", "boxes"):
            logits, status = reader.logits(split, name)["action"], reader.status(split, name)
            for row, clip_id in enumerate(table.clip_ids):
                expected = Status.DECODE_FAILED if clip_id in undecodable else Status.OK
                if name == "boxes" and clip_id in boxless:
                    expected = Status.BOXES_MISSING
                assert (status[row] == expected).all(), (split, name, clip_id)
                assert np.isfinite(logits[row]).all() == (expected == Status.OK)
                seen += 1
    assert seen == 56


def test_max_unusable_decides_on_the_exit_code_and_nothing_is_built_again(broken):
    for limit, code in ((10, 3), (11, 0)):
        result = call(*broken.build, "--max-unusable", limit)
        assert result.code == code, result.err[-2000:]
        report = json.loads(result.out)
        assert (report["shards"], len(report["unusable"])) == (0, 11)


def test_inspect_names_each_clip_with_its_reason(broken):
    text = call_ok("mmkd-cache", "inspect", broken.root / "cache")
    splits = json.loads(call_ok("mmkd-cache", "inspect", broken.root / "cache", "--json"))["splits"]
    for name, (split, _, reason) in DAMAGE.items():
        clip_id = broken.clips[name]["clip_id"]
        for one in ("rgb", "boxes"):
            (item,) = [item for item in splits[split]["unusable"][one] if item["clip_id"] == clip_id]
            assert item["status"] == "decode_failed"
            assert reason in item["reason"]
            assert f"    {clip_id}: decode_failed: {item['reason']}" in text.splitlines()
    for split in ("train", "standard"):
        clip_id = broken.clips[f"boxes {split}"]["clip_id"]
        assert f"    {clip_id}: boxes_missing: the video is not in the box file" in text.splitlines()
        assert clip_id not in [item["clip_id"] for item in splits[split]["unusable"]["rgb"]]


@pytest.mark.parametrize("missing", ["renormalise", "drop", "label-only"])
def test_a_student_trains_on_what_is_usable_and_says_what_is_left_out(broken, tmp_path, missing):
    options = [*broken.data, *SHORT, "--missing", missing, "-o", tmp_path / "run", "--json"]
    result = call("mmkd-student", "train", *options)
    assert result.code == 0, result.err[-2000:]
    assert "3 of 14 training clips are left out: unreadable" in result.err
    fate = {"drop": "are left out", "label-only": "learn from their labels"}
    said = [line for line in result.err.splitlines() if "have no teacher" in line]
    expected = [f"3 of 33 training views have no teacher and {fate[missing]}"] if missing in fate else []
    assert said == expected
    standard = json.loads(result.out)["metrics"]["standard"]["action"]
    assert (standard["count"], standard["left_out"]) == (8, 6)


def test_teaching_on_broken_videos_says_how_many_are_left_out(broken):
    assert broken.taught.code == 0, broken.taught.err[-2000:]
    (line,) = [line for line in broken.taught.err.splitlines() if "3 of 14 clips are left out (" in line]
    for kind in ("video not found", "truncated", "the video is not in the box file"):
        assert f"{kind}: 1" in line
    training = json.loads(broken.taught.out)["training"]
    assert (training["clips"], training["skipped"]) == (11, 3)


@pytest.fixture(scope="module")
def not_finite(tiny, tmp_path_factory):
    """The RGB expert with NaN for weights, rightly signed, and the boxes expert's cache with it."""
    root = tmp_path_factory.mktemp("not-finite")
    shutil.copytree(tiny.root / "experts" / "rgb", root / "rgb")
    weights = root / "rgb" / "weights.safetensors"
    state = {
        name: torch.full_like(value, torch.nan) if value.is_floating_point() else value
        for name, value in load_file(weights).items()
    }
    save_file(state, weights)
    write_card(root / "rgb", replace(read_card(root / "rgb"), weights_sha256=file_sha256(weights)))
    splits = ["--set", "build.splits=[train, standard]"]
    options = [*stage_one(tiny), *splits, *expert(tiny, "boxes"), "--expert", root / "rgb", "--json"]
    return root, call("mmkd-cache", "build", *options, "-o", root / "cache")


def test_logits_that_are_not_finite_are_recorded_and_never_stored(not_finite):
    root, result = not_finite
    assert result.code == 3, result.err[-2000:]
    reasons = set(json.loads(result.out)["unusable"].values())
    assert reasons == {"expert rgb gave logits that are not finite or do not fit fp16"}
    reader = CacheReader(root / "cache")
    assert (reader.status("train", "rgb") == Status.NON_FINITE).all()
    assert (reader.status("train", "boxes") == Status.OK).all()
    text = call_ok("mmkd-cache", "inspect", root / "cache")
    assert "  14 clips without rgb logits:" in text
    assert text.count(": non_finite: ") == 28


def test_a_student_learns_from_the_experts_that_are_finite(tiny, not_finite, tmp_path):
    root, _ = not_finite
    command = ["mmkd-student", "train", *tiny.stage_two, "--cache", root / "cache", "--workers", 0, *SHORT]
    call_ok(*command, "-o", tmp_path / "out")
    for rule in ("drop", "label-only"):
        error = refused(*command, "-o", tmp_path / rule, "--missing", rule)
        assert "the cache holds no usable teacher logits for split 'train'" in error
