"""A student as files for other programs: the same logits as the student's, and enough in them to name a class."""

import json
import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from huggingface_hub import ModelCard
from torch import nn

from mmkd.cache_tools.cache.reader import CacheReader
from mmkd.cache_tools.frames.clip_set import ClipSet, DataRecipe
from mmkd.cache_tools.views.drawing import ViewPolicy
from mmkd.data_manifests.errors import InputError, StorageError, VerificationError
from mmkd.student.data.split_data import open_split
from mmkd.student.evaluation.run_files import read_run
from mmkd.student.evaluation.trained import TrainedStudent, load_student
from mmkd.student.export import cost, export_run, folder, onnx_file, real_frames
from mmkd.student.export.card import card_of
from mmkd.student.export.card_text import card_text, number
from mmkd.student.export.check import check, onnx_runner
from mmkd.student.export.onnx_file import onnx_bytes, refuse_large
from mmkd.student.export.program import exported_program
from mmkd.student.export.pt2_file import pt2_bytes, pt2_runner
from mmkd.student.export.real_frames import noise
from mmkd.student.network_table import NETWORKS
from mmkd.student.networks.networks import VideoClassifier, build_network
from mmkd.student.recipes.train import TrainRecipe
from tests.helpers.in_process import call_ok, refused
from tests.helpers.places import unpack_before

DATA = ("--manifest", "manifest.jsonl", "--videos", "videos", "--workers", "0")
EXPORT = ("mmkd-student", "export", "run", "--no-latency")
TRAIN = ("mmkd-student", "train", "-c", "student.yaml", "--cache", "cache", "--node-copies", "copies", "-o", "run")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with a trained `run` and its `exported` files."""
    root = unpack_before(tmp_path_factory.mktemp("export"))
    shutil.rmtree(root / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        call_ok(*TRAIN, "--weights", "rgb=1,boxes=3", "--set", "train.weights=null")
        patch.setattr(cost, "ENOUGH_SECONDS", 0.0)
        call_ok("mmkd-student", "export", "run", "-o", "exported", "--format", "both")
    return root


@pytest.fixture
def world(exported, monkeypatch):
    """The folder with `run` and `exported`, as the current one."""
    monkeypatch.chdir(exported)
    return exported


def noisy_views(student):
    return np.concatenate([clip.pixels for clip in noise(student).read()])


def test_from_the_onnx_file_alone_the_students_class_of_a_clip_comes_out_by_name(world):
    student = load_student(world / "run")
    frames = noisy_views(student)[:1]
    session = onnxruntime.InferenceSession(world / "exported" / "model.onnx", providers=["CPUExecutionProvider"])
    told = json.loads(session.get_modelmeta().custom_metadata_map["mmkd"])
    (logits,) = session.run(["action"], {"frames": frames})
    wanted = student.logits(frames)["action"]
    np.testing.assert_allclose(logits, wanted, atol=1e-4)
    assert told["classes"] == student.heads
    assert told["classes"]["action"][logits[0].argmax()] == student.heads["action"][wanted[0].argmax()]
    assert (told["views"]["frames"], told["views"]["size_px"]) == (student.policy.frames, student.policy.size_px)
    assert session.get_inputs()[0].shape == ["batch", *frames.shape[1:]]


def test_the_torch_export_file_gives_the_students_logits_for_any_batch_with_class_names_in_it(world):
    student = load_student(Path("run"))
    extra = {"mmkd.json": ""}
    module = torch.export.load("exported/model.pt2", extra_files=extra).module()
    frames = noisy_views(student)
    for batch in (1, 3):
        (logits,) = module(torch.from_numpy(frames[:batch]))
        np.testing.assert_allclose(logits.detach().numpy(), student.logits(frames[:batch])["action"], atol=1e-5)
    assert json.loads(extra["mmkd.json"])["classes"] == student.heads


def test_a_torch_export_file_of_other_weights_or_class_names_is_refused(world):
    student, other = (load_student(Path("run")) for _ in range(2))
    with torch.no_grad():
        other.network.network.heads["action"].bias += 0.1
    file = pt2_bytes(exported_program(other), {"classes": student.heads})
    with pytest.raises(VerificationError, match=r"differ from the student's by up to 0\.1"):
        check(pt2_runner(file, student), student, list(noisy_views(student)), what="model.pt2")
    swapped = {"action": student.heads["action"][::-1]}
    with pytest.raises(VerificationError, match="other class names"):
        pt2_runner(pt2_bytes(exported_program(student), {"classes": swapped}), student)


def test_the_lines_of_the_card_run_and_name_the_students_classes(world, monkeypatch, capsys):
    student = load_student(Path("run"))
    frames = noisy_views(student)
    best = student.logits(frames)["action"].argmax(1)
    blocks = (world / "exported" / "README.md").read_text().split("```python\n")[1:]
    monkeypatch.chdir("exported")
    for block in blocks:
        exec(block.split("```")[0], {"frames": frames, "torch": torch})
    line = f"action {[student.heads['action'][number] for number in best]}"
    assert capsys.readouterr().out.splitlines() == [line, line]


def test_the_card_tells_data_teacher_accuracies_with_their_views_and_checks(world):
    text = (world / "exported" / "README.md").read_text()
    card = json.loads((world / "exported" / "card.json").read_bytes())
    run = json.loads(Path("run/run.json").read_bytes())
    metrics = json.loads(Path("run/evaluation.json").read_bytes())["metrics"]
    hub = ModelCard(text).data
    assert (hub.license, hub.datasets, hub.metrics) == ("unknown", ["before"], ["accuracy"])
    assert {"onnx", "pt2", "knowledge-distillation"} <= set(hub.tags)
    assert [found.metric_value for found in hub.eval_results] == [metrics["standard"]["action"]["top1"]]
    assert hub.eval_results[0].metric_name == "top-1, action, 1 position x 1 crop"
    assert card["evaluations"] == [{"cache": run["cache"], "metrics": metrics}]
    assert card["teacher"] == run["weights"] == {"action": {"rgb": 0.25, "boxes": 0.75}}
    assert (card["cache"], card["dataset"], card["starting_weights"]) == (run["cache"], "before", None)
    top1, top5 = (f"{100 * metrics['standard']['action'][name]:.1f}" for name in ("top1", "top5"))
    assert f"| `standard` | action | {top1} | {top5} | 4 | 1 position x 1 crop |" in text
    assert "experts: rgb 0.25, boxes 0.75." in text
    assert f"`{run['cache']}`" in text
    assert "**Fill in the licence**" in text
    assert "compared with the student on noise" in text
    assert set(card["files"]) == {"model.onnx", "model.pt2", "README.md"}
    assert str(world) not in text + json.dumps(card), "no path of this machine"


def test_the_card_has_the_cost_of_each_form_on_this_machine(world, tmp_path):
    text = (world / "exported" / "README.md").read_text()
    card = json.loads((world / "exported" / "card.json").read_bytes())
    found = card["cost"]
    forms = [(row["form"], row["batch"]) for row in found["rows"] if "CUDA" not in row["form"]]
    assert forms == [("eager fp32", 1), ("eager fp32", 8), ("ONNX fp32", 1), ("ONNX fp32", 8)]
    for name in ("model.onnx", "model.pt2"):
        assert found["file_mib"][name] == (world / "exported" / name).stat().st_size / 2**20
    weights = load_student(Path("run")).network.parameters()
    assert found["million_parameters"] == sum(value.numel() for value in weights) / 1e6
    for row in found["rows"]:
        assert f"| {row['form']} | {row['batch']} | {number(row['median_ms'])} |" in text
    call_ok(*EXPORT, "-o", tmp_path / "out", "--format", "pt2")
    assert json.loads((tmp_path / "out" / "card.json").read_bytes())["cost"] is None
    assert "Not measured." in (tmp_path / "out" / "README.md").read_text()


def test_numbers_of_the_card_have_three_digits_and_never_an_exponent():
    assert [number(value) for value in (0.3841, 22.53, 999.4, 2604.0)] == ["0.384", "22.5", "999", "2604"]


def test_a_named_licence_stands_in_the_card_and_one_that_is_none_is_refused(world, tmp_path):
    export = (*EXPORT, "-o", tmp_path / "out", "--format", "pt2")
    call_ok(*export, "--license", "cc-by-nc-4.0")
    text = (tmp_path / "out" / "README.md").read_text()
    assert ModelCard(text).data.license == "cc-by-nc-4.0"
    assert "Fill in" not in text
    assert "no identifier of a licence" in refused(*export, "--license", "my own: all\nrights")
    (tmp_path / "out" / "README.md").write_text(text + "mine")
    assert "README.md was changed after its export" in refused(*export)
    assert (tmp_path / "out" / "README.md").read_text() == text + "mine"


def test_a_baseline_without_evaluation_has_a_card_that_says_so(world):
    student = load_student(Path("run"))
    run = read_run(Path("run"))
    started = {**run.recipe, "train": {**run.recipe["train"], "weights": "/home/me/kinetics.pth"}}
    record = replace(run, recipe=started, labels_only=True, weights=None, dataset=None)
    card = card_of(Path("cache"), record, student, "unknown")
    text = card_text(
        {**card, "cost": None, "int8": None, "check": {"frames": "1 video", "real": True, "files": {}}}
    )
    assert "labels alone" in text
    assert "Not evaluated" in text
    assert "from the weights file `kinetics.pth`, whose licence counts" in text
    assert "/home/me" not in text + json.dumps(card)
    assert ModelCard(text).data.datasets is None


def test_files_are_checked_on_the_frames_that_are_named_and_say_which(world, tmp_path):
    video = next(Path("videos").iterdir())
    of_clips = json.loads(call_ok(*EXPORT, "-o", tmp_path / "a", *DATA, "--json"))["check"]
    of_video = call_ok(*EXPORT, "-o", tmp_path / "b", "--check", video)
    of_noise = json.loads((world / "exported" / "card.json").read_bytes())["check"]
    assert of_clips["frames"] == "4 clips of standard of before"
    assert of_clips["files"]["model.onnx"]["views"] == 4
    assert 0 < of_clips["files"]["model.onnx"]["largest"] < 1e-5, "0 were a student that sees nothing"
    assert of_clips["files"]["model.onnx"]["top1"] == 1
    assert of_video.rstrip().endswith("on 1 video")
    assert of_noise["frames"] == "noise, not real frames"


def test_the_frames_of_a_check_are_the_pixels_that_evaluation_sees(world):
    student = load_student(Path("run"))
    clip_set = ClipSet(DataRecipe(manifest="manifest.jsonl", videos="videos", workers=0))
    frames = real_frames.of_clips(student, clip_set, ["standard"], most=2)
    split = open_split(CacheReader(Path("cache")), clip_set, "standard", memory_bytes=0)
    found = [clip.pixels for clip in frames.read()]
    wanted = [split.data.item(row, 0)["rgb"] for row in (0, len(split.rows) - 1)]
    np.testing.assert_array_equal(np.concatenate(found), np.stack(wanted))
    of_video = real_frames.of_videos(student, [Path("videos") / split.clips[0].clip.video])
    np.testing.assert_array_equal(next(of_video.read()).pixels[0], wanted[0])


def test_what_cannot_be_checked_with_is_one_line_and_nothing_is_left(world, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "text.mp4").write_text("no video")
    export = (*EXPORT, "-o", out)
    assert f"--check {tmp_path / 'text.mp4'}: " in refused(*export, "--check", tmp_path / "text.mp4")
    assert "--check gone.mp4: video not found" in refused(*export, "--check", "gone.mp4")
    assert "not both" in refused(*export, *DATA, "--check", "gone.mp4")
    text = Path("manifest.jsonl").read_text()
    (tmp_path / "other.jsonl").write_text(text.replace('["', '["other ', 1))
    assert "other classes" in refused(*export, "--manifest", tmp_path / "other.jsonl", "--videos", "videos")
    (tmp_path / "train.jsonl").write_text("".join(x for x in text.splitlines(True) if '"standard"' not in x))
    line = refused(*export, "--manifest", tmp_path / "train.jsonl", "--videos", "videos")
    assert "no split but 'train'" in line
    assert not out.exists()


def test_a_file_whose_weights_are_not_the_students_ends_with_exit_code_4_and_leaves_nothing(
    world, tmp_path, monkeypatch
):
    real = export_run.onnx_bytes

    def shifted(*arguments):
        model = onnx.load_from_string(real(*arguments))
        bias = next(value for value in model.graph.initializer if value.name.endswith("heads.action.bias"))
        bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + 0.1, bias.name))
        return model.SerializeToString()

    monkeypatch.setattr(export_run, "onnx_bytes", shifted)
    line = refused(*EXPORT, "-o", tmp_path / "out", *DATA, code=4)
    assert "model.onnx: its logits differ from the student's by up to 0.1" in line
    assert list(tmp_path.iterdir()) == []


def test_logits_that_are_not_numbers_are_never_in_agreement(world):
    student = load_student(Path("run"))
    frames = list(noisy_views(student))
    nan = {head: np.full((3, len(classes)), np.nan, np.float32) for head, classes in student.heads.items()}
    with pytest.raises(VerificationError, match="nan"):
        check(lambda frames: nan, student, frames, what="ONNX")


def test_a_stop_signal_in_the_check_ends_with_exit_code_75_and_leaves_nothing(world, tmp_path, monkeypatch):
    def stopped(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal was not heard")

    monkeypatch.setattr(real_frames, "views_of", stopped)
    line = refused(*EXPORT, "-o", tmp_path / "out", *DATA, code=75)
    assert "stopped by SIGTERM: nothing was written" in line
    assert list(tmp_path.iterdir()) == []


def test_an_export_replaces_its_own_folder_and_refuses_anothers(world, tmp_path):
    out = shutil.copytree("exported", tmp_path / "out")
    call_ok(*EXPORT, "-o", out, *DATA)
    assert json.loads((out / "card.json").read_bytes())["check"]["frames"] == "4 clips of standard of before"
    (out / "diary.txt").write_text("mine")
    assert "holds diary.txt, which no export wrote" in refused(*EXPORT, "-o", out)
    assert (out / "diary.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_is_an_export_by_what_its_card_says_not_by_the_names_of_its_files(world, tmp_path):
    made = {name: tmp_path / name for name in ("card", "model", "changed", "named")}
    made["named"].mkdir()
    (made["named"] / "model.onnx").write_bytes(b"another's")
    for name in ("card", "model", "changed"):
        shutil.copytree("exported", made[name])
    (made["card"] / "card.json").write_text('{"schema": "mmkd-export-1", "files": {"model.onnx": ""}}')
    (made["model"] / "card.json").unlink()
    (made["changed"] / "model.onnx").write_bytes(b"changed")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for name, said in (
        ("named", "no export"),
        ("card", "no export"),
        ("model", "no export"),
        ("changed", "changed"),
    ):
        assert said in refused(*EXPORT, "-o", made[name])
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert "is no export of" in refused(*EXPORT, "-o", "run")
    assert "the folder that you are in" in refused(*EXPORT, "-o", ".")


class KilledError(BaseException):
    """What stands for SIGKILL: nothing of the writer runs after it."""


@pytest.mark.parametrize("moment", range(3))
def test_a_kill_at_any_rename_loses_neither_the_old_export_nor_the_new_one(tmp_path, monkeypatch, moment):
    out = tmp_path / "out"
    folder.write_folder(out, {"number": 1}, {"model.onnx": b"old"})
    real, calls = Path.rename, []

    def rename(path, target):
        calls.append(target)
        if len(calls) > moment:
            raise KilledError
        return real(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        patch.setattr(folder, "recover", lambda out: None)
        patch.setattr(shutil, "rmtree", lambda *arguments, **options: None)
        if moment < 2:
            with pytest.raises(KilledError):
                folder.write_folder(out, {"number": 2}, {"model.onnx": b"new"})
        else:
            folder.write_folder(out, {"number": 2}, {"model.onnx": b"new"})
    folder.recover(out)
    assert (out / "model.onnx").read_bytes() == (b"old" if moment < 2 else b"new")
    folder.refuse_foreign(out)
    folder.write_folder(out, {"number": 3}, {"model.onnx": b"third"})
    assert (out / "model.onnx").read_bytes() == b"third"
    assert list(tmp_path.glob("*.old")) == []


def test_a_rename_that_the_disk_refuses_puts_the_old_export_back(tmp_path, monkeypatch):
    out = tmp_path / "out"
    folder.write_folder(out, {}, {"model.onnx": b"old"})
    real = Path.rename

    def rename(path, target):
        if path.suffix == ".tmp":
            raise OSError(28, "No space left on device")
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(StorageError, match="free some space"):
        folder.write_folder(out, {}, {"model.onnx": b"new"})
    assert (out / "model.onnx").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_without_the_packages_of_onnx_export_names_the_extra(world, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for name in ("onnx", "both"):
        line = refused(*EXPORT, "-o", tmp_path / "out", "--format", name)
        assert "pip install 'mmkd[export]'" in line
    assert not Path(tmp_path / "out").exists()


def student_of(network, *, frames=8, size_px=32, heads=None):
    """A student of an untrained network for RGB views."""
    heads = heads or {"verb": list("abcd"), "noun": list("xyz")}
    policy = ViewPolicy(frames=frames, size_px=size_px)
    return TrainedStudent(network.eval(), policy, heads, torch.device("cpu"))


def test_a_model_above_2_gib_is_refused_before_any_work():
    with torch.device("meta"):
        network = nn.Linear(2**15, 2**14, bias=False)  # 2 GiB that take no memory
    with pytest.raises(InputError, match=r"2\.00 GiB of parameters, and an ONNX file holds less than 2 GiB"):
        refuse_large(student_of(network))


def test_a_student_that_is_too_large_for_a_file_is_one_line(world, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file, "MOST_BYTES", 1000)
    assert "GiB of parameters" in refused(*EXPORT, "-o", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


class Branching(nn.Module):
    """A network that looks at a value, which no graph can hold."""

    def forward(self, clips):
        logits = clips.mean((1, 2, 3, 4))[:, None].expand(-1, 4)
        return {"action": logits if float(logits.sum()) > 0 else -logits}


def test_a_network_that_cannot_be_exported_is_one_line():
    student = student_of(VideoClassifier(Branching(), "rgb"), heads={"action": list("abcd")})
    with pytest.raises(InputError, match=r"this network cannot be exported: torch\.export says") as raised:
        exported_program(student)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 500


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_of_the_table_exports_with_the_same_logits(name):
    entry = NETWORKS[name]
    shape = {"frames": entry.frames, "size_px": entry.size_px}
    heads = {"verb": list("abcd"), "noun": list("xyz")}
    sizes = {head: len(classes) for head, classes in heads.items()}
    student = student_of(
        build_network(TrainRecipe(network=name), heads=sizes, modality="rgb", **shape), heads=heads, **shape
    )
    program, frames = exported_program(student), list(noisy_views(student))[:1]
    for runner, file in (
        (onnx_runner, onnx_bytes(student, program, {})),
        (pt2_runner, pt2_bytes(program, {"classes": heads})),
    ):
        found = check(runner(file, student), student, frames, what=name)
        assert found.largest < 1e-4
        assert found.top1 == 1
