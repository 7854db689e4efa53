"""The lines for a notebook in student's README run as they stand, and give what training and the command give."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from mmkd.data_manifests.errors import MmkdError
from mmkd.student.notebook import TaughtSplit
from mmkd.student.teacher.cached_teacher import choose_mixtures, mix_split
from tests.helpers.in_process import call_ok
from tests.helpers.places import ROOT, unpack_before


def shown_lines():
    """The block of Python below the README's heading."""
    text = (ROOT / "student/README.md").read_text(encoding="utf-8").split("\n## From Python\n")[1].split("\n## ")[0]
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return block


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder and what is defined after the README's lines have run, among the files that they name."""
    root = unpack_before(tmp_path_factory.mktemp("notebook"))
    shutil.rmtree(root / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        train = ("mmkd-student", "train", "-c", "student.yaml", "--cache", "cache", "--node-copies", "copies")
        call_ok(*train, "-o", "runs/student", "--labels-only", "--set", "train.weights=null")
        Path("ssv2").mkdir()
        Path("ssv2/cache").symlink_to(root / "cache")
        Path("ssv2/manifest.jsonl").symlink_to(root / "manifest.jsonl")
        Path("20bn-something-something-v2").symlink_to(root / "videos")
        shutil.copy(next(Path("videos").iterdir()), "clip.webm")
        found = {}
        exec(shown_lines(), found)
        found["printed"] = json.loads(
            call_ok(
                "mmkd-student", "predict", "runs/student", "clip.webm", "--device", "cpu", "--top-k", 3, "--json"
            )
        )
    return root, found


@pytest.fixture
def notebook(finished, monkeypatch):
    """What the lines defined; its folder is the current one, since their paths are relative."""
    root, found = finished
    monkeypatch.chdir(root)
    return found


def test_the_loss_of_the_notebook_is_torchs_kl_divergence_from_the_mixed_teacher(notebook):
    train, batch = notebook["train"], notebook["batch"]
    mixtures, _ = choose_mixtures(train.cache, "uniform", weights_temperature=1, train_split="train")
    teacher = mix_split(train.cache, "train", mixtures, "renormalise")
    wanted = torch.from_numpy(teacher.logits["action"][train.clips.rows[:4], 0])
    with torch.no_grad():
        logits = notebook["network"](batch.inputs)
    kl = F.kl_div((logits["action"] / 4).log_softmax(-1), (wanted / 4).softmax(-1), reduction="batchmean")
    torch.testing.assert_close(notebook["loss"].detach(), 16 * kl)
    assert np.ptp(wanted.numpy()) > 0
    of_labels = F.cross_entropy(logits["action"], batch.labels["action"])
    torch.testing.assert_close(batch.loss(logits, label_weight=1), of_labels)


def test_the_pixels_of_the_notebook_are_those_of_the_stored_views(notebook):
    train = notebook["train"]
    for row in range(4):
        np.testing.assert_array_equal(
            notebook["batch"].inputs["rgb"][row].numpy(), train.clips.data.item(row, 0)["rgb"]
        )
    assert all(value.grad is not None for value in notebook["network"].parameters()), "the loss was sent back"


def test_the_notebook_predicts_what_the_command_prints(notebook):
    (clip,) = notebook["printed"]["clips"]
    best = notebook["found"].best(0, top_k=3)["action"]
    assert [(each.name, each.logit) for each in best] == [
        (each["class"], each["logit"]) for each in clip["heads"]["action"]
    ]


def test_the_notebook_has_ten_lines():
    lines = [line for line in shown_lines().splitlines() if line]
    assert len(lines) <= 10


def test_another_manifest_is_refused_as_by_the_command(notebook, tmp_path):
    other = tmp_path / "manifest.jsonl"
    other.write_text(Path("manifest.jsonl").read_text().replace('"dataset": "before"', '"dataset": "another"', 1))
    with pytest.raises(MmkdError, match="another"):
        TaughtSplit("cache", manifest=other, videos="videos", copies=tmp_path)
