"""Bad input: one clear line and an exit code, or a recorded status and the build going on; never a traceback."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mmkd.cache_tools.data import clip_videos
from mmkd.cache_tools.heldout import HeldOut
from mmkd.cache_tools.layout import CachePaths, Status
from mmkd.cache_tools.reader import CacheReader
from mmkd.data_manifests.errors import VideoError
from mmkd.data_manifests.records import Clip

from .conftest import ENVIRONMENT, Result, Tiny
from .in_process import call, call_ok, refused

SHORT = ["--set", "train.epochs=1", "--set", "train.warmup_epochs=0", "--weights", "uniform"]


def rows_of(manifest: Path) -> list[dict[str, Any]]:
    """The manifest's JSON lines, the header first."""
    return [json.loads(line) for line in manifest.read_text().splitlines()]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def stage_one(tiny: Tiny, **other: object) -> list[object]:
    """Options of teach and build with some paths replaced; decoding in this process."""
    paths = {
        "manifest": tiny.root / "manifest.jsonl",
        "videos": tiny.root / "videos",
        "boxes": tiny.root / "bounding_boxes.json",
    }
    named = [part for name, path in (paths | other).items() for part in (f"--{name}", path)]
    return ["-c", tiny.root / "teacher.yaml", "-c", tiny.root / "tiny.yaml", *named, "--workers", 0]


def expert(tiny: Tiny, *names: str) -> list[object]:
    return [part for name in names for part in ("--expert", tiny.root / "experts" / name)]


# ---- one clear line and exit 2 (4 for changed bytes)


def label_outside(rows: list[dict[str, Any]]) -> None:
    rows[3]["labels"]["action"] = 14


def repeated_id(rows: list[dict[str, Any]]) -> None:
    rows[5]["clip_id"] = rows[2]["clip_id"]


def unknown_key(rows: list[dict[str, Any]]) -> None:
    rows[4]["lable"] = 3


def path_outside(rows: list[dict[str, Any]]) -> None:
    rows[4]["video"] = "../secret.webm"


@pytest.mark.parametrize(
    ("change", "line", "says"),
    [
        (label_outside, 4, "action label 14 is outside the class list (0..13)"),
        (repeated_id, 6, "already stands in line 3"),
        (unknown_key, 5, "unknown key 'lable'; allowed: clip_id"),
        (path_outside, 5, "'../secret.webm' must be a path inside the video root"),
    ],
)
def test_a_wrong_manifest_is_refused_with_its_line(tiny, tmp_path, change, line, says):
    rows = rows_of(tiny.root / "manifest.jsonl")
    change(rows)
    manifest = write_rows(tmp_path / "m.jsonl", rows)
    for command in (["teach", "rgb"], ["build", *expert(tiny, "rgb")]):
        error = refused("mmkd-cache", *command, *stage_one(tiny, manifest=manifest), "-o", tmp_path / "out")
        assert error.startswith(f"error: {manifest}:{line}: ")
        assert says in error
        assert "\n" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("segment", [{"end_seconds": 99.0}, {"start_seconds": 98.0}])
def test_a_clip_outside_its_video_is_refused_with_its_id(tiny, tmp_path, segment):
    rows = rows_of(tiny.root / "manifest.jsonl")
    for row in (rows[3], rows[7]):
        row.update(segment)
    manifest = write_rows(tmp_path / "m.jsonl", rows)
    for command in (["teach", "rgb"], ["build", *expert(tiny, "rgb"), "--max-unusable", 99]):
        error = refused("mmkd-cache", *command, *stage_one(tiny, manifest=manifest), "-o", tmp_path / "out")
        assert f"clip {rows[3]['clip_id']!r} of {rows[3]['video']}: " in error
        assert "9" in error
        assert "(1 more clips likewise)" in error
        assert "\n" not in error


def test_a_segment_of_a_broken_video_is_unusable_not_refused(tiny, tmp_path):
    clip = Clip("1", "1.webm", "train", {}, start_seconds=5, end_seconds=9)
    broken = VideoError("the file is cut short")
    assert clip_videos([clip], {"1.webm": broken}) == [broken]


def teach(*options: object) -> Callable[[Tiny, Path], tuple[object, ...]]:
    return lambda tiny, tmp: ("mmkd-cache", "teach", "rgb", *stage_one(tiny), *options, "-o", tmp / "out")


def build(*options: object) -> Callable[[Tiny, Path], tuple[object, ...]]:
    return lambda tiny, tmp: (
        *("mmkd-cache", "build", *stage_one(tiny), *expert(tiny, "rgb", "boxes"), *options, "-o", tmp / "out"),
    )


def train(*options: object) -> Callable[[Tiny, Path], tuple[object, ...]]:
    return lambda tiny, tmp: ("mmkd-student", "train", *tiny.stage_two, *options, "-o", tmp / "out")


REFUSED = {
    "unknown option": (
        build("--set", "views.sice_px=3"),
        "--set views.sice_px: views.sice_px: unknown key, did you",
    ),
    "unknown expert": (
        lambda tiny, tmp: ("mmkd-cache", "teach", "audio", *stage_one(tiny), "--seed", 1, "-o", tmp / "out"),
        "NAME: the recipe has no expert 'audio'; it has: rgb, flow, boxes",
    ),
    "no recipe": (build("-c", "none.yaml"), "File 'none.yaml' does not exist"),
    "no manifest": (teach("--manifest", "none.jsonl"), "cannot read the manifest none.jsonl"),
    "no videos": (teach("--videos", "nowhere"), "the video folder nowhere does not exist; give it with --videos"),
    "no boxes": (
        build("--boxes", "none.json"),
        "the box annotations none.json do not exist; give them with --boxes",
    ),
    "no such split": (
        teach("--set", "train_split=trian"),
        "no split 'trian'; it has: train, standard, compositional",
    ),
    "no such split to build": (build("--set", "build.splits=[test]"), "the manifest has no split 'test'; it has: "),
    "no such device": (teach("--device", "tpu"), "--device 'tpu' cannot be used"),
    "other views": (
        build("--set", "views.frames=4"),
        "expert 'rgb' was trained on something else than this recipe gives: views.frames: expert 8, now 4",
    ),
    "the same expert twice": (
        lambda tiny, tmp: build(*expert(tiny, "rgb"))(tiny, tmp),
        "two experts have the same name: boxes, rgb, rgb",
    ),
    "no expert there": (build("--expert", "here"), "here holds no expert; train one with `mmkd-cache teach`"),
    "no cache": (train("--cache", "here"), "here is not a cache; make one with `mmkd-cache build`"),
    "wrong weights": (train("--weights", "rgb=1,sound=2"), "--weights 'rgb=1,sound=2': 'sound' is unknown"),
    "weights that are none": (train("--weights", "best"), "--weights 'best': 'best' is not expert=number"),
    "negative weight": (train("--weights", "rgb=-1"), "the weight of rgb must be a finite number, 0 or more"),
    "fresh views of a cache": (train("--fresh-views"), "--fresh-views needs --labels-only"),
    "no such training split": (train("--set", "train_split=tarin"), "no split 'tarin'; it has: train"),
    "no run": (
        lambda tiny, tmp: ("mmkd-student", "evaluate", *tiny.stage_two, tmp / "none"),
        "model.safetensors is missing: the run is not finished",
    ),
    "nothing to compare": (
        lambda tiny, tmp: ("mmkd-student", "compare"),
        "give --cache and --manifest, or --tables",
    ),
    "no such report": (lambda tiny, tmp: ("mmkd-cache", "inspect", tmp / "none"), "is not a cache; make one with"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_options_are_refused_in_one_line(tiny, tmp_path, case):
    command, says = REFUSED[case]
    error = refused(*command(tiny, tmp_path))
    assert says in error
    assert not (tmp_path / "out").exists()


def test_a_run_with_everything_held_out_is_refused(tiny, tmp_path):
    rows = [row for row in rows_of(tiny.root / "manifest.jsonl") if row.get("split", "train") == "train"]
    ids = [row["clip_id"] for row in rows[1:]]
    held = HeldOut(0.5, 0).mask("mmkd-demo", ids)
    assert held.any(), "another seed is needed"
    kept = [row for row, out in zip(rows[1:], held, strict=True) if out]
    manifest = write_rows(tmp_path / "m.jsonl", [rows[0], *kept])
    options = [*stage_one(tiny, manifest=manifest), "--set", "held_out.fraction=0.5"]
    error = refused("mmkd-cache", "teach", "rgb", *options, "-o", tmp_path / "out")
    assert "all are held out; lower held_out.fraction" in error


def test_all_videos_missing_is_refused(tiny, tmp_path):
    (tmp_path / "videos").mkdir()
    for command in (["teach", "rgb"], ["build", *expert(tiny, "rgb"), "--max-unusable", 99]):
        options = stage_one(tiny, videos=tmp_path / "videos")
        error = refused("mmkd-cache", *command, *options, "-o", tmp_path / "out")
        assert f"none of 14 clips can be read below {tmp_path / 'videos'}" in error
        assert "video not found" in error
    names = ["--split", f"train={tiny.root / 'train.json'}", "--labels", tiny.root / "labels.json"]
    error = refused(
        *("mmkd-cache", "manifest", "something-something", *names),
        *("--videos", tmp_path / "videos", "-o", tmp_path / "m.jsonl"),
    )
    assert "none of the 14 videos is in" in error


@pytest.mark.parametrize(
    ("split", "text", "says"),
    [
        ("train=train.json", "[]", "expected a list of elements"),
        ("train=train.json", '[{"id": "1", "template": "No such class"}]', "element 1: template 'No such class'"),
        ("train=train.json", '[{"id": 1, "template": "a"}]', 'element 1: "id" must be a string'),
        ("train=train.json", '[{"id": "1"', "not valid JSON"),
        ("train=none.json", "", "cannot read"),
        ("train.json", "[]", "expected NAME=FILE"),
        ("tr-ain=train.json", '[{"id": "1", "template": "a"}]', "split 'tr-ain' is not an identifier"),
    ],
)
def test_a_wrong_split_file_is_refused(tmp_path, monkeypatch, split, text, says):
    monkeypatch.chdir(tmp_path)
    Path("train.json").write_text(text)
    Path("labels.json").write_text('{"a": "0", "b": "1"}')
    options = ["--split", split, "--labels", "labels.json", "-o", "m.jsonl"]
    error = refused("mmkd-cache", "manifest", "something-something", *options)
    assert says in error
    assert not Path("m.jsonl").exists()


def test_an_output_that_is_a_file_is_refused(tiny, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    split = ["--split", f"train={tiny.root / 'train.json'}", "--labels", tiny.root / "labels.json"]
    for command in (
        teach("-o", file)(tiny, tmp_path)[:-2],
        build("-o", file)(tiny, tmp_path)[:-2],
        train(*SHORT, "-o", file)(tiny, tmp_path)[:-2],
        ("mmkd-cache", "demo", file),
        ("mmkd-cache", "manifest", "something-something", *split, "-o", tmp_path),
        ("mmkd-cache", "inspect", file),
    ):
        error = refused(*command)
        assert str(tmp_path) in error
    assert file.read_text() == "mine"


def test_a_cache_of_another_manifest_is_refused(tiny, tmp_path):
    rows = rows_of(tiny.root / "manifest.jsonl")
    rows[2]["labels"]["action"] = (rows[2]["labels"]["action"] + 1) % 14
    other = write_rows(tmp_path / "other.jsonl", rows)
    error = refused(*train("--manifest", other, *SHORT)(tiny, tmp_path))
    assert "the cache was made from another manifest (clips, labels or splits differ)" in error
    names = rows[0]["heads"]["action"]
    rows[0]["heads"]["action"] = [*names[1:], names[0]]
    write_rows(other, rows)
    error = refused(*train("--manifest", other, *SHORT)(tiny, tmp_path))
    assert "other classes than the manifest's (names or order differ)" in error
    assert not (tmp_path / "out").exists()


def test_an_unfinished_cache_is_refused(tiny, tmp_path):
    shutil.copytree(tiny.root / "cache", tmp_path / "cache")
    CachePaths(tmp_path / "cache").final.unlink()
    error = refused(*train("--cache", tmp_path / "cache", *SHORT)(tiny, tmp_path))
    assert f"the cache {tmp_path / 'cache'} is not finished; run the same `mmkd-cache build` again" in error


def test_an_expert_with_other_weights_than_its_card_says_is_refused_with_exit_4(tiny, tmp_path):
    shutil.copytree(tiny.root / "experts" / "rgb", tmp_path / "rgb")
    weights = tmp_path / "rgb" / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    options = ["--expert", tmp_path / "rgb", "-o", tmp_path / "out"]
    error = refused("mmkd-cache", "build", *stage_one(tiny), *options, code=4)
    assert f"{weights} is missing or not the file that expert.json describes" in error


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda card: card.update(schema="mmkd-expert-9"), "has schema 'mmkd-expert-9'"),
        (lambda card: card.pop("heads"), "is not an expert of schema"),
        (lambda card: card["recipe"].update(modality="smell"), "does not describe its weights"),
        (lambda card: card["heads"].update(action=["a", "b"]), "does not describe its weights"),
    ],
)
def test_a_wrong_expert_card_is_refused(tiny, tmp_path, change, says):
    shutil.copytree(tiny.root / "experts" / "rgb", tmp_path / "rgb")
    path = tmp_path / "rgb" / "expert.json"
    card = json.loads(path.read_text())
    change(card)
    path.write_text(json.dumps(card))
    error = refused("mmkd-cache", "build", *stage_one(tiny), "--expert", tmp_path / "rgb", "-o", tmp_path / "out")
    assert says in error
    assert "\n" not in error


def test_another_run_in_the_same_folder_is_refused_and_leaves_it_alone(tiny, tmp_path):
    call_ok(*train(*SHORT)(tiny, tmp_path))
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    for other in (["--labels-only"], ["--missing", "drop"], ["--temperature", 2], ["--seed", 1]):
        assert "belongs to another run" in refused(*train(*SHORT, *other)(tiny, tmp_path), code=5)
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before


def test_a_video_that_changed_after_the_build_is_named(tiny, tmp_path):
    shutil.copytree(tiny.root / "videos", tmp_path / "videos")
    video = rows_of(tiny.root / "manifest.jsonl")[2]["video"]
    options = ["--videos", tmp_path / "videos", "--facts", tmp_path / "facts", "--workers", 0, *SHORT]
    shutil.copy(
        tiny.root / "videos" / rows_of(tiny.root / "manifest.jsonl")[3]["video"], tmp_path / "videos" / video
    )
    error = refused(*train(*options)(tiny, tmp_path), code=4)
    assert f"the video {video} is not the file that the cache was built from" in error
    (tmp_path / "videos" / video).unlink()
    error = refused(*train(*options)(tiny, tmp_path), code=4)
    assert "could be read when the cache was built, and now: video not found" in error
    assert not (tmp_path / "out").exists()


# ---- recorded with a status and its reason, the build going on


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
    assert broken.kills == 2, "one worker, and the fresh one that tried again"
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
    assert "3 of 14 clips are left out; the first reason: " in broken.taught.err
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
    card = json.loads((root / "rgb" / "expert.json").read_text())
    card["weights_sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    (root / "rgb" / "expert.json").write_text(json.dumps(card))
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
    command = train("--cache", root / "cache", "--workers", 0, *SHORT)(tiny, tmp_path)
    assert call(*command).code == 0
    for rule in ("drop", "label-only"):
        error = refused(*command[:-1], tmp_path / rule, "--missing", rule)
        assert "the cache holds no usable teacher logits for split 'train'" in error
