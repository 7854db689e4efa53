"""A run's folder: sealed, one writer's, and enough by itself to know what its student sees."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load, save

from mmkd.cache_tools.cache.sealed import open_seal, seal
from mmkd.cache_tools.frames.clip_set import ClipSet, DataRecipe
from mmkd.cache_tools.tasks.folder_lock import folder_lock
from mmkd.cache_tools.views.canonical import canonical_view
from mmkd.data_manifests.errors import InputError, MmkdError, VerificationError
from mmkd.pipeline.experts.teach import whole_expert
from mmkd.pipeline.recipe import TeacherRecipe
from mmkd.student.evaluation.evaluation_file import read_evaluation
from mmkd.student.evaluation.metrics import average_views, evaluate
from mmkd.student.evaluation.own_folder import refuse_other_contents
from mmkd.student.evaluation.run_files import read_model, read_run, write_model
from mmkd.student.evaluation.trained import load_student
from tests.helpers.commands import ENVIRONMENT
from tests.helpers.in_process import call, call_ok, refused
from tests.helpers.places import unpack_before

TRAIN = ("mmkd-student", "train", "-c", "student.yaml", "--cache", "cache", "--node-copies", "copies")
EVALUATE = ("mmkd-student", "evaluate", "run", "--cache", "cache", "--json")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Videos, manifest, cache and experts of eight clips, and a run that was trained on them."""
    root = unpack_before(tmp_path_factory.mktemp("run"))
    shutil.rmtree(root / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        call_ok(*TRAIN, "--weights", "rgb=1,boxes=3", "-o", "run")
    return root


@pytest.fixture
def world(made, tmp_path, monkeypatch):
    """A copy that may be written into, as the working folder."""
    root = shutil.copytree(made, tmp_path / "world")
    monkeypatch.chdir(root)
    return root


def flips(data: bytes, count: int):
    """Bytes with one flipped bit, at places all over."""
    for number, place in enumerate(np.linspace(0, len(data) - 1, count).astype(int)):
        flipped = bytearray(data)
        flipped[place] ^= 1 << number % 8
        yield bytes(flipped)


def result_or_error(read, *arguments):
    try:
        return read(*arguments)
    except (MmkdError, ValueError) as error:
        return error


@pytest.mark.parametrize(
    ("name", "read", "count"),
    [
        ("run.json", lambda path: read_run(path.parent), 1500),
        ("evaluation.json", lambda path: read_evaluation(path, "evaluate"), 800),
        ("model.safetensors", lambda path: read_model(path.parent, read_run(path.parent)), 40),
    ],
)
def test_no_flipped_bit_of_a_run_changes_a_meaning(world, caplog, name, read, count):
    path = world / "run" / name
    data, whole = path.read_bytes(), read(path)
    refusals = 0
    for flipped in flips(data, count):
        path.write_bytes(flipped)
        found = result_or_error(read, path)
        refusals += isinstance(found, Exception)
        assert isinstance(found, Exception) or found == whole  # white space between the fields may change
    assert refusals > count / 2
    assert not caplog.records


def test_a_damaged_file_of_a_run_is_written_again_by_the_command_that_is_named(world):
    model, run = world / "run" / "model.safetensors", world / "run" / "run.json"
    whole = {path: path.read_bytes() for path in (model, run)}
    model.write_bytes(next(flips(whole[model], 1)))
    assert "model.safetensors is damaged: it is not the file" in (said := refused(*EVALUATE, code=4))
    assert "run the same `mmkd-student train` again" in said
    again = (*TRAIN, "--weights", "rgb=1,boxes=3", "-o", "run")
    call_ok(*again)
    assert model.read_bytes() == whole[model]
    run.write_bytes(whole[run].replace(b"boxes=3", b"boxes=4"))
    assert "run.json is damaged (its hash differs); delete it and run the same" in refused(*again, code=4)
    run.unlink()
    call_ok(*again)
    assert run.read_bytes() == whole[run]
    call_ok(*EVALUATE)


def test_a_damaged_evaluation_is_named_with_the_command_that_makes_it_again(world):
    path = world / "run" / "evaluation.json"
    path.write_bytes(path.read_bytes().replace(b'"top1": ', b'"top1": 1'))
    table = ("mmkd-student", "compare", "--cache", "cache", "--manifest", "manifest.jsonl", "--run", "student=run")
    assert "evaluation.json is damaged" in (said := refused(*table))
    assert "run `mmkd-student evaluate run --cache CACHE` again" in said
    call_ok(*EVALUATE)
    call_ok(*table)


def test_a_run_from_before_the_seal_is_read_with_a_warning_and_sealed_by_the_same_train(
    made, tmp_path, monkeypatch
):
    monkeypatch.chdir(unpack_before(tmp_path))
    result = call(*EVALUATE)
    assert result.code == 0
    assert "run/run.json has no seal" in result.err
    assert "run/model.safetensors has no seal" in result.err
    with pytest.raises(InputError, match=r"does not say what the student sees: .* Run the same"):
        load_student(tmp_path / "run")
    call_ok(*TRAIN, "-o", "run")
    assert open_seal((tmp_path / "run" / "run.json").read_bytes())["schema"] == "mmkd-run-2"
    assert "no seal" not in call(*EVALUATE).err
    assert load_student(tmp_path / "run").policy.frames == 4


def test_a_student_is_read_from_its_folder_alone_and_says_what_the_evaluation_says(world):
    stored = read_evaluation(world / "run" / "evaluation.json", "evaluate").metrics
    clip_set = ClipSet(DataRecipe(manifest=Path("manifest.jsonl"), videos=Path("videos"), workers=0))
    items = list(clip_set.probe(clip_set.manifest.split("standard")))
    folder = shutil.move(world / "run", world / "elsewhere")
    for name in ("cache", "experts", "zeros.pth", "student.yaml"):
        (world / name).rename(world / f"gone-{name}")
    student = load_student(Path(folder))
    assert (student.policy.frames, student.policy.size_px, student.policy.sampling) == (4, 32, "uniform")
    assert list(student.heads) == ["action"]
    logits = []
    for item in items:
        views = student.views(item.facts)
        frames = [clip_set.source.read(item.clip.video, np.unique(v.frame_indices), item.video) for v in views]
        pixels = [canonical_view(f, v, student.policy.size_px) for f, v in zip(frames, views, strict=True)]
        logits.append(student.logits(np.stack(pixels))["action"])
    found = evaluate(average_views(np.stack(logits)), np.array([item.clip.labels["action"] for item in items]))
    assert found.nll == pytest.approx(stored["standard"]["action"]["nll"], rel=1e-5)
    assert found.top1 == stored["standard"]["action"]["top1"]
    with pytest.raises(ValueError, match=r"expected uint8 \(B, 4, 32, 32, 3\)"):
        student.logits(np.zeros((1, 4, 48, 48, 3), np.uint8))


def test_a_model_that_run_json_does_not_describe_is_refused(world):
    path = world / "run" / "model.safetensors"
    state = load(path.read_bytes())
    state["network.heads.action.bias"] += 1
    path.write_bytes(save(state))
    with pytest.raises(VerificationError, match=r"it is not the file that run\.json describes"):
        load_student(world / "run")
    path.unlink()
    with pytest.raises(InputError, match="the run is not finished"):
        load_student(world / "run")


def test_a_model_of_nan_is_refused_in_one_line(world):
    state = load((world / "run" / "model.safetensors").read_bytes())
    state["network.heads.action.bias"] *= float("nan")
    write_model(world / "run", read_run(world / "run"), save(state))
    assert "the student gives NaN or infinity" in refused(*EVALUATE, code=4)


def test_a_finished_run_is_evaluated_without_the_weights_that_it_started_from(world):
    before = json.loads(call_ok(*EVALUATE))
    (world / "zeros.pth").unlink()
    assert json.loads(call_ok(*EVALUATE)) == before


def test_a_cache_that_lacks_an_expert_of_the_run_leaves_the_agreement_out(world):
    assert "teacher_kl" in json.loads(call_ok(*EVALUATE))["standard"]["action"]
    call_ok("mmkd-cache", "build", "-c", "teacher.yaml", "--expert", "experts/rgb", "-o", "other")
    result = call("mmkd-student", "evaluate", "run", "--cache", "other", "--json")
    assert result.code == 0, result.err
    assert "agreement with the teacher is left out: the cache lacks boxes" in result.err
    metrics = json.loads(result.out)["standard"]["action"]
    assert "top1" in metrics
    assert "teacher_kl" not in metrics


def test_a_second_training_into_a_folder_is_refused_with_who_is_there(world):
    before = {path: path.read_bytes() for path in (world / "run").rglob("*") if path.is_file()}
    with folder_lock(world / "run"):
        assert "run is in use by process" in refused(*TRAIN, "-o", "run")
    assert {path: path.read_bytes() for path in (world / "run").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(("folder", "what"), [("cache", "a cache"), ("experts/rgb", "an expert")])
def test_a_training_into_the_folder_of_something_else_is_refused(world, folder, what):
    before = sorted(world.rglob("*"))
    assert f"{folder} holds {what}; name another folder with -o" in refused(*TRAIN, "-o", folder)
    assert sorted(world.rglob("*")) == before


def test_several_processes_of_a_launcher_are_refused_by_commands_of_one(world, monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setitem(ENVIRONMENT, name, value)
    compare = ("mmkd-student", "compare", "--cache", "cache", "--run", "a=run")
    said = refused(*compare)
    assert "one of 2 processes that were started by torchrun" in said
    assert "Start it once" in said
    monkeypatch.setitem(ENVIRONMENT, "MASTER_PORT", "")
    assert "MASTER_PORT is not set: torchrun sets all of them" in refused(*TRAIN, "-o", "new")
    assert not (world / "new").exists()


@pytest.mark.parametrize("name", ["metrics.jsonl", "model.safetensors", "evaluation.json", "run.json"])
def test_a_training_does_not_write_over_files_that_are_not_its_own(tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(InputError, match=f"{name}.* name another folder"):
        refuse_other_contents(tmp_path)
    assert (tmp_path / name).read_text() == "{}"


def test_a_training_goes_beside_files_of_other_names(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    refuse_other_contents(tmp_path)
    refuse_other_contents(tmp_path / "new")


def test_a_teaching_does_not_write_over_weights_that_are_not_its_own(world):
    data = DataRecipe(manifest=Path("manifest.jsonl"), videos=Path("videos"))
    of_what = ("rgb", {}, TeacherRecipe(data=data), ClipSet(data))
    out = world / "another"
    out.mkdir()
    (out / "weights.safetensors").write_text("mine")
    with pytest.raises(InputError, match=r"weights.safetensors.* name another folder with -o"):
        whole_expert(out, *of_what)
    (out / "training" / "checkpoint-000000001").mkdir(parents=True)
    assert whole_expert(out, *of_what) is None


def test_a_finished_run_without_its_checkpoint_is_not_trained_again(world):
    for folder in (world / "run").glob("checkpoint-*"):
        shutil.rmtree(folder)
    before = {path: path.read_bytes() for path in (world / "run").rglob("*") if path.is_file()}
    said = refused(*TRAIN, "--set", "train.seed=7", "-o", "run")
    assert "run holds a finished run whose checkpoint is gone" in said
    (world / "run" / "model.safetensors").unlink()
    assert "run holds a finished run" in refused(*TRAIN, "-o", "run")
    (world / "run" / "model.safetensors").write_bytes(before[world / "run" / "model.safetensors"])
    assert {path: path.read_bytes() for path in (world / "run").rglob("*") if path.is_file()} == before
    call_ok(*EVALUATE)


def test_a_run_continues_without_the_weights_that_it_started_from(world):
    again = (*TRAIN, "--weights", "rgb=1,boxes=3", "-o", "run")
    before = (world / "run" / "model.safetensors").read_bytes()
    (world / "zeros.pth").rename(world / "gone.pth")
    result = call(*again)
    assert result.code == 0, result.err
    assert "zeros.pth, which the run started from, is gone" in result.err
    assert (world / "run" / "model.safetensors").read_bytes() == before
    assert "recipe.batch_size: checkpoint 2, now 3" in refused(*again, "--set", "train.batch_size=3", code=5)
    (world / "gone.pth").rename(world / "zeros.pth")
    call_ok(*again)
    (world / "zeros.pth").unlink()
    assert "cannot read the weights zeros.pth: No such file" in refused(*TRAIN, "-o", "new")


def test_a_training_beside_a_teaching_or_in_an_experts_folder_is_refused(world):
    said = refused(*TRAIN, "-o", "experts/rgb/training")
    assert "training lies in a folder that holds an expert; name another folder" in said
    with folder_lock(world / "being-taught"):
        assert "being-taught is in use by process" in refused(*TRAIN, "-o", "being-taught/training")
    (world / "half").mkdir()
    shutil.copytree(world / "run", world / "half" / "training")
    teach = ("mmkd-cache", "teach", "rgb", "-c", "teacher.yaml", "-o", "half")
    assert "training holds a run of `mmkd-student train`" in refused(*teach)


@pytest.mark.parametrize("name", ["run.json", "model.safetensors", "evaluation.json", "evaluation.clips.jsonl"])
def test_a_pipe_or_a_device_in_a_runs_folder_is_refused_at_once(world, name):
    table = ("mmkd-student", "compare", "--cache", "cache", "--manifest", "manifest.jsonl", "--run", "student=run")
    for make, kind in ((os.mkfifo, "a named pipe"), (lambda path: path.symlink_to("/dev/zero"), "a device")):
        (world / "run" / name).unlink()
        make(world / "run" / name)
        command = table if name.startswith("evaluation") else EVALUATE
        assert f"{name}: it is {kind}, not a regular file" in refused(*command, code=74)


def test_a_pipe_in_place_of_weights_is_refused_at_once(world):
    for name in ("w.pth", "w.safetensors", "w.json"):
        os.mkfifo(world / name)
        option = ("--weights", name) if name.endswith("json") else ("--set", f"train.weights={name}")
        assert f"{name}: it is a named pipe" in refused(*TRAIN, *option, "-o", "new")


def test_single_clips_of_another_form_are_named(world):
    clips, path = world / "run" / "evaluation.clips.jsonl", world / "run" / "evaluation.json"
    for text in ("[]\n", "{", '{"split": "standard", "clip_id": "1", "heads": {"action": "out"}}\n[1]\n'):
        clips.write_text(text)
        value = open_seal(path.read_bytes())
        value["clips_sha256"] = hashlib.sha256(text.encode()).hexdigest()
        path.write_text(json.dumps(seal(value)))
        table = ("mmkd-student", "compare", "--cache", "cache", "--manifest", "manifest.jsonl", "--run", "s=run")
        assert "evaluation.clips.jsonl is damaged" in refused(*table)


def test_a_baseline_says_how_many_clips_teach_it_nothing(world):
    path = world / "manifest.jsonl"
    lines = path.read_text().splitlines()
    row = next(number for number, line in enumerate(lines) if json.loads(line).get("split") == "train")
    lines[row] = json.dumps({**json.loads(lines[row]), "labels": {"action": None}})
    path.write_text("\n".join(lines) + "\n")
    call_ok("mmkd-cache", "build", "-c", "teacher.yaml", "--expert", "experts/rgb", "-o", "other")
    result = call(*TRAIN, "--cache", "other", "--labels-only", "-o", "new")
    assert result.code == 0, result.err
    assert "1 of 4 training clips have no label, and teach nothing" in result.err
