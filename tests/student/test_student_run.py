"""Stage two on a tiny cache: RGB, manifest and cache are all it needs, and baseline and student start alike."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from mmkd.cache_tools.cache.reader import CacheReader
from mmkd.cache_tools.cache.sealed import open_seal, seal
from mmkd.student.evaluation.table import load_table
from mmkd.student.teacher.cached_teacher import choose_mixtures, mix_split
from tests.helpers.commands import ENVIRONMENT
from tests.helpers.in_process import call, call_ok, refused
from tests.helpers.tiny import Tiny

FAST = ("--set", "train.epochs=2", "--set", "train.batch_size=8", "--set", "train.warmup_epochs=0")
WATCHED_RUN = """
import sys
sys.argv[0] = "mmkd-student"
from mmkd.student.cli import cli
cli.main(sys.argv[1:], standalone_mode=False)
loaded = sorted(name for name in sys.modules if name.startswith("mmkd.pipeline"))
print("LOADED", loaded, file=sys.stderr)
"""


@pytest.fixture(scope="module")
def stripped(tiny, tmp_path_factory):
    """A copy with nothing but what stage two may need: no flow, no boxes, no experts."""
    root = tmp_path_factory.mktemp("stripped")
    for name in ("videos", "cache"):
        shutil.copytree(tiny.root / name, root / name)
    for name in ("manifest.jsonl", "student.yaml"):
        shutil.copy(tiny.root / name, root / name)
    assert sorted(path.name for path in root.iterdir()) == ["cache", "manifest.jsonl", "student.yaml", "videos"]
    return Tiny(root)


def test_the_student_trains_without_flow_boxes_experts_or_any_pipeline_module(stripped):
    arguments = ["train", *stripped.stage_two, "-o", stripped.root / "student", *FAST]
    command = [sys.executable, "-c", WATCHED_RUN, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "LOADED []" in done.stderr
    found = json.loads((stripped.root / "student" / "evaluation.json").read_text())
    assert set(found["metrics"]) == {"standard", "compositional"}
    assert found["metrics"]["standard"]["action"]["count"] == 14
    assert 0 <= found["metrics"]["standard"]["action"]["teacher_kl"] < 10


@pytest.fixture(scope="module")
def student(stripped):
    """A run's folder; tests must not write into it."""
    call_ok("mmkd-student", "train", *stripped.stage_two, "-o", stripped.root / "run", *FAST)
    return stripped.root / "run"


@pytest.fixture(scope="module")
def baseline(stripped):
    call_ok("mmkd-student", "train", *stripped.stage_two, "-o", stripped.root / "base", "--labels-only", *FAST)
    return stripped.root / "base"


@pytest.fixture
def copied(student, tmp_path):
    """A copy of the run that may be written into."""
    return shutil.copytree(student, tmp_path / "copied")


@pytest.fixture(scope="module")
def other(tiny, tmp_path_factory):
    """Another cache of the same clips: one expert, one view."""
    out = tmp_path_factory.mktemp("other") / "cache"
    call_ok(
        "mmkd-cache", "build", *tiny.stage_one, "--expert", tiny.root / "experts" / "rgb", "--views", 1, "-o", out
    )
    return out


def checkpoint_identity(run):
    state = max(run.glob("checkpoint-*/state.json"))  # the newest of the two that stay
    return json.loads(state.read_text())["identity"]


def test_baseline_and_student_share_everything_but_the_targets(student, baseline):
    taught, alone = checkpoint_identity(student), checkpoint_identity(baseline)
    for key in ("recipe", "clips", "labels", "initial_weights"):
        assert taught[key] == alone[key]
    assert alone["loss"] is None
    weights = [load_file(run / "model.safetensors") for run in (student, baseline)]
    assert any(not np.array_equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_settings_of_labels_that_a_student_does_not_learn_from_are_said_to_rest(stripped, tmp_path):
    smooth = ("--set", "train.label_smoothing=0.1", "--set", "train.class_balance={inverse_frequency: 1}")
    said = "train.label_smoothing, train.class_balance: no effect, as labels have the weight 0 (loss.label_weight)"
    for number, (options, rests) in enumerate(
        [((), True), (("--label-weight", 0.5), False), (("--labels-only",), False)]
    ):
        done = call(
            "mmkd-student", "train", *stripped.stage_two, *FAST, *smooth, *options, "-o", tmp_path / f"{number}"
        )
        assert done.code == 0
        assert (said in done.err) == rests


def test_the_table_compares_experts_teacher_and_runs(stripped, student, baseline, tmp_path):
    names = ("--cache", stripped.root / "cache", "--manifest", stripped.root / "manifest.jsonl")
    runs = ("--run", f"baseline={baseline}", "--run", f"student={student}")
    table = call_ok("mmkd-student", "compare", *names, *runs, "--out", tmp_path / "table.json")
    rows = list(load_table(tmp_path / "table.json").rows)
    assert rows == ["rgb expert", "flow expert", "boxes expert", "teacher", "baseline", "student"]
    for row in rows:
        assert f"| {row}" in table


def test_what_cannot_be_evaluated_is_refused_by_name(stripped, student, copied):
    evaluate = ("mmkd-student", "evaluate", "--cache", stripped.root / "cache")
    error = refused(*evaluate, student, "--set", "train.network=r3d_18")
    assert "give the recipe that the run was trained with (-c)" in error
    assert "is not a run" in refused(*evaluate, stripped.root / "cache")
    torn = copied / "model.safetensors"
    torn.write_bytes(torn.read_bytes()[:1000])
    assert "copied/model.safetensors is damaged" in refused(*evaluate, copied, code=4)


def test_a_run_is_evaluated_again_with_its_own_recipe_to_the_same_bytes(stripped, copied):
    first = (copied / "evaluation.json").read_bytes()
    (copied / "evaluation.json").unlink()
    call_ok("mmkd-student", "evaluate", copied, "--cache", stripped.root / "cache")
    assert (copied / "evaluation.json").read_bytes() == first


def test_an_evaluation_with_another_cache_lies_beside_that_of_the_run_s_own(stripped, copied, other):
    first = (copied / "evaluation.json").read_bytes()
    table = ("mmkd-student", "compare", "--cache", other, "--manifest", stripped.root / "manifest.jsonl")
    runs = ("--run", f"student={copied}", "--weights", "uniform")
    assert "run `mmkd-student evaluate" in refused(*table, *runs)
    call_ok("mmkd-student", "evaluate", copied, "--cache", other)
    assert "| student" in call_ok(*table, *runs)
    assert (copied / "evaluation.json").read_bytes() == first
    assert len(list(copied.glob("evaluation-*.json"))) == 1


def test_a_run_of_other_classes_than_the_cache_s_is_refused(copied, other):
    stored = open_seal((copied / "run.json").read_bytes())
    stored["heads"]["action"].reverse()
    (copied / "run.json").write_text(json.dumps(seal(stored)))
    error = refused("mmkd-student", "evaluate", copied, "--cache", other)
    assert "was trained for other classes than the cache's (names or order differ)" in error


def test_fresh_views_differ_from_the_cached_ones(stripped, tmp_path):
    fresh = ("--labels-only", "--fresh-views", "-o", tmp_path / "fresh")
    call_ok("mmkd-student", "train", *stripped.stage_two, *fresh, *FAST)
    assert checkpoint_identity(tmp_path / "fresh")["clips"]["views"] is None


def test_other_pixels_than_the_teacher_saw_are_refused(stripped, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(stripped.root, root)
    first, second = sorted((root / "videos").glob("*.webm"))[:2]
    swapped = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(swapped)
    error = refused("mmkd-student", "train", *Tiny(root).stage_two, "-o", root / "again", *FAST, code=4)
    assert "not the file that the cache was built from" in error


def test_the_mixed_teacher_is_the_weighted_sum_of_the_cached_logits(tiny):
    reader = CacheReader(tiny.root / "cache")
    weights, warning = choose_mixtures(reader, "rgb=1,boxes=3", weights_temperature=1.0, train_split="train")
    mixed = mix_split(reader, "standard", weights, "renormalise")
    expected = sum(
        share * reader.logits("standard", name)["action"] for name, share in (("rgb", 0.25), ("boxes", 0.75))
    )
    assert warning is None
    np.testing.assert_allclose(mixed.logits["action"], expected, atol=1e-5)
    assert mixed.valid.all()


def test_held_out_weights_are_the_softmin_of_mean_cross_entropy(tiny):
    reader = CacheReader(tiny.root / "cache")
    weights, _ = choose_mixtures(reader, "heldout", weights_temperature=0.5, train_split="train")
    table = reader.split("train")
    held = reader.held_out.mask(reader.dataset, table.clip_ids)
    errors = []
    for expert in reader.experts:
        logits = reader.logits("train", expert)["action"][held].astype(np.float64)
        labels = np.broadcast_to(table.labels["action"][held][:, None], logits.shape[:2])
        chosen = np.take_along_axis(logits, labels[..., None], -1)[..., 0]
        errors.append((np.log(np.exp(logits).sum(-1)) - chosen).mean())
    scores = np.exp(-np.array(errors) / 0.5)
    expected = dict(zip(reader.experts, scores / scores.sum(), strict=True))
    assert weights["action"].weights == pytest.approx(expected, abs=1e-6)
