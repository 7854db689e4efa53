"""What a run is trained and evaluated on: parts of a manifest, caches for evaluation alone or of fewer experts."""

import json
import shutil
from dataclasses import replace

import pytest

from mmkd.cache_tools.cache.reader import CacheReader
from mmkd.student.evaluation.run_files import read_run, write_run
from mmkd.student.evaluation.table_text import metric_lines
from tests.helpers.in_process import call, call_ok, refused

FAST = (
    "--set", "train.network=small3d", "--set", "train.epochs=1", "--set", "train.batch_size=4", "--set",
    "train.warmup_epochs=0", "--workers", 0,
)  # fmt: skip


class World:
    """The small data set with a manifest of one's own."""

    def __init__(self, quick, root):
        self.quick, self.root = quick, root
        self.header, *self.clips = (quick.root / "manifest.jsonl").read_text().splitlines()

    def ids(self, split):
        return [json.loads(line)["clip_id"] for line in self.clips if json.loads(line)["split"] == split]

    def manifest(self, name, lines):
        path = self.root / f"{name}.jsonl"
        path.write_text("\n".join((self.header, *lines)) + "\n")
        return path

    def data(self, manifest=None):
        manifest = manifest or self.quick.root / "manifest.jsonl"
        return ["--manifest", manifest, "--videos", self.quick.root / "videos", "--facts", self.root / "facts"]

    def train(self, out, *more, manifest=None):
        options = (*FAST, *self.data(manifest), "--cache", self.quick.cache, "--node-copies", self.root / "copies")
        return call("mmkd-student", "train", *options, "-o", out, *more)


@pytest.fixture(scope="module")
def world(quick, tmp_path_factory):
    return World(quick, tmp_path_factory.mktemp("sets"))


@pytest.fixture(scope="module")
def runs(world):
    """A student and a baseline of the whole manifest."""
    for name, options in {"student": (), "baseline": ("--labels-only",)}.items():
        done = world.train(world.root / name, *options)
        assert done.code == 0, done.err
    return {name: world.root / name for name in ("student", "baseline")}


@pytest.fixture(scope="module")
def evaluation_only(world):
    """A manifest of evaluation clips alone, and the cache of one expert for it."""
    lines = [line for line in world.clips if '"split": "standard"' in line]
    manifest, cache = world.manifest("new", lines), world.root / "new-cache"
    built = world.quick.build(cache, "--manifest", manifest, "--facts", world.root / "facts", experts=("rgb",))
    assert built.code == 0, built.err
    assert "standard without the training split 'train': a cache for evaluation alone" in built.err
    return manifest, cache


def test_half_of_the_clips_in_any_order_train_on_the_same_cache_and_are_another_run(world, runs):
    train = [line for line in world.clips if '"split": "train"' in line][::2]
    rest = [line for line in world.clips if '"split": "standard"' in line]
    part = world.manifest("part", (*train, *rest[:5]))
    turned = world.manifest("turned", (*reversed(rest[:5]), *reversed(train)))
    first = world.train(world.root / "part", manifest=part)
    assert first.code == 0, first.err
    assert "training on 7 of the cache's 14 training clips" in first.err
    assert "(5 clips)" in first.out
    assert world.train(world.root / "turned", manifest=turned).code == 0
    models = [(world.root / name / "model.safetensors").read_bytes() for name in ("part", "turned", "student")]
    assert models[0] == models[1] != models[2]
    other = world.train(world.root / "part")
    assert other.code == 5
    assert "clips.count: checkpoint 7, now 14" in other.err
    again = call("mmkd-student", "evaluate", runs["student"], "--cache", world.quick.cache, *world.data(part))
    assert "(5 clips)" in again.out
    whole = call("mmkd-student", "evaluate", runs["student"], "--cache", world.quick.cache, *world.data())
    assert "(14 clips)" in whole.out


def test_what_is_not_a_part_of_the_cache_is_refused_with_the_names_of_the_clips(world):
    train, standard = world.ids("train"), world.ids("standard")

    def told(name, change, code=2):
        rows = [json.loads(line) for line in world.clips]
        change({row["clip_id"]: row for row in rows})
        done = world.train(world.root / "never", manifest=world.manifest(name, map(json.dumps, rows)))
        assert done.code == code, done.err
        assert not (world.root / "never" / "run.json").exists()
        return done.err

    moved = told("moved", lambda rows: rows[standard[3]].update(split="train"))
    assert f"the cache's split 'train' lacks clip '{standard[3]}'" in moved
    renamed = told("renamed", lambda rows: [rows[name].update(clip_id=f"new-{name}") for name in train[:4]])
    assert f"lacks 4 clips ('new-{train[0]}', 'new-{train[1]}', 'new-{train[2]}', ...)" in renamed
    relabelled = told("labels", lambda rows: rows[train[1]].update(labels={"action": None}))
    assert f"the cache has other labels for clip '{train[1]}'" in relabelled
    shorter = told("times", lambda rows: [rows[name].update(end_seconds=0.2) for name in train[:2]])
    assert f"other times than the cache for 2 clips ('{train[0]}', '{train[1]}')" in shorter
    exchanged = told("videos", lambda rows: rows[train[0]].update(video=rows[train[1]]["video"]), code=4)
    assert "is not the file that the cache was built from" in exchanged


def test_groups_of_another_manifest_are_evaluated(world, runs):
    lines = [line.replace('"groups": []', '"groups": ["odd"]') for line in world.clips[-3:]]
    grouped = world.manifest("groups", (*world.clips[:-3], *lines))
    table = ("mmkd-student", "compare", "--cache", world.quick.cache, "--manifest", grouped, "--json")
    rows = json.loads(call_ok(*table, "--run", f"student={runs['student']}"))["rows"]
    assert {row[0]["standard/odd"]["action"]["count"] for row in rows.values()} == {3}


def test_a_cache_for_evaluation_alone_serves_students_baselines_and_the_table(world, runs, evaluation_only):
    manifest, cache = evaluation_only
    assert list(CacheReader(cache).layouts) == ["standard"]
    for run in runs.values():
        done = call("mmkd-student", "evaluate", run, "--cache", cache, *world.data(manifest), "--json")
        assert done.code == 0, done.err
        found = json.loads(done.out)["standard"]["action"]
        assert found["count"] == 14
        assert ("teacher_kl" in found) == (run == runs["baseline"]), "the student's teacher is not in this cache"
    assert "agreement with the teacher is left out: the cache lacks boxes" in call(
        "mmkd-student", "evaluate", runs["student"], "--cache", cache, *world.data(manifest)
    ).err  # fmt: skip
    table = ("mmkd-student", "compare", "--cache", cache, "--manifest", manifest)
    named = [part for name, run in runs.items() for part in ("--run", f"{name}={run}")]
    compared = call(*table, *named)
    assert compared.code == 0, compared.err
    assert "the runs learned from boxes, which this cache lacks: the teacher's row has uniform" in compared.err
    rows, *_, beside, _ = compared.out.split("\n\n")
    assert beside.startswith("| of")
    assert [line.split("|")[1].strip() for line in rows.splitlines()[2:]] == [
        "rgb expert", "teacher", "student", "baseline",
    ]  # fmt: skip
    heldout = call(*table, "--weights", "heldout")
    assert heldout.code == 0
    assert "the cache has no split 'train'" in heldout.err
    train = ("mmkd-student", "train", *FAST, *world.data(manifest), "--cache", cache, "-o", world.root / "no")
    assert "has no split 'train'" in refused(*train)
    weigh = ("mmkd-cache", "weigh", cache, "-o", world.root / "weights.json")
    assert "name another labelled split with --split (it has standard)" in refused(*weigh)
    assert call(*weigh, "--split", "standard").code == 0
    assert "'boxes' is unknown" in refused(*table, "--weights", "boxes=1")


@pytest.fixture(scope="module")
def challenge(world):
    """A manifest whose split `test` has no labels, and a cache that holds it beside a labelled one."""
    rows = [json.loads(line) for line in world.clips if '"split": "standard"' in line]
    for row in rows[5:]:
        row |= {"split": "test", "labels": {"action": None}}
    manifest, cache = world.manifest("challenge", map(json.dumps, rows)), world.root / "challenge-cache"
    places = ("--manifest", manifest, "--facts", world.root / "facts")
    built = world.quick.build(cache, *places, "--set", "build.splits=[standard,test]", experts=("rgb",))
    assert built.code == 0, built.err
    return manifest, cache


def test_a_split_without_labels_is_one_line_and_no_metrics(world, runs, challenge):
    manifest, cache = challenge
    line = "split 'test' is left out: none of its clips has a label"
    evaluate = ("mmkd-student", "evaluate", runs["baseline"], "--cache", cache, *world.data(manifest))
    done = call(*evaluate)
    assert done.code == 0, done.err
    assert line in done.err
    assert "test" not in done.out
    assert list(json.loads(call_ok(*evaluate, "--json"))) == ["standard"]
    compared = call("mmkd-student", "compare", "--cache", cache, "--manifest", manifest, "--json")
    assert compared.code == 0, compared.err
    assert line in compared.err
    assert all(list(seed) == ["standard"] for row in json.loads(compared.out)["rows"].values() for seed in row)


def test_a_cache_without_labels_is_not_evaluated(world, runs, challenge):
    """Its classes are told by `predict`, and a challenge's file by `submission`; nothing is printed or written."""
    rows = [json.loads(line) for line in challenge[0].read_text().splitlines()[1:]]
    rows = [row for row in rows if row["split"] == "test"]
    manifest, cache = world.manifest("no-labels", map(json.dumps, rows)), world.root / "no-labels"
    places = ("--manifest", manifest, "--facts", world.root / "facts")
    built = world.quick.build(cache, *places, "--set", "build.splits=[test]", experts=("rgb",))
    assert built.code == 0, built.err
    before = {path.name for path in runs["baseline"].iterdir()}
    error = refused("mmkd-student", "evaluate", runs["baseline"], "--cache", cache, *world.data(manifest))
    assert "there is no split to evaluate on: split 'test' is left out: none of its clips has a label" in error
    assert "submission" in error
    assert {path.name for path in runs["baseline"].iterdir()} == before
    assert "there is no split" in refused("mmkd-student", "compare", "--cache", cache, "--manifest", manifest)


def test_a_head_without_labels_says_so():
    value = {"count": 0, "left_out": 0, "top1": None, "top5": None, "ece": None, "positions": 1, "crops": 1}
    labelled = value | {"count": 3, "top1": 1.0, "top5": 1.0, "ece": 0.0}
    lines = metric_lines({"test": {"verb": labelled, "noun": value}})
    assert lines[:2] == [
        "test verb: top-1 100.0, top-5 100.0, ECE 0.0 (3 clips)",
        "test noun: none of its clips has a label",
    ]


def test_random_training_views_are_never_scored(world, runs):
    evaluate = ("mmkd-student", "evaluate", runs["student"], "--cache", world.quick.cache, *world.data())
    other = call(*evaluate, "--set", "train_split=none", "--json")
    assert list(json.loads(other.out)) == ["standard"]
    assert "split 'train' is left out: the cache holds random training views of it" in other.err
    nothing = refused(*evaluate, "--set", "train_split=standard")
    assert "there is no split to evaluate on: split 'train' is left out: the cache holds random" in nothing
    table = (
        "mmkd-student",
        "compare",
        "--cache",
        world.quick.cache,
        "--manifest",
        world.quick.root / "manifest.jsonl",
    )
    assert "train" not in call_ok(*table, "--train-split", "other")
    assert "there is no split to evaluate on" in refused(*table, "--train-split", "standard")


def test_a_cache_of_other_views_than_the_student_s_own_is_evaluated_and_that_is_said(world, runs, tmp_path):
    run = shutil.copytree(runs["student"], tmp_path / "run")
    record = read_run(run)
    seen = replace(record.input, views=record.input.views | {"frames": 8})
    write_run(run, replace(record, input=seen))
    done = call("mmkd-student", "evaluate", run, "--cache", world.quick.cache, *world.data())
    assert done.code == 0, done.err
    assert "the student learned from other views than this cache's: frames: run 8, cache 4" in done.err


def test_a_mistyped_training_split_builds_no_cache_for_evaluation_alone(world, tmp_path):
    done = world.quick.build(tmp_path / "cache", "--set", "train_split=trian")
    assert done.code == 2
    assert "the manifest has no split 'trian', but 'train': give --set train_split=train" in done.err
    assert not (tmp_path / "cache" / "init.json").exists()
