"""Weights after the fact: figures recomputed with torch, honest halves, and training targets from any scheme."""

import json

import numpy as np
import pytest
import torch
from torch.nn import functional

from mmkd.cache_tools.cache.reader import CacheReader
from mmkd.cache_tools.views.held_out import HeldOut
from mmkd.data_manifests.errors import InputError
from mmkd.data_manifests.manifest import Head
from mmkd.student.teacher.cached_targets import shared_targets
from mmkd.student.teacher.cached_teacher import choose_mixtures, mix_split
from mmkd.student.teacher.mixing import Mixture, sample_weights
from mmkd.student.teacher.mixture_file import mixture_file_for
from mmkd.student.weighing import weigh as weigh_module
from mmkd.student.weighing.calibration import fit_calibrated
from mmkd.student.weighing.weigh import SCHEMES, chosen_clips, read_head, weigh_experts
from mmkd.student.weighing.weigh_report import report_lines
from tests.helpers.in_process import call_ok, refused
from tests.helpers.random_logits import draw_logits, draw_manifest
from tests.helpers.small_cache import write_cache
from tests.helpers.tiny_data import SHORT

EXPERTS = {"rgb": 1.5, "flow": 4.0, "boxes": 0.5}
HEADS = (Head("verb", tuple("abcdef")), Head("noun", tuple("uvwxyz")))
ROWS, VIEWS = {"train": 120, "test": 40}, 2


MANIFEST = draw_manifest(HEADS, ROWS)


def make_logits():
    """Experts that know something of the label, each at its own scale; flow has nothing for every 7th row."""
    found = draw_logits(MANIFEST, EXPERTS, dict.fromkeys(ROWS, VIEWS), known=1.2)
    for experts in found.values():
        for value in experts["flow"].values():
            value[::7] = np.nan
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    directory = tmp_path_factory.mktemp("weigh") / "cache"
    write_cache(directory, MANIFEST, make_logits(), held_out=HeldOut(0.6, 0), shard_rows=64)
    return directory


@pytest.fixture(scope="module")
def reader(root):
    return CacheReader(root)


@pytest.fixture(scope="module")
def report(reader):
    return weigh_experts(reader, train_split="train", weights_temperature=0.5)


def held_out_views(reader, head):
    """Logits (expert -> (clips, views, C)), labels and complete views of the held-out clips, read another way."""
    table = reader.split("train")
    rows = np.flatnonzero(HeldOut(0.6, 0).mask("demo", table.clip_ids))
    logits = {name: reader.logits("train", name)[head][rows] for name in EXPERTS}
    complete = np.isfinite(np.stack(list(logits.values()))).all((0, 3)) & (table.labels[head][rows] >= 0)[:, None]
    return rows, logits, table.labels[head][rows], complete


def torch_figures(logits, labels):
    z, y = torch.from_numpy(logits.astype(np.float64)), torch.from_numpy(labels)
    return float(functional.cross_entropy(z, y)), float((z.argmax(-1) == y).double().mean())


def teacher(logits, mixture):
    return sum(w / mixture.temperatures.get(name, 1) * logits[name] for name, w in mixture.weights.items())


# ---- figures


@pytest.mark.parametrize("head", ["verb", "noun"])
def test_what_needs_no_fit_is_scored_on_the_complete_held_out_views(reader, report, head):
    rows, logits, labels, complete = held_out_views(reader, head)
    assert 40 < len(rows) == report.clips < 100
    assert report.views[head] == complete.sum()
    assert report.left_out[head] == (~complete).sum() > 0
    own = np.broadcast_to(labels[:, None], complete.shape)[complete]
    for name, mixed in {
        "uniform": sum(logits.values()) / 3,
        **{f"{name} alone": value for name, value in logits.items()},
    }.items():
        row = report.rows[head][name]
        assert (row.metrics.nll, row.metrics.top1) == pytest.approx(torch_figures(mixed[complete], own), rel=1e-5)
        assert row.how == "not fitted"
        assert row.metrics.count == complete.sum()


@pytest.mark.parametrize("scheme", ["softmin", "calibrated"])
def test_what_is_fitted_is_scored_on_the_other_half(reader, report, scheme):
    _, logits, labels, complete = held_out_views(reader, "verb")
    table = reader.split("train")
    fold = read_head(reader, table, "verb", chosen_clips(reader, table, "train")).fold
    assert abs((fold == 0).sum() - (fold == 1).sum()) <= 1
    total, right = 0.0, 0.0
    for half in (0, 1):
        fitted, scored = (fold == 1 - half)[:, None] & complete, (fold == half)[:, None] & complete
        own = np.broadcast_to(labels[:, None], complete.shape)
        if scheme == "calibrated":
            mixture = fit_calibrated({name: z[fitted] for name, z in logits.items()}, own[fitted])
        else:
            errors = []
            for z in logits.values():  # each expert over the views that it has
                there = (fold == 1 - half)[:, None] & np.isfinite(z).all(-1) & (labels >= 0)[:, None]
                errors.append(torch_figures(z[there], own[there])[0])
            weights = torch.softmax(-torch.tensor(errors, dtype=torch.float64) / 0.5, 0).tolist()
            mixture = Mixture(dict(zip(EXPERTS, weights, strict=True)))
        nll, top1 = torch_figures(teacher(logits, mixture)[scored], own[scored])
        total, right = total + nll * scored.sum(), right + top1 * scored.sum()
    row = report.rows["verb"][scheme]
    assert row.how == "cross-fitted"
    assert row.metrics.nll == pytest.approx(total / complete.sum(), rel=1e-4)
    assert row.metrics.top1 == pytest.approx(right / complete.sum())
    same_clips = torch_figures(
        teacher(logits, row.mixture)[complete], np.broadcast_to(labels[:, None], complete.shape)[complete]
    )
    assert row.metrics.nll != pytest.approx(same_clips[0], rel=1e-4)


def test_the_weights_that_are_kept_are_fitted_on_all_clips(reader, report):
    _, logits, labels, complete = held_out_views(reader, "noun")
    own = np.broadcast_to(labels[:, None], complete.shape)[complete]
    expected = fit_calibrated({name: z[complete] for name, z in logits.items()}, own)
    found = report.rows["noun"]["calibrated"].mixture
    assert found.weights == pytest.approx(expected.weights, rel=1e-4)
    assert found.temperatures == pytest.approx(expected.temperatures, rel=1e-4)
    heldout, _ = choose_mixtures(reader, "heldout", weights_temperature=0.5, train_split="train")
    for head in ("verb", "noun"):
        assert report.rows[head]["softmin"].mixture.weights == pytest.approx(heldout[head].weights)


def test_calibration_is_better_than_weights_alone_where_the_scales_of_the_experts_mislead(report):
    for rows in report.rows.values():
        assert rows["calibrated"].metrics.nll < rows["softmin"].metrics.nll - 0.05
        assert rows["calibrated"].metrics.nll < rows["uniform"].metrics.nll - 0.05


def test_weights_per_sample_are_an_oracle_and_say_so(report):
    for rows in report.rows.values():
        assert rows["per-sample"].how == "oracle"
        assert rows["per-sample"].kl_bound is None
        assert rows["per-sample"].metrics.nll < rows["uniform"].metrics.nll
        assert all(rows[name].kl_bound > 0 for name in ("uniform", "softmin", "calibrated"))
    assert "oracle: uses the label" in next(line for line in report_lines(report) if "per-sample" in line)


def test_the_storage_error_is_bounded_over_every_view_of_the_split(reader, report):
    whole = np.isfinite(reader.logits("train", "flow")["verb"]).all(-1)
    assert report.bound_views == {"verb": whole.sum(), "noun": whole.sum()}
    colder = weigh_experts(reader, train_split="train", weights_temperature=0.5, temperature=0.25)
    assert colder.rows["verb"]["uniform"].kl_bound > 4 * report.rows["verb"]["uniform"].kl_bound


def test_the_table_says_what_it_is_of(report):
    lines = report_lines(report)
    assert lines[0].startswith(f"fitted and scored on the held-out part of train: {report.clips} clips;")
    assert "left out (no label, or an expert is missing)" in lines[1]
    shown = "\n".join(lines)
    for name in (*SCHEMES, *(f"{expert} alone" for expert in EXPERTS)):
        assert shown.count(f"\n  {name} ") == 2, "one row for each head"
    assert shown.count("[cross-fitted]") == 4
    assert "these are few views" in shown
    assert json.loads(json.dumps(report.to_json()))["heads"]["verb"]["softmin"]["how"] == "cross-fitted"


# ---- which clips


def test_another_split_is_used_whole_and_is_no_test_any_more(reader):
    report = weigh_experts(reader, split="test", train_split="train")
    assert (report.split, report.held_out, report.clips) == ("test", False, 40)
    assert any("figures of runs on test are no test" in line for line in report_lines(report))
    assert weigh_experts(reader, split="train", train_split="train").held_out
    with pytest.raises(InputError, match="no split 'tset'"):
        weigh_experts(reader, split="tset", train_split="train")


def test_without_a_held_out_part_another_split_is_asked_for(tmp_path):
    write_cache(tmp_path, MANIFEST, make_logits(), shard_rows=128)
    opened = CacheReader(tmp_path)
    with pytest.raises(InputError, match=r"no held-out part of split 'train'.*--split .*has train, test"):
        weigh_experts(opened, train_split="train")
    assert weigh_experts(opened, split="test", train_split="train").clips == 40
    tiny_part = tmp_path / "tiny"
    write_cache(tiny_part, MANIFEST, make_logits(), held_out=HeldOut(1e-9, 0), shard_rows=128)
    with pytest.raises(InputError, match="no clip of split 'train' happens to be held out"):
        weigh_experts(CacheReader(tiny_part), train_split="train")


def test_clips_without_label_or_expert_are_refused(tmp_path):
    logits = make_logits()
    for head in HEADS:
        logits["test"]["boxes"][head.name][:] = np.nan
    write_cache(tmp_path, MANIFEST, logits, shard_rows=128)
    with pytest.raises(InputError, match="head 'verb': none of 40 clips of split 'test' has a label and"):
        weigh_experts(CacheReader(tmp_path), split="test", train_split="train")


def test_one_clip_is_scored_on_itself_and_says_so(reader, monkeypatch):
    labelled = np.flatnonzero(reader.split("train").labels["noun"] >= 0)
    row = next(row for row in labelled if row % 7)
    monkeypatch.setattr(weigh_module, "chosen_clips", lambda *_: np.array([row]))
    report = weigh_experts(reader, train_split="train")
    assert {rows["calibrated"].how for rows in report.rows.values()} == {"same clips"}
    assert report_lines(report)[-1] == "note: too few clips to fit on one half and score on the other"


# ---- training with them


def targets_of(reader, mixtures, directory, missing="renormalise"):
    rows = np.arange(ROWS["train"])
    return shared_targets(reader, "train", mixtures, missing=missing, rows=rows, directory=directory)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_targets_of_every_scheme_are_its_mixture(reader, report, tmp_path, scheme):
    path = tmp_path / "w.json"
    path.write_bytes(mixture_file_for(reader, report.mixtures, report.to_json()).to_bytes())
    mixtures, warning = choose_mixtures(reader, f"{path}:{scheme}", weights_temperature=9, train_split="train")
    assert (mixtures, warning) == (report.mixtures[scheme], None)
    source = targets_of(reader, mixtures, tmp_path / "copies", missing="drop")
    rows, views = np.array([1, 2, 3, 9, 11, 7]), np.array([0, 1, 1, 0, 1, 1])
    assert source.valid(rows, views).tolist() == [True] * 5 + [False]
    for head in ("verb", "noun"):
        logits = {name: reader.logits("train", name)[head] for name in EXPERTS}
        if scheme == "per-sample":
            usable = {name: reader.usable("train", name) for name in EXPERTS}
            labels = reader.split("train").labels[head]
            weights = sample_weights(logits, usable, labels, mixture=mixtures[head])
            expected = sum(weights[name][..., None] * logits[name] for name in EXPERTS)
            # Row 11 has no noun: its experts weigh the same.
            if head == "noun":
                np.testing.assert_allclose(expected[11], sum(z[11] for z in logits.values()) / 3, rtol=1e-5)
        else:
            expected = teacher(logits, mixtures[head])
        np.testing.assert_allclose(
            source.targets(rows, views)[head][:5], expected[rows, views][:5], rtol=1e-4, atol=1e-5
        )


def test_weights_per_sample_are_for_training_targets_alone(reader):
    mixtures, _ = choose_mixtures(reader, "per-sample", weights_temperature=1, train_split="train")
    with pytest.raises(InputError, match=r"made from the true labels.*cannot be evaluated on split 'test'"):
        mix_split(reader, "test", mixtures, "renormalise")


# ---- the commands


def test_the_command_prints_the_table_and_writes_the_weights(root, reader, tmp_path):
    path = tmp_path / "w.json"
    shown = call_ok("mmkd-cache", "weigh", root, "-o", path, "--weights-temperature", 0.5)
    assert "held-out part of train" in shown
    assert "calibrated" in shown
    printed = json.loads(call_ok("mmkd-cache", "weigh", root, "--split", "test", "--temperature", 2, "--json"))
    assert (printed["split"], printed["temperature"]) == ("test", 2)
    mixtures, _ = choose_mixtures(reader, str(path), weights_temperature=1, train_split="train")
    assert mixtures["verb"].temperatures
    assert "no split 'other'" in refused("mmkd-cache", "weigh", root, "--split", "other")
    assert "is not in the range" in refused("mmkd-cache", "weigh", root, "--temperature", 0)


def test_a_student_learns_from_fitted_weights_and_the_run_is_bound_to_their_values(tiny, tmp_path):
    path, run = tmp_path / "w.json", tmp_path / "run"
    call_ok("mmkd-cache", "weigh", tiny.root / "cache", "-o", path)
    train = ["mmkd-student", "train", *tiny.stage_two, *SHORT[:-2], "-o", run, "--node-copies", tmp_path / "copies"]
    call_ok(*train, "--weights", path)
    stored = json.loads(path.read_bytes())["schemes"]["calibrated"]
    assert json.loads((run / "run.json").read_bytes())["weights"] == stored
    metrics = json.loads((run / "evaluation.json").read_bytes())["metrics"]
    assert "teacher_kl" in metrics["standard"]["action"]
    path.rename(tmp_path / "moved.json")  # content counts, not the path
    call_ok(*train, "--weights", tmp_path / "moved.json")
    message = refused(*train, "--weights", f"{tmp_path / 'moved.json'}:uniform", code=5)
    assert "weights" in message
    assert "cannot read" in refused(*train, "--weights", path)


def test_a_student_learns_from_weights_per_sample_and_is_evaluated_without_such_a_teacher(tiny, tmp_path):
    run = tmp_path / "run"
    options = ["-o", run, "--node-copies", tmp_path / "copies", "--weights", "per-sample"]
    call_ok("mmkd-student", "train", *tiny.stage_two, *SHORT[:-2], *options)
    metrics = json.loads((run / "evaluation.json").read_bytes())["metrics"]
    assert "teacher_kl" not in metrics["standard"]["action"]
    manifest = ["--manifest", tiny.root / "manifest.jsonl"]
    compare = ["mmkd-student", "compare", "--cache", tiny.root / "cache", *manifest]
    assert "| teacher" in call_ok(*compare, "--run", f"student={run}")
    assert "cannot be evaluated" in refused(*compare, "--weights", "per-sample")
