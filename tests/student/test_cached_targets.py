"""From a cache to soft targets and to the comparison table: on a cache whose logits the test chose."""

import json
from dataclasses import replace

import numpy as np
import pytest

from mmkd.cache_tools.cache.reader import CacheReader
from mmkd.cache_tools.layout import GROUP
from mmkd.cache_tools.views.held_out import HeldOut
from mmkd.data_manifests.errors import InputError, VerificationError
from mmkd.data_manifests.manifest import Head
from mmkd.student.evaluation.table import Table, compare_runs, load_table, merge_tables
from mmkd.student.evaluation.table_text import cell, render
from mmkd.student.teacher.cached_teacher import choose_mixtures, mix_split
from mmkd.student.teacher.mixing import Mixture
from tests.helpers.random_logits import draw_logits, draw_manifest
from tests.helpers.small_cache import write_cache

EXPERTS = ("rgb", "flow")
HEADS = (Head("verb", ("a", "b", "c")), Head("noun", tuple("defghi")))
ROWS = {"train": 10, "test": 6}


MANIFEST = draw_manifest(HEADS, ROWS)


def make_logits():
    return draw_logits(MANIFEST, dict.fromkeys(EXPERTS, 1.0), {"train": 3, "test": 1})


@pytest.fixture(scope="module")
def logits():
    """Flow has nothing for row 4 of train and for view 1 of row 5."""
    values = make_logits()
    for head in HEADS:
        values["train"]["flow"][head.name][4] = np.nan
        values["train"]["flow"][head.name][5, 1] = np.nan
    return values


@pytest.fixture(scope="module")
def root(tmp_path_factory, logits):
    directory = tmp_path_factory.mktemp("small") / "cache"
    write_cache(directory, MANIFEST, logits, held_out=HeldOut(0.5, 0))
    return directory


@pytest.fixture(scope="module")
def reader(root):
    return CacheReader(root)


def test_a_cache_reads_back_what_was_put_in(reader, logits):
    assert (reader.dataset, reader.heads, reader.experts) == ("demo", HEADS, EXPERTS)
    for split, experts in logits.items():
        table = reader.split(split)
        assert table.clip_ids == tuple(f"{split}-{row}" for row in range(ROWS[split]))
        expected = [-1 if (label := clip.labels["noun"]) is None else label for clip in MANIFEST.split(split)]
        assert table.labels["noun"].tolist() == expected
        for expert, heads in experts.items():
            for head, value in heads.items():
                np.testing.assert_allclose(reader.logits(split, expert)[head], value, atol=3e-3)
    usable = np.ones((10, 3), np.bool_)
    usable[4] = usable[5, 1] = False
    np.testing.assert_array_equal(reader.usable("train", "flow"), usable)
    assert reader.usable("train", "rgb").all()
    assert {name: [item.row for item in items] for name, items in reader.unusable("train").items()} == {
        "rgb": [],
        "flow": [4, 5],
    }


def test_uniform_and_given_weights(reader):
    even = {"rgb": 0.5, "flow": 0.5}
    assert choose_mixtures(reader, "uniform", weights_temperature=1, train_split="train") == (
        {"verb": Mixture(even), "noun": Mixture(even)},
        None,
    )
    uneven = {"rgb": 0.25, "flow": 0.75}
    chosen, _ = choose_mixtures(reader, "rgb=1,flow=3", weights_temperature=1, train_split="train")
    assert chosen == {"verb": Mixture(uneven), "noun": Mixture(uneven)}
    with pytest.raises(InputError, match="experts: rgb, flow"):
        choose_mixtures(reader, "boxes=1", weights_temperature=1, train_split="train")


def test_held_out_weights_are_the_softmin_of_errors_on_held_out_clips_alone(reader, logits):
    rows = (1, 4, 7, 8)  # those of HeldOut(0.5, 0): one has no noun, one no flow
    chosen, warning = choose_mixtures(reader, "heldout", weights_temperature=0.5, train_split="train")
    assert warning is None
    for head in ("verb", "noun"):
        errors = []
        for expert in EXPERTS:
            losses = []
            for row in rows:
                label = MANIFEST.split("train")[row].labels[head]
                for z in logits["train"][expert][head][row].astype(np.float64):
                    if label is not None and np.isfinite(z).all():
                        losses.append(np.log(np.exp(z).sum()) - z[label])
            errors.append(np.mean(losses))
        expected = np.exp(-np.array(errors) / 0.5)
        found = [chosen[head].weights[expert] for expert in EXPERTS]
        assert found == pytest.approx(expected / expected.sum(), abs=5e-3)  # logits are stored in fp16
    assert chosen["verb"] != chosen["noun"]


def test_without_a_held_out_part_weights_are_uniform_with_a_warning(tmp_path):
    write_cache(tmp_path, MANIFEST, make_logits())
    chosen, warning = choose_mixtures(CacheReader(tmp_path), "heldout", weights_temperature=1, train_split="train")
    assert chosen["verb"] == Mixture({"rgb": 0.5, "flow": 0.5})
    assert "uniform" in warning


def test_the_teacher_of_a_split_is_the_mixture_of_its_experts(reader, logits):
    mixtures = {"verb": Mixture({"rgb": 0.25, "flow": 0.75}), "noun": Mixture({"rgb": 0.5, "flow": 0.5})}
    teacher = mix_split(reader, "train", mixtures, "renormalise")
    assert teacher.valid.all()
    for head, mixture in mixtures.items():
        expected = sum(weight * logits["train"][expert][head] for expert, weight in mixture.weights.items())
        expected[4], expected[5, 1] = logits["train"]["rgb"][head][4], logits["train"]["rgb"][head][5, 1]
        np.testing.assert_allclose(teacher.logits[head], expected, atol=3e-3)
    dropped = mix_split(reader, "train", mixtures, "drop")
    np.testing.assert_array_equal(dropped.valid, reader.usable("train", "flow"))


@pytest.mark.parametrize("lacking", ["verb", "noun"])
def test_a_view_is_valid_when_every_head_has_a_teacher_and_nan_elsewhere(reader, lacking):
    mixtures = dict.fromkeys(("verb", "noun"), Mixture({"rgb": 1.0})) | {lacking: Mixture({"flow": 1.0})}
    teacher = mix_split(reader, "train", mixtures, "renormalise")
    np.testing.assert_array_equal(teacher.valid, reader.usable("train", "flow"))
    for value in teacher.logits.values():
        np.testing.assert_array_equal(np.isfinite(value).all(-1), teacher.valid)


def test_a_split_without_any_teacher_is_refused(tmp_path):
    values = make_logits()
    for head in HEADS:
        values["test"]["rgb"][head.name][:] = np.nan
    write_cache(tmp_path, MANIFEST, values)
    with pytest.raises(InputError, match=r"no usable teacher logits for split 'test'; see `mmkd-cache inspect`"):
        mix_split(CacheReader(tmp_path), "test", {"verb": Mixture({"rgb": 1.0})}, "renormalise")


# ---- the comparison table


def write_evaluation(directory, value):
    directory.mkdir(exist_ok=True)
    (directory / "evaluation.json").write_text(value if isinstance(value, str) else json.dumps(value))
    return directory


def compared(reader, runs):
    even = {"rgb": 0.5, "flow": 0.5}
    return compare_runs(
        reader,
        MANIFEST,
        runs,
        mixtures={"verb": Mixture(even), "noun": Mixture(even)},
        missing="renormalise",
        train_split="train",
    )


def test_the_table_has_experts_and_teacher_from_the_cache_and_runs_from_their_files(reader, logits, tmp_path):
    metrics = {
        part: {head.name: {"top1": 0.5, "top5": 0.75, "ece": 0.1} for head in HEADS}
        for part in ("test", "test/unseen")
    }
    run = write_evaluation(tmp_path / "run", {"cache": reader.fingerprint, "metrics": metrics})
    table = compared(reader, {"student": run})
    assert list(table.rows) == ["rgb expert", "flow expert", "teacher", "student"]
    labels = np.array([clip.labels["verb"] for clip in MANIFEST.split("test")])
    members = {"test": np.ones(6, np.bool_), "test/unseen": np.arange(6) % 2 == 1}
    mean = (logits["test"]["rgb"]["verb"] + logits["test"]["flow"]["verb"]) / 2
    for name, value in {"rgb expert": logits["test"]["rgb"]["verb"], "teacher": mean}.items():
        for part, rows in members.items():
            right = value[:, 0].argmax(-1) == labels
            assert table.rows[name][0][part]["verb"]["top1"] == pytest.approx(right[rows].mean())
    assert table.rows["student"] == [metrics]
    lines = render(table).splitlines()
    assert lines[0].split("|")[1].strip() == "model"
    assert "test/unseen noun ECE" in lines[0]
    assert lines[6:] == ["", "test: each clip by the mean logits of 1 view (1 position in time, 1 crop)"]
    assert len({line.count("|") for line in lines[:6]}) == 1
    assert [text.strip() for text in lines[5].split("|")[1:6]] == ["student", "-", "50.0", "75.0", "10.0"]


@pytest.mark.parametrize("name", ["teacher", "rgb expert"])
def test_a_run_cannot_take_the_name_of_another_row(reader, tmp_path, name):
    with pytest.raises(InputError, match=f"may not be named '{name}'"):
        compared(reader, {name: tmp_path})


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"cache": "other", "metrics": {}}, "was evaluated with another cache"),
        ({"metrics": {}}, "is damaged"),
        ([], "is damaged"),
        ("{", "is damaged"),
    ],
)
def test_a_run_of_another_cache_or_damaged_is_refused(reader, tmp_path, value, reason):
    with pytest.raises(InputError, match=reason):
        compared(reader, {"student": write_evaluation(tmp_path / "run", value)})


def test_a_run_that_was_not_evaluated_is_refused(reader, tmp_path):
    with pytest.raises(InputError, match=r"evaluation\.json is missing; run `mmkd-student evaluate"):
        compared(reader, {"student": tmp_path})


def test_another_manifest_is_refused(reader):
    even = {"verb": Mixture({"rgb": 1.0}), "noun": Mixture({"rgb": 1.0})}
    other = replace(MANIFEST, clips=(replace(MANIFEST.clips[0], split="test"), *MANIFEST.clips[1:]))
    with pytest.raises(InputError, match="the cache's split 'test' lacks clip 'train-0'"):
        compare_runs(reader, other, {}, mixtures=even, missing="drop", train_split="train")


def one_table(*values, part="test"):
    return Table({"teacher": [{part: {"action": {"top1": v, "top5": 1.0, "ece": 0.0}}} for v in values]})


def test_tables_of_several_seeds_give_mean_and_sample_deviation(tmp_path):
    assert cell([0.123]) == "12.3"
    # Sample standard deviation of 0.5, 0.6, 0.7: 0.1.
    assert cell([0.5, 0.6, 0.7]) == "60.0 ± 10.0"
    merged = merge_tables([one_table(0.5), one_table(0.6), one_table(0.7)])
    assert "60.0 ± 10.0" in render(merged)
    assert "test top-1" in render(merged), "with one head its name is left out"
    path = tmp_path / "table.json"
    path.write_text(json.dumps(merged.to_json()))
    assert load_table(path) == merged


def test_tables_that_do_not_fit_are_not_merged():
    with pytest.raises(InputError, match="other models"):
        merge_tables([one_table(0.5), Table({"student": one_table(0.5).rows["teacher"]})])
    with pytest.raises(InputError, match="other splits"):
        merge_tables([one_table(0.5), one_table(0.5, part="other")])


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"schema": "mmkd-table-2", "rows": {}}', '{"schema": "mmkd-table-1"}']
)
def test_what_is_no_table_is_refused(tmp_path, text):
    (tmp_path / "table.json").write_text(text)
    with pytest.raises(InputError, match=r"table\.json"):
        load_table(tmp_path / "table.json")


# ---- what the reader refuses


def test_a_cache_of_which_an_object_is_missing_or_torn_is_refused(tmp_path):
    write_cache(tmp_path, MANIFEST, make_logits())
    victim = tmp_path / GROUP / "train/flow/logits/noun/c/1/2/0"
    data = victim.read_bytes()
    for damage in (None, b"", data[:-1], bytes([data[0] ^ 4]) + data[1:]):
        victim.unlink()
        if damage is not None:
            victim.write_bytes(damage)
        with pytest.raises(VerificationError, match=r"noun/c/1/2/0 is (missing|damaged).*mmkd-cache verify"):
            CacheReader(tmp_path).logits("train", "flow")
        victim.write_bytes(data)
    CacheReader(tmp_path).logits("train", "flow")


def test_a_cache_of_which_the_index_is_missing_or_changed_is_refused(tmp_path):
    write_cache(tmp_path, MANIFEST, make_logits())
    victim = tmp_path / "index.jsonl"
    data = victim.read_bytes()
    for damage in (None, b"", data.replace(b"rgb", b"gbr", 1)):
        victim.unlink()
        if damage is not None:
            victim.write_bytes(damage)
        with pytest.raises(VerificationError, match=r"index\.jsonl is (missing|damaged)"):
            CacheReader(tmp_path)
        victim.write_bytes(data)
    for name, error, code in (
        ("root.json", InputError, "not finished"),
        ("init.json", VerificationError, "init.json is missing"),
    ):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).unlink()
        with pytest.raises(error, match=code):
            CacheReader(tmp_path)
        (tmp_path / name).write_bytes(content.replace(b"a", b"b", 1))
        with pytest.raises(VerificationError, match="damaged"):
            CacheReader(tmp_path)
        (tmp_path / name).write_bytes(content)
    CacheReader(tmp_path)
