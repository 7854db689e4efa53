"""The wrong kind of file or folder is recognised, and the right one named."""

import json

import h5py
import pytest

from mmkd.cache_tools import layout
from mmkd.cache_tools.layout import INIT
from mmkd.data_manifests import manifest
from mmkd.data_manifests.errors import InputError
from mmkd.data_manifests.kinds import (
    BOXES,
    FOLDERS,
    HDF5,
    LABELS,
    MANIFEST,
    PER_CLASS,
    SCHEMAS,
    SPLIT_FILE,
    STUDENT_RECIPE,
    SUBMISSION,
    TEACHER_RECIPE,
    refuse_another,
    what_is,
)
from mmkd.data_manifests.manifest import Clip, Head, Manifest
from mmkd.data_manifests.manifest_file import load_manifest, save_manifest
from mmkd.pipeline.experts import expert
from mmkd.pipeline.experts.expert import CARD_FILE
from mmkd.student.evaluation import run_files, table
from mmkd.student.evaluation.run_files import RUN_FILE
from mmkd.student.evaluation.submission import write_submission
from mmkd.student.teacher import mixture_file
from tests.helpers.in_process import call_ok, refused

FILES = {
    "train.json": json.dumps([{"id": "1", "label": "a", "template": "A [b]", "placeholders": []}], indent=1),
    "labels.json": json.dumps({"Moving something": "0", "Holding something": "1"}),
    "boxes.json": json.dumps({"1": [{"url": "x", "labels": []}]}),
    "weights.json": json.dumps({"schema": "mmkd-weights-1", "teacher": {}}),
    "classes.csv": "split,head,class,name,clips,top1,top5\nvalidation,action,0,a,1,100.00,100.00\n",
}


@pytest.fixture
def given(tmp_path, monkeypatch):
    """A folder with one thing of each kind; the current one."""
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    write_submission(tmp_path / "submission.zip", {})
    with h5py.File("x.h5", "w") as file:
        file["a"] = 1
    for program, name in (("mmkd-cache", "teacher.yaml"), ("mmkd-student", "student.yaml")):
        (tmp_path / name).write_text(call_ok(program, "config", "example", "something-something"))
    clip = Clip("1", "1.webm", "train", {"action": 0})
    save_manifest(Manifest("d", (Head("action", ("a", "b")),), (clip,)), tmp_path / "m.jsonl")
    for name in (INIT, RUN_FILE, CARD_FILE):
        (tmp_path / name.partition(".")[0]).mkdir()
        (tmp_path / name.partition(".")[0] / name).write_text("{}")
    return tmp_path


def test_each_kind_is_recognised(given):
    expected = {
        "train.json": SPLIT_FILE,
        "labels.json": LABELS,
        "boxes.json": BOXES,
        "weights.json": SCHEMAS["mmkd-weights"],
        "classes.csv": PER_CLASS,
        "submission.zip": SUBMISSION,
        "x.h5": HDF5,
        "teacher.yaml": TEACHER_RECIPE,
        "student.yaml": STUDENT_RECIPE,
        "m.jsonl": MANIFEST,
        "init": FOLDERS[INIT],
        "run": FOLDERS[RUN_FILE],
        "expert": FOLDERS[CARD_FILE],
        "nothing": None,
        ".": None,
    }
    assert {name: what_is(given / name) for name in expected} == expected


@pytest.mark.parametrize(
    ("schema", "kind"),
    [
        (manifest.SCHEMA, "mmkd-manifest"),
        (mixture_file.SCHEMA, "mmkd-weights"),
        (mixture_file.UNSEALED_SCHEMA, "mmkd-weights"),
        (expert.SCHEMA, "mmkd-expert"),
        (expert.UNSEALED_SCHEMA, "mmkd-expert"),
        (run_files.SCHEMA, "mmkd-run"),
        (table.SCHEMA, "mmkd-table"),
        (layout.SCHEMA, "mmkd-cache"),
    ],
)
def test_the_schema_that_its_owner_writes_is_known(tmp_path, schema, kind):
    (tmp_path / "file").write_text(json.dumps({"schema": schema}))
    assert what_is(tmp_path / "file") == SCHEMAS[kind]


def test_the_record_of_a_run_is_recognised_whatever_its_length(tmp_path):
    record = run_files.RunRecord(
        recipe={"train": "x" * 9999},
        cache="c",
        heads={},
        labels_only=True,
        fresh_views=False,
        weights=None,
        versions={},
    )
    run_files.write_run(tmp_path, record)
    assert run_files.read_run(tmp_path) == record
    with pytest.raises(InputError, match=r"it is the record of a run"):
        load_manifest(tmp_path / run_files.RUN_FILE)


@pytest.mark.parametrize(
    "name", ["train.json", "labels.json", "boxes.json", "x.h5", "student.yaml", "weights.json"]
)
def test_another_file_than_a_manifest_is_named(given, name):
    with pytest.raises(InputError) as caught:
        load_manifest(given / name)
    assert what_is(given / name) in str(caught.value)
    assert "\n" not in str(caught.value)


BUILD = ("mmkd-cache", "build", "--videos", ".", "--manifest", "m.jsonl")
WRONG = {
    "a file as a cache": (("mmkd-cache", "status", "x.h5"), "x.h5 is a file, not a cache; it is an HDF5 file"),
    "a run as a cache": (("mmkd-cache", "inspect", "run"), "run is not a cache; it is a run"),
    "an expert as a cache": (("mmkd-cache", "verify", "expert"), "expert is not a cache; it is an expert"),
    "a cache as a run": (("mmkd-student", "evaluate", "init", "--cache", "init"), "init is not a run of"),
    "a cache as an expert": ((*BUILD, "--expert", "init", "-o", "c"), "init is not an expert; it is a cache"),
    "a manifest as a recipe": (
        (*BUILD, "-c", "m.jsonl", "--expert", "e", "-o", "c"),
        "m.jsonl is not a recipe; it is a",
    ),
    "a split file as a recipe": ((*BUILD, "-c", "train.json", "--expert", "e", "-o", "c"), "it is a split file"),
    "a student's recipe to build": (
        (*BUILD, "-c", "student.yaml", "--expert", "e", "-o", "c"),
        "`mmkd-cache config example something-something` prints one for this command",
    ),
    "a teacher's recipe to train": (
        ("mmkd-student", "train", "-c", "teacher.yaml", "--cache", "init", "-o", "r"),
        "`mmkd-student config example something-something` prints one for this command",
    ),
    "no recipe at all": (
        ("mmkd-cache", "teach", "rgb", "--videos", ".", "--manifest", "m.jsonl", "-o", "e"),
        "the recipe has no expert 'rgb'; no recipe is given; give one with -c FILE",
    ),
    "no videos": (
        ("mmkd-cache", "teach", "rgb", "--manifest", "m.jsonl", "-o", "e"),
        "data.videos: missing; give --videos, or set it in a recipe (-c FILE)",
    ),
    "no data": (("mmkd-cache", "teach", "rgb", "-o", "e"), "data.manifest: missing; give --manifest, or"),
}


@pytest.mark.parametrize("case", WRONG)
def test_the_wrong_kind_is_refused_with_the_right_one(given, case):
    arguments, says = WRONG[case]
    assert says in refused(*arguments)


OVER_ANOTHER = {
    "weights": (("mmkd-cache", "weigh", "init", "-o", "x.h5"), "x.h5 is there, and is not a weights file"),
    "a table": (
        ("mmkd-student", "compare", "--tables", "m.jsonl", "--out", "weights.json"),
        "weights.json is there, and is not a table of `mmkd-student compare --out`; it is a weights file",
    ),
    "a table of classes": (
        ("mmkd-student", "evaluate", "run", "--cache", "init", "--per-class", "labels.json"),
        "labels.json is there, and is not a table of classes",
    ),
    "a submission": (
        ("mmkd-student", "submission", "run", "--cache", "init", "-o", "classes.csv"),
        "classes.csv is there, and is not a submission that `mmkd-student submission` wrote; it is a table",
    ),
}


@pytest.mark.parametrize("case", OVER_ANOTHER)
def test_nothing_is_written_over_a_file_of_another_kind(given, case):
    arguments, says = OVER_ANOTHER[case]
    before = (given / arguments[-1]).read_bytes()
    assert says in refused(*arguments)
    assert (given / arguments[-1]).read_bytes() == before


def test_an_empty_file_and_one_of_the_kind_may_be_written_over(given):
    (given / "new").touch()
    for name, kind in (("new", MANIFEST), ("m.jsonl", MANIFEST), ("submission.zip", SUBMISSION), ("absent", HDF5)):
        refuse_another(given / name, kind)
