"""A student as an ONNX file: the same logits as the student's, and enough in it to name a class."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from mmkd.cache_tools.views.drawing import ViewPolicy
from mmkd.data_manifests.errors import VerificationError
from mmkd.student.evaluation.trained import TrainedStudent, load_student
from mmkd.student.export.check import check_onnx, made_frames
from mmkd.student.export.onnx_file import onnx_bytes
from mmkd.student.networks.networks import build_network
from mmkd.student.recipes.train import TrainRecipe
from tests.helpers.in_process import call_ok, refused
from tests.helpers.places import unpack_before

TRAIN = ("mmkd-student", "train", "-c", "student.yaml", "--cache", "cache", "--node-copies", "copies", "-o", "run")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with a trained `run` and its `exported` files."""
    root = unpack_before(tmp_path_factory.mktemp("export"))
    shutil.rmtree(root / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        call_ok(*TRAIN, "--weights", "rgb=1,boxes=3")
        call_ok("mmkd-student", "export", "run", "-o", "exported")
    return root


def test_from_the_onnx_file_alone_the_students_class_of_a_clip_comes_out_by_name(exported):
    student = load_student(exported / "run")
    frames = np.random.default_rng(5).integers(0, 256, made_frames(student).shape, dtype=np.uint8)[:1]
    session = onnxruntime.InferenceSession(exported / "exported" / "model.onnx", providers=["CPUExecutionProvider"])
    told = json.loads(session.get_modelmeta().custom_metadata_map["mmkd"])
    (logits,) = session.run(["action"], {"frames": frames})
    wanted = student.logits(frames)["action"]
    np.testing.assert_allclose(logits, wanted, atol=1e-4)
    assert told["classes"] == student.heads
    assert told["classes"]["action"][logits[0].argmax()] == student.heads["action"][wanted[0].argmax()]
    assert (told["views"]["frames"], told["views"]["size_px"]) == (student.policy.frames, student.policy.size_px)


def test_a_file_whose_weights_are_not_the_students_is_refused(exported):
    student = load_student(exported / "run")
    model = onnx.load(exported / "exported" / "model.onnx")
    bias = next(value for value in model.graph.initializer if value.name.endswith("heads.action.bias"))
    bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + 0.1, bias.name))
    with pytest.raises(VerificationError, match=r"differ from the student's by up to 0\.1"):
        check_onnx(model.SerializeToString(), student, made_frames(student))


def test_an_export_replaces_its_own_folder_and_refuses_anothers(exported, tmp_path, monkeypatch):
    monkeypatch.chdir(exported)
    out = shutil.copytree("exported", tmp_path / "out")
    (out / "labels.json").write_text("old")
    call_ok("mmkd-student", "export", "run", "-o", out)
    assert json.loads((out / "labels.json").read_bytes())["check"]["clips"] == 3
    (out / "diary.txt").write_text("mine")
    assert "holds diary.txt" in refused("mmkd-student", "export", "run", "-o", out)
    assert (out / "diary.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_without_its_packages_export_names_the_extra(exported, tmp_path, monkeypatch):
    monkeypatch.chdir(exported)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    line = refused("mmkd-student", "export", "run", "-o", tmp_path / "out")
    assert "pip install 'mmkd[export]'" in line
    assert not Path(tmp_path / "out").exists()


def test_a_residual_network_of_torchvision_exports_with_the_same_logits():
    recipe = TrainRecipe(network="r3d_18")
    network = build_network(recipe, heads={"verb": 4, "noun": 3}, modality="rgb", frames=8, size_px=32).eval()
    student = TrainedStudent(
        network, ViewPolicy(frames=8, size_px=32), {"verb": list("abcd"), "noun": list("xyz")}, torch.device("cpu")
    )
    found = check_onnx(onnx_bytes(student, {}), student, made_frames(student))
    assert found.largest < 1e-4
    assert found.top1 == 1
