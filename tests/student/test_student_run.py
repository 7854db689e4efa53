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
from tests.helpers.commands import ENVIRONMENT, run_command, run_ok
from tests.helpers.in_process import refused
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


def test_baseline_and_student_share_everything_but_the_targets(stripped):
    run_ok("mmkd-student", "train", *stripped.stage_two, "-o", stripped.root / "student", *FAST)
    run_ok("mmkd-student", "train", *stripped.stage_two, "-o", stripped.root / "base", "--labels-only", *FAST)
    runs = {name: stripped.root / name for name in ("student", "base")}
    states = {name: checkpoint_identity(path) for name, path in runs.items()}
    for key in ("recipe", "clips", "labels", "initial_weights"):
        assert states["student"][key] == states["base"][key]
    assert states["base"]["loss"] is None
    weights = {name: load_file(path / "model.safetensors") for name, path in runs.items()}
    assert any(not np.array_equal(weights["student"][key], weights["base"][key]) for key in weights["base"])
    table = run_ok(
        "mmkd-student", "compare", "--cache", stripped.root / "cache", "--manifest",
        stripped.root / "manifest.jsonl", "--run", f"baseline={runs['base']}", "--run",
        f"student={runs['student']}", "--out", stripped.root / "table.json",
    )  # fmt: skip
    rows = list(load_table(stripped.root / "table.json").rows)
    assert rows == ["rgb expert", "flow expert", "boxes expert", "teacher", "baseline", "student"]
    for row in rows:
        assert f"| {row}" in table
    evaluate = ("mmkd-student", "evaluate", "--cache", stripped.root / "cache", runs["student"])
    assert "give the recipe that the run was trained with (-c)" in refused(
        *evaluate, "--set", "train.network=r3d_18"
    )
    assert "is not a run" in refused(*evaluate[:-1], stripped.root / "cache")
    torn = shutil.copytree(runs["student"], stripped.root / "torn") / "model.safetensors"
    torn.write_bytes(torn.read_bytes()[:1000])
    assert "torn/model.safetensors is damaged" in refused(*evaluate[:-1], torn.parent, code=4)


def test_a_run_is_evaluated_with_its_own_recipe_and_with_another_cache_beside_it(stripped, tiny, tmp_path):
    run = stripped.root / "student"
    run_ok("mmkd-student", "train", *stripped.stage_two, "-o", run, *FAST)
    first = (run / "evaluation.json").read_bytes()
    (run / "evaluation.json").unlink()
    run_ok("mmkd-student", "evaluate", run, "--cache", stripped.root / "cache")
    assert (run / "evaluation.json").read_bytes() == first
    other = tmp_path / "other"
    run_ok(
        "mmkd-cache", "build", *tiny.stage_one, "--expert", tiny.root / "experts" / "rgb", "--views", 1, "-o", other
    )
    table = ("mmkd-student", "compare", "--cache", other, "--manifest", stripped.root / "manifest.jsonl")
    assert "run `mmkd-student evaluate" in refused(*table, "--run", f"student={run}", "--weights", "uniform")
    run_ok("mmkd-student", "evaluate", run, "--cache", other)
    assert "| student" in run_ok(*table, "--run", f"student={run}", "--weights", "uniform")
    assert (run / "evaluation.json").read_bytes() == first
    assert len(list(run.glob("evaluation-*.json"))) == 1
    turned = shutil.copytree(run, tmp_path / "turned") / "run.json"
    stored = open_seal(turned.read_bytes())
    stored["heads"]["action"].reverse()
    turned.write_text(json.dumps(seal(stored)))
    evaluate = ("mmkd-student", "evaluate", turned.parent, "--cache", other)
    assert "was trained for other classes than the cache's (names or order differ)" in refused(*evaluate)


def checkpoint_identity(run):
    (state,) = run.glob("checkpoint-*/state.json")
    return json.loads(state.read_text())["identity"]


def test_fresh_views_differ_from_the_cached_ones_and_need_labels(stripped):
    run_ok(
        "mmkd-student", "train", *stripped.stage_two, "-o", stripped.root / "fresh", "--labels-only",
        "--fresh-views", *FAST,
    )  # fmt: skip
    assert checkpoint_identity(stripped.root / "fresh")["clips"]["views"] is None
    refused = run_command("mmkd-student", "train", *stripped.stage_two, "-o", stripped.root / "no", "--fresh-views")
    assert refused.code == 2
    assert "--labels-only" in refused.err


def test_other_pixels_than_the_teacher_saw_are_refused(stripped, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(stripped.root, root)
    first, second = sorted((root / "videos").glob("*.webm"))[:2]
    swapped = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(swapped)
    result = run_command("mmkd-student", "train", *Tiny(root).stage_two, "-o", root / "run", *FAST)
    assert result.code == 4
    assert "not the file that the cache was built from" in result.err
    assert "Traceback" not in result.err


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
