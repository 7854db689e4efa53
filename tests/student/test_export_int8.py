"""A student in 8 bits: a quarter of the size, ranges from training clips, and what it costs counted on others."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from mmkd.cache_tools.frames.clip_set import ClipSet, DataRecipe
from mmkd.data_manifests.errors import InputError, VerificationError
from mmkd.student.evaluation.run_files import read_run
from mmkd.student.evaluation.trained import load_student
from mmkd.student.export.export_run import Int8Export
from mmkd.student.export.int8 import int8_bytes, price
from mmkd.student.export.real_frames import ClipViews, of_clips
from tests.helpers.in_process import call_ok, refused
from tests.helpers.places import unpack_before

DATA = ("--manifest", "manifest.jsonl", "--videos", "videos", "--workers", "0")
EXPORT = ("mmkd-student", "export", "run", "--no-latency", "--int8")
TRAIN = ("mmkd-student", "train", "-c", "student.yaml", "--cache", "cache", "--node-copies", "copies", "-o", "run")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with a trained `run` and its `exported` files."""
    root = unpack_before(tmp_path_factory.mktemp("int8"))
    shutil.rmtree(root / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        call_ok(*TRAIN, "--labels-only", "--set", "train.weights=null")
        (root / "told.txt").write_text(call_ok(*EXPORT, "-o", "exported", *DATA))
    return root


@pytest.fixture
def world(exported, monkeypatch):
    monkeypatch.chdir(exported)
    return exported


def logits_of(path, frames):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(["action"], {"frames": frames})[0]


def clips_of(student, split):
    clip_set = ClipSet(DataRecipe(manifest="manifest.jsonl", videos="videos", workers=0))
    return list(of_clips(student, clip_set, [split], most=512).read())


def test_the_file_in_8_bits_has_8_bit_weights_a_quarter_of_the_size_and_the_students_class_names(world):
    full, small = Path("exported/model.onnx"), Path("exported/model.int8.onnx")
    assert small.stat().st_size < 0.3 * full.stat().st_size
    model = onnx.load(small)
    kernels = [value for value in model.graph.initializer if len(value.dims) == 5 and max(value.dims) > 3]
    assert len(kernels) == 6
    assert {value.data_type for value in kernels} == {onnx.TensorProto.INT8}
    told = json.loads({entry.key: entry.value for entry in model.metadata_props}["mmkd"])
    assert told["classes"] == load_student(Path("run")).heads
    assert told["bits"] == 8
    assert [entry.key for entry in model.metadata_props] == ["mmkd"]


def test_its_logits_are_near_the_students_and_not_the_same_for_any_batch(world):
    student = load_student(Path("run"))
    frames = np.concatenate([clip.pixels for clip in clips_of(student, "standard")])
    wanted = student.logits(frames)["action"]
    for batch in (1, 3):
        found = logits_of("exported/model.int8.onnx", frames[:batch])
        gap = np.abs(found - wanted[:batch]).max()
        assert 0 < gap < 0.1 * np.ptp(wanted)


def test_the_card_has_the_accuracies_of_both_files_counted_by_onnx_runtime_on_the_evaluation_clips(world):
    card = json.loads(Path("exported/card.json").read_bytes())
    text = Path("exported/README.md").read_text()
    found = card["int8"]["heads"]["action"]
    student = load_student(Path("run"))
    clips = clips_of(student, "standard")
    labels = [clip.labels["action"] for clip in clips]
    frames = np.concatenate([clip.pixels for clip in clips])
    best = {name: logits_of(f"exported/{name}", frames).argmax(1) for name in ("model.onnx", "model.int8.onnx")}
    assert card["int8"]["frames"] == "4 clips of standard of before"
    assert found == {
        "clips": 4,
        "top1": np.mean(best["model.onnx"] == labels),
        "top1_int8": np.mean(best["model.int8.onnx"] == labels),
        "same": np.mean(best["model.onnx"] == best["model.int8.onnx"]),
    }
    row = f"| action | {100 * found['top1']:.1f} | {100 * found['top1_int8']:.1f} | {100 * found['same']:.1f} | 4 |"
    assert row in text
    assert "`model.int8.onnx` | " in text, "the table of checks has it, too"
    assert f"in 8 bits: action top-1 {100 * found['top1_int8']:.1f} %" in Path("told.txt").read_text()


def clip(value, **labels):
    return ClipViews(np.full((2, 1, 1, 1, 3), value, np.uint8), labels)


def test_right_answers_are_counted_by_head_over_the_clips_that_have_a_label():
    clips = [clip(0, verb=0, noun=0), clip(1, verb=1, noun=None), clip(2, verb=2, noun=None), clip(0, verb=1)]

    def full(pixels):
        return {head: np.eye(3, dtype=np.float32)[pixels[:, 0, 0, 0, 0]] for head in ("verb", "noun", "other")}

    def small(pixels):  # names class 0 where the student names 2
        return {head: np.eye(3, dtype=np.float32)[pixels[:, 0, 0, 0, 0] % 2] for head in ("verb", "noun", "other")}

    assert price(full, small, clips) == {
        "verb": {"clips": 4, "top1": 3 / 4, "top1_int8": 2 / 4, "same": 3 / 4},
        "noun": {"clips": 1, "top1": 1.0, "top1_int8": 1.0, "same": 1.0},
    }


def test_a_clip_counts_by_the_mean_over_its_views():
    views = {"verb": np.array([[1.0, 0.0], [0.0, 3.0]], np.float32)}
    assert price(lambda _: views, lambda _: views, [clip(0, verb=1)])["verb"]["top1"] == 1


def test_logits_that_are_no_numbers_are_refused():
    nan = {"verb": np.full((2, 3), np.nan, np.float32)}
    with pytest.raises(VerificationError, match="8 bits gives NaN"):
        price(lambda _: nan, lambda _: nan, [clip(0, verb=1)])


def test_ranges_are_those_of_training_clips(world, monkeypatch):
    student = load_student(Path("run"))
    seen = []
    monkeypatch.setattr("mmkd.student.export.export_run.int8_bytes", lambda file, views, told: seen.extend(views))
    clip_set = ClipSet(DataRecipe(manifest="manifest.jsonl", videos="videos", workers=0))
    Int8Export(student, read_run(Path("run")), clip_set).made(b"", {})
    wanted = np.concatenate([clip.pixels for clip in clips_of(student, "train")])
    np.testing.assert_array_equal(np.stack(seen), wanted)


def test_what_cannot_be_quantised_is_one_line_and_nothing_is_written(world, tmp_path):
    out = tmp_path / "out"
    assert "--int8 needs --manifest and --videos" in refused(*EXPORT, "-o", out)
    assert "--format onnx or both" in refused(*EXPORT, "-o", out, *DATA, "--format", "pt2")
    text = Path("manifest.jsonl").read_text()
    rest = tmp_path / "m.jsonl"
    rest.write_text("".join(line for line in text.splitlines(True) if '"train"' not in line))
    line = refused(*EXPORT, "-o", out, "--manifest", rest, "--videos", "videos", "--workers", 0)
    assert "m.jsonl has no split 'train', which the student learned from" in line
    assert not out.exists()


def test_a_network_that_onnx_runtime_cannot_quantise_is_refused(world):
    with pytest.raises(InputError, match="cannot quantise this network"):
        int8_bytes(Path("exported/model.onnx").read_bytes(), [], {})
