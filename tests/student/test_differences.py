"""Differences between a run and the baseline: who is right on which clips, and the interval by closed forms."""

import itertools
import json
import math
from dataclasses import replace
from statistics import NormalDist, stdev

import numpy as np
import pytest

from mmkd.cache_tools.cache.reader import CacheReader
from mmkd.data_manifests.errors import InputError
from mmkd.data_manifests.manifest_file import save_manifest
from mmkd.student.evaluation.differences import Pair, differences, paired_bootstrap
from mmkd.student.evaluation.evaluate import score_split
from mmkd.student.evaluation.evaluation_file import clips_path, write_evaluation
from mmkd.student.evaluation.run_files import RunRecord, write_run
from mmkd.student.evaluation.table import Table, load_table, merge_tables
from mmkd.student.evaluation.table_text import render
from tests.helpers.in_process import call, call_ok, refused
from tests.helpers.small_cache import write_cache
from tests.helpers.verbs_and_nouns import HEADS, make_manifest

ROWS = 40


@pytest.mark.parametrize(
    ("gained", "lost", "n"), [(300, 200, 2000), (90, 90, 1000), (40, 4, 500)], ids=["more", "equal", "rare"]
)
def test_the_interval_is_that_of_the_normal_approximation_of_two_paired_proportions(gained, lost, n):
    signs = np.repeat([1, -1, 0], [gained, lost, n - gained - lost])
    b, c = gained / n, lost / n
    error = math.sqrt((b + c - (b - c) ** 2) / n)  # of the difference of two paired proportions (McNemar, 1947)
    z = NormalDist().inv_cdf(0.975)
    low, high = paired_bootstrap(np.random.default_rng(1).permutation(signs))
    assert low == pytest.approx(b - c - z * error, abs=0.06 * error + 0.5 / n)
    assert high == pytest.approx(b - c + z * error, abs=0.06 * error + 0.5 / n)
    narrow = paired_bootstrap(signs, level=0.5)
    assert (narrow[1] - narrow[0]) / 2 == pytest.approx(
        NormalDist().inv_cdf(0.75) * error, abs=0.06 * error + 1 / n
    )


def test_of_few_clips_the_interval_is_that_of_all_resamples_one_by_one():
    signs = np.array([1, 1, -1, 0, 1])
    every = np.sort([np.mean(drawn) for drawn in itertools.product(signs, repeat=5)])
    for level in (0.95, 0.8, 0.5):
        expected = np.quantile(every, [(1 - level) / 2, (1 + level) / 2])
        np.testing.assert_allclose(paired_bootstrap(signs, level=level, resamples=200_000), expected, atol=1e-12)


def test_it_is_the_bootstrap_that_draws_the_clips_themselves():
    draw = np.random.default_rng(0)
    signs = draw.integers(-3, 4, 211)  # sums over three seeds
    naive = np.quantile(signs[draw.integers(0, 211, (20_000, 211))].mean(1), [0.025, 0.975])
    assert paired_bootstrap(signs) == pytest.approx(naive, abs=0.02)
    assert paired_bootstrap(signs) == paired_bootstrap(signs[::-1]), "the same clips, the same interval"
    assert paired_bootstrap(signs) != paired_bootstrap(signs, seed=1)


@pytest.mark.parametrize("value", [-1, 0, 1])
def test_clips_that_all_say_the_same_leave_no_doubt(value):
    assert paired_bootstrap(np.full(17, value)) == (value, value)
    assert paired_bootstrap(np.full(1, value)) == (value, value)


def pair(signs, clips="same", model="student", baseline="baseline"):
    signs = np.array(signs)
    packed = [np.packbits(own).tobytes().hex() for own in (signs > 0, signs < 0)]
    return Pair(model, baseline, "test", "verb", len(signs), clips, *packed)


def test_of_several_seeds_the_clips_are_drawn_and_the_seeds_averaged():
    seeds = [np.array([1, 0, -1, 1, 0, 0, 1, 1, 0]), np.array([0, 0, -1, 1, 1, 0, 1, 0, 0])]
    (found,) = differences(map(pair, seeds))
    assert found.top1 == pytest.approx(np.mean(seeds))
    assert found.spread == pytest.approx(stdev(own.mean() for own in seeds))
    assert [found.low, found.high] == [end / 2 for end in paired_bootstrap(seeds[0] + seeds[1])]
    alone = paired_bootstrap(np.concatenate(seeds))
    assert found.high - found.low != pytest.approx(alone[1] - alone[0]), "a clip's seeds are not further clips"
    (other,) = differences([pair(seeds[0]), pair(seeds[1], clips="others")])
    assert (other.low, other.high) == (None, None)
    assert other.top1 == found.top1


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A cache, its manifest, and two runs that could not see the same clips; with the verbs each run says."""
    root, draw = tmp_path_factory.mktemp("differences"), np.random.default_rng(5)
    manifest = make_manifest(ROWS)

    def logits():
        return {head.name: draw.normal(size=(ROWS, 1, len(head.classes))).astype(np.float32) for head in HEADS}

    write_cache(root / "cache", manifest, {split: {"rgb": logits()} for split in ("train", "test")})
    save_manifest(manifest, root / "manifest.jsonl")
    reader, said = CacheReader(root / "cache"), {}
    for name, lacking in {"baseline": 0, "student": 7}.items():
        own = logits()
        scores = score_split(reader.split("test"), own, np.arange(ROWS) != lacking)
        metrics = scores.metrics(manifest.split("test"))
        write_evaluation(root / name / "evaluation.json", reader.fingerprint, metrics, [scores])
        weights = None if name == "baseline" else {head.name: {"rgb": 1.0} for head in HEADS}
        record = RunRecord({}, "", {}, labels_only=not weights, fresh_views=False, weights=weights, versions={})
        write_run(root / name, record)
        said[name] = own["verb"][:, 0].argmax(1)
    return root, said


def compare(root, *more):
    runs = [text for name in ("student", "baseline") for text in ("--run", f"{name}={root / name}")]
    return (
        "mmkd-student",
        "compare",
        "--cache",
        root / "cache",
        "--manifest",
        root / "manifest.jsonl",
        *runs,
        *more,
    )


def test_compare_sets_each_run_beside_the_baseline_over_the_clips_that_both_have(world, tmp_path):
    root, said = world
    result = json.loads(call_ok(*compare(root, "--json", "--out", tmp_path / "table.json")))
    assert "pairs" not in result
    found = {(value["part"], value["head"]): value for value in result["differences"]}
    assert {value["model"] for value in result["differences"]} == {"student"}
    assert set(found) >= {("test", "verb"), ("test", "noun"), ("test", "action"), ("test/unseen", "verb")}
    clips = make_manifest(ROWS).split("test")
    for part, rows in {"test": range(ROWS), "test/unseen": range(1, ROWS, 2)}.items():
        rows = [row for row in rows if row not in (0, 7)]
        right = {name: [own[row] == clips[row].labels["verb"] for row in rows] for name, own in said.items()}
        signs = np.array(right["student"], int) - np.array(right["baseline"], int)
        assert 0 < abs(signs).sum() < len(rows)
        value = found[part, "verb"]
        assert value["counts"] == [len(rows)]
        assert value["top1"] == pytest.approx(signs.mean())
        assert (value["low"], value["high"]) == paired_bootstrap(signs)
        assert (value["resamples"], value["level"], value["seed"]) == (10_000, 0.95, 0)
    table = load_table(tmp_path / "table.json")
    assert table.to_json() == json.loads((tmp_path / "table.json").read_text())
    text = render(table, 80)
    assert "**student beside baseline**" in text
    value = found["test", "verb"]
    line = next(line for line in text.splitlines() if line.startswith("| test verb"))
    cells = [f"{100 * value['top1']:+.1f}", f"{100 * value['low']:+.1f} to {100 * value['high']:+.1f}"]
    assert [cell.strip() for cell in line.split("|")[2:5]] == ["38", *cells]
    assert "10,000 resamples" in text
    assert max(map(len, text.splitlines())) <= 80


def test_the_baseline_may_be_named_and_common_clips_count_alone(world):
    root, _ = world
    result = json.loads(call_ok(*compare(root, "--json", "--baseline", "teacher", "--common")))["differences"]
    assert {(value["model"], value["baseline"]) for value in result} == {
        ("student", "teacher"),
        ("baseline", "teacher"),
    }
    assert {tuple(value["counts"]) for value in result if value["part"] == "test" and value["head"] == "verb"} == {
        (38,)
    }
    assert "has rgb expert, teacher, student, baseline" in refused(*compare(root, "--baseline", "none"))
    assert (
        "--baseline is for the table of one seed"
        in call("mmkd-student", "compare", "--tables", "x", "--baseline", "y").err
    )


def test_a_run_without_single_clips_is_said_to_have_no_differences(world, tmp_path):
    root, _ = world
    run = root / "old"
    run.mkdir()
    write_run(run, RunRecord({}, "", {}, labels_only=False, fresh_views=False, weights=None, versions={}))
    stored = json.loads((root / "student" / "evaluation.json").read_text())
    (run / "evaluation.json").write_text(json.dumps({"cache": stored["cache"], "metrics": stored["metrics"]}))
    assert not clips_path(run / "evaluation.json").exists()
    shown = call(*compare(root, "--run", f"old={run}"))
    assert shown.code == 0
    assert "old: its evaluation does not keep single clips" in shown.err
    assert "old beside" not in shown.out
    assert "student beside baseline" in shown.out


def test_tables_of_seeds_are_merged_with_their_pairs(caplog):
    rows = {"student": [{}]}
    tables = [Table(rows, [pair([1, 0, -1, 1])]), Table(rows, [pair([1, 0, 0, 1])])]
    merged = merge_tables(tables)
    assert merged.pairs == [tables[0].pairs[0], tables[1].pairs[0]]
    assert "| +37.5 ± 17.7" in render(merged)
    with pytest.raises(InputError, match="other baselines: baseline, teacher"):
        merge_tables([tables[0], Table(rows, [pair([1], baseline="teacher")])])
    assert merge_tables([tables[0], Table(rows)]).pairs == []
    assert "not every table has are left out: student on test verb" in caplog.text


def test_a_table_of_before_opens_and_one_with_other_bits_is_refused(tmp_path):
    own, path = pair([1, 0, -1, 1]), tmp_path / "table.json"
    path.write_text(json.dumps({"schema": "mmkd-table-1", "rows": {"student": [{}]}}))
    assert load_table(path).pairs == []
    for broken in (replace(own, count=9), replace(own, gained="zz"), replace(own, lost="")):
        path.write_text(json.dumps(Table({"student": [{}]}).to_json() | {"pairs": [vars(broken)]}))
        with pytest.raises(InputError, match=r"table\.json is damaged"):
            load_table(path)
