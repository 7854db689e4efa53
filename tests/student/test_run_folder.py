"""A run's folder: files of its names that no run wrote there are somebody's, and stay."""

import pytest

from mmkd.data_manifests.errors import InputError
from mmkd.pipeline.experts.teach import whole_expert
from mmkd.student.distil import refuse_other_contents


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


def test_a_teaching_does_not_write_over_weights_that_are_not_its_own(tmp_path):
    (tmp_path / "weights.safetensors").write_text("mine")
    with pytest.raises(InputError, match=r"weights.safetensors.* name another folder with -o"):
        whole_expert(tmp_path, "rgb", {})
    (tmp_path / "training" / "checkpoint-000000001").mkdir(parents=True)
    assert whole_expert(tmp_path, "rgb", {}) is None
