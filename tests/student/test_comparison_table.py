"""The comparison table: over which clips each row is, which all have in common, and how it fits a terminal."""

import json
import re

import numpy as np
import pytest

from mmkd.cache_tools.cache.reader import CacheReader
from mmkd.data_manifests.errors import InputError
from mmkd.student.evaluation.evaluate import score_split
from mmkd.student.evaluation.evaluation_file import clips_path, read_evaluation, read_scores, write_evaluation
from mmkd.student.evaluation.metrics import evaluate
from mmkd.student.evaluation.run_files import RunRecord, write_run
from mmkd.student.evaluation.table import Table, compare_runs, load_table, mixtures_of_runs
from mmkd.student.evaluation.table_text import render
from mmkd.student.teacher.mixing import Mixture
from tests.helpers.small_cache import write_cache
from tests.helpers.verbs_and_nouns import HEADS, make_manifest

ROWS = 12
LACKING = {"flow": (2, 5), "boxes": (5, 7, 8)}
"""Expert -> rows of the test split for which it has no logits."""


def make_logits():
    draw = np.random.default_rng(4)
    sizes = {head.name: len(head.classes) for head in HEADS}
    logits = {
        split: {
            expert: {head: draw.normal(size=(ROWS, 1, size)).astype(np.float32) for head, size in sizes.items()}
            for expert in ("rgb", "flow", "boxes")
        }
        for split in ("train", "test")
    }
    for expert, rows in LACKING.items():
        for value in logits["test"][expert].values():
            value[list(rows)] = np.nan
    return logits


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    root = tmp_path_factory.mktemp("table") / "cache"
    write_cache(root, make_manifest(ROWS), make_logits())
    return CacheReader(root)


@pytest.fixture
def student(reader, tmp_path):
    """A run that was evaluated on all test clips but one; and its logits."""
    draw = np.random.default_rng(5)
    logits = {head.name: draw.normal(size=(ROWS, 1, len(head.classes))).astype(np.float32) for head in HEADS}
    scores = score_split(reader.split("test"), logits, np.arange(ROWS) != 0)
    run = tmp_path / "student"
    write_evaluation(
        run / "evaluation.json", reader.fingerprint, scores.metrics(make_manifest(ROWS).clips), [scores]
    )
    return run, logits


def compared(reader, runs, **options):
    mixtures = dict.fromkeys(("verb", "noun"), Mixture({"rgb": 1 / 3, "flow": 1 / 3, "boxes": 1 / 3}))
    return compare_runs(reader, make_manifest(ROWS), runs, mixtures=mixtures, missing="drop", **options)


def counts(table, part, head):
    return {name: seeds[0][part][head]["count"] for name, seeds in table.rows.items()}


def test_every_row_says_its_clips_and_what_differs_is_said(reader, student):
    table = compared(reader, {"student": student[0]})
    expected = {"rgb expert": 12, "flow expert": 10, "boxes expert": 9, "teacher": 8, "student": 11}
    assert counts(table, "test", "verb") == expected
    assert counts(table, "test", "noun") == {name: count - 1 for name, count in expected.items()}, "one has no noun"
    text = render(table)
    assert re.search(r"\| boxes expert \| 9 of 12 ", text)
    assert re.search(r"\| rgb expert +\| 12 +\|", text)
    assert (
        "test: rows are over different clips (12: rgb expert; 10: flow expert; 9: boxes expert; 8: teacher" in text
    )
    assert "--common compares" in text


def test_rows_over_as_many_but_other_clips_are_told_apart():
    def seeds(clips):
        return [
            {"test": {"verb": {"count": 9, "left_out": 1, "top1": 0.5, "top5": 1.0, "ece": 0.1, "clips": clips}}}
        ]

    assert "different clips (9: a; 9: b)" in render(Table({"a": seeds("one"), "b": seeds("two")}))
    assert "different" not in render(Table({"a": seeds("one"), "b": seeds("one")}))


def test_the_common_clips_are_those_of_every_row_and_their_metrics_those_of_the_logits_alone(reader, student):
    run, logits = student
    table = compared(reader, {"student": run}, common=True)
    rows = [row for row in range(ROWS) if row not in (0, 2, 5, 7, 8)]
    clips = make_manifest(ROWS).split("test")
    for part, own in {"test": rows, "test/unseen": [row for row in rows if row % 2]}.items():
        labels = np.array([clips[row].labels["verb"] for row in own])
        for name, value in {"student": logits, "rgb expert": reader.logits("test", "rgb")}.items():
            expected = evaluate(value["verb"][own, 0], labels)
            found = table.rows[name][0][part]["verb"]
            assert (found["count"], found["top1"], found["top5"]) == (len(own), expected.top1, expected.top5)
            assert (found["ece"], found["nll"]) == pytest.approx((expected.ece, expected.nll), rel=1e-12)
    assert set(counts(table, "test", "verb").values()) == {7}
    assert "different" not in render(table)


def test_a_run_of_an_earlier_version_stands_in_the_table_and_has_no_common_clips(reader, tmp_path):
    stored = {
        "test": {head.name: {"count": 12, "left_out": 0, "top1": 0.5, "top5": 1.0, "ece": 0.1} for head in HEADS}
    }
    (tmp_path / "evaluation.json").write_text(json.dumps({"cache": reader.fingerprint, "metrics": stored}))
    table = compared(reader, {"old": tmp_path})
    assert table.rows["old"] == [stored]
    undefined = json.dumps({"cache": reader.fingerprint, "metrics": stored}).replace("0.1", "NaN")
    (tmp_path / "evaluation.json").write_text(undefined)  # as earlier versions wrote it without a labelled clip
    assert re.search(r"\| old +\| 12 +\| 50.0 +\| 100.0 +\| - +\|", render(compared(reader, {"old": tmp_path})))
    assert re.search(r"\| old +\| 12 +\| 50.0 ", render(table))
    with pytest.raises(InputError, match="which the evaluation of 'old' lacks; run `mmkd-student evaluate`"):
        compared(reader, {"old": tmp_path}, common=True)


def test_no_bit_of_an_evaluation_changes_without_being_noticed(reader, student):
    path = student[0] / "evaluation.json"
    for victim in (path, clips_path(path)):
        data = victim.read_bytes()
        for place in np.linspace(0, len(data) - 1, 60).astype(int).tolist():
            victim.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
            with pytest.raises(InputError, match=f"{victim.name} is damaged.*run EVALUATE again"):
                read_scores(path, read_evaluation(path, "EVALUATE"), "EVALUATE")
        victim.write_bytes(data)
    again = read_scores(path, read_evaluation(path, "EVALUATE"), "EVALUATE")["test"]
    stored = read_evaluation(path, "EVALUATE").metrics
    assert again.metrics(make_manifest(ROWS).split("test")) == stored


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top1": "high"}, r"verb\.top1.*should be"),
        ({"count": None}, r"verb\.count"),
        ({"top5": NotImplemented}, r"verb\.top5.*missing|verb\.top5.*required"),
    ],
)
def test_metrics_that_a_table_cannot_show_are_refused_by_name(reader, tmp_path, change, message):
    metrics = {"count": 12, "left_out": 0, "top1": 0.5, "top5": 1.0, "ece": float("nan")} | change
    parts = {"test": {"verb": {key: value for key, value in metrics.items() if value is not NotImplemented}}}
    (tmp_path / "evaluation.json").write_text(json.dumps({"cache": reader.fingerprint, "metrics": parts}))
    with pytest.raises(InputError, match=rf"evaluation\.json is damaged.*{message}"):
        compared(reader, {"run": tmp_path})
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"schema": "mmkd-table-1", "rows": {"run": [parts]}}))
    with pytest.raises(InputError, match=rf"table\.json is damaged.*{message}"):
        load_table(path)


def test_an_expert_without_any_logits_is_a_row_of_no_clips(tmp_path):
    logits = make_logits()
    for value in logits["test"]["flow"].values():
        value[:] = np.nan
    write_cache(tmp_path / "cache", make_manifest(ROWS), logits)
    table = compared(CacheReader(tmp_path / "cache"), {})
    assert re.search(r"\| flow expert +\| 0 of 12 +\| - +\| - ", render(table))
    path = tmp_path / "table.json"
    path.write_text(json.dumps(table.to_json(), allow_nan=False))
    assert load_table(path) == table


def test_the_teacher_of_the_runs_is_one_that_the_cache_has(reader, tmp_path):
    for name, weights in {"far": {"audio": 1.0}, "near": {"rgb": 1.0}}.items():
        record = RunRecord({}, "", {}, labels_only=False, fresh_views=False, weights={"verb": weights}, versions={})
        write_run(tmp_path / name, record)
    far, near = tmp_path / "far", tmp_path / "near"
    assert mixtures_of_runs({"far": far, "near": near}, reader) == ({"verb": Mixture({"rgb": 1.0})}, None)
    assert mixtures_of_runs({"far": far}, reader) == (None, "the runs learned from audio, which this cache lacks")


def wide_table(heads, groups, seeds=1):
    draw = np.random.default_rng(0)
    models = ("rgb expert", "flow expert", "boxes expert", "teacher", "baseline, one view each", "student")
    parts = ("validation", *(f"validation/{group}" for group in groups))

    def metrics():
        numbers = {key: float(draw.random()) for key in ("top1", "top5", "ece")}
        return {"count": 9668, "left_out": 0, "clips": "same", **numbers}

    return Table(
        {
            name: [{part: {head: metrics() for head in heads} for part in parts} for _ in range(seeds)]
            for name in models
        }
    )


@pytest.mark.parametrize("width", [80, 100, 132, 200])
@pytest.mark.parametrize("seeds", [1, 3])
def test_a_table_of_many_heads_and_groups_stays_within_the_width_and_loses_nothing(width, seeds):
    groups = ("unseen_participants", "tail_verbs", "tail_nouns", "kitchens_seen", "many_shot")
    for heads in (("verb", "noun"), ("action",)):
        table = wide_table(heads, groups, seeds)
        text = render(table, width)
        assert max(map(len, text.splitlines())) <= width
        cells = r"\d+\.\d ± \d+\.\d" if seeds > 1 else r"(?<![\d.])\d+\.\d(?![\d.])"
        assert sorted(re.findall(cells, text)) == sorted(re.findall(cells, render(table)))
        assert text.count("9668") == len(table.rows) * len(table.parts()), "every row says its count in every block"
        blocks = [block for block in text.split("\n\n") if block.startswith("|")]
        assert all(len({line.count("|") for line in block.splitlines()}) == 1 for block in blocks)
    assert "**validation/tail_verbs" in render(wide_table(("verb", "noun"), groups), 80)


def test_a_table_that_fits_is_one_block():
    table = wide_table(("action",), ())
    assert render(table, 120) == render(table)
    assert "**" not in render(table)


def test_a_name_with_a_bar_stays_in_its_cell():
    table = wide_table(("action",), ())
    lines = render(Table({"a|b": next(iter(table.rows.values()))})).splitlines()
    assert lines[-1].startswith("| a\\|b ")
    assert {len(line) for line in lines[-3:]} == {len(lines[-1])}
