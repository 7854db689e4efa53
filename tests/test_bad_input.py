"""Bad input that is refused: one clear line, naming file, row or option, and an exit code; never a traceback."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmkd.cache_tools.frames.clip_set import clip_videos
from mmkd.cache_tools.layout import ROOT
from mmkd.cache_tools.views.held_out import HeldOut
from mmkd.data_manifests.errors import VideoError
from mmkd.data_manifests.manifest import Clip
from tests.helpers.in_process import call_ok, refused
from tests.helpers.tiny import Tiny
from tests.helpers.tiny_data import SHORT, expert, rows_of, stage_one, write_rows


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


def test_a_segment_of_a_broken_video_is_unusable_not_refused(tiny, tmp_path):
    clip = Clip("1", "1.webm", "train", {}, start_seconds=5, end_seconds=9)
    broken = VideoError("the file is cut short")
    assert list(clip_videos([clip], {"1.webm": broken})) == [broken]


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
    "no such device": (teach("--device", "tpu"), "--device 'tpu' is not auto, cpu, cuda or cuda:N"),
    "other views": (
        build("--set", "views.frames=4"),
        "expert 'rgb' was trained on something else than this recipe gives: views.frames: expert 8, now 4",
    ),
    "the same expert twice": (
        lambda tiny, tmp: build(*expert(tiny, "rgb"))(tiny, tmp),
        "two experts have the same name: boxes, rgb, rgb",
    ),
    "no expert there": (build("--expert", "here"), "here is not an expert: expert.json: No such file or directory"),
    "no cache": (train("--cache", "here"), "here is not a cache; make one with `mmkd-cache build`"),
    "wrong weights": (train("--weights", "rgb=1,sound=2"), "--weights 'rgb=1,sound=2': 'sound' is unknown"),
    "weights that are none": (
        train("--weights", "best"),
        "'best' is not expert=number (schemes: uniform, heldout, per-sample, or FILE.json",
    ),
    "negative weight": (train("--weights", "rgb=-1"), "the weight of rgb must be a finite number, 0 or more"),
    "fresh views of a cache": (train("--fresh-views"), "--fresh-views needs --labels-only"),
    "no such training split": (train("--set", "train_split=tarin"), "no split 'tarin'; it has: train"),
    "no run": (
        lambda tiny, tmp: ("mmkd-student", "evaluate", *tiny.stage_two, tmp / "none"),
        "none is not a run of `mmkd-student train`: run.json: No such file or directory",
    ),
    "nothing to compare": (
        lambda tiny, tmp: ("mmkd-student", "compare"),
        "give --manifest and, for teacher and experts, --cache; or --tables",
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
        lost = refused("mmkd-cache", *command, *options, "-o", tmp_path / "out", code=74)
        assert "is empty or gone, and it held videos before: is its disk mounted, and --videos right?" in lost
        options += ["--facts", tmp_path / "facts"]  # without those that are kept beside the manifest
        error = refused("mmkd-cache", *command, *options, "-o", tmp_path / "out")
        assert f"none of 14 clips can be read below {tmp_path / 'videos'}" in error
        assert "video not found" in error
    names = ["--split", f"train={tiny.root / 'train.json'}", "--labels", tiny.root / "labels.json"]
    error = refused(
        *("mmkd-cache", "manifest", "something-something", *names),
        *("--videos", tmp_path / "videos", "-o", tmp_path / "m.jsonl"),
    )
    assert "none of 14 videos is in" in error


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
    assert "the cache has other labels for clip '2'" in error
    names = rows[0]["heads"]["action"]
    rows[0]["heads"]["action"] = [*names[1:], names[0]]
    write_rows(other, rows)
    error = refused(*train("--manifest", other, *SHORT)(tiny, tmp_path))
    assert "other classes than the manifest's (names or order differ)" in error
    assert not (tmp_path / "out").exists()


def test_an_unfinished_cache_is_refused(tiny, tmp_path):
    shutil.copytree(tiny.root / "cache", tmp_path / "cache")
    (tmp_path / "cache" / ROOT).unlink()
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
