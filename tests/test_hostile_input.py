"""Recipes and weights files that say anything at all: one line that names the place, before memory is filled."""

import io
import pickle
import random

import pytest
import torch

from mmkd.cache_tools.recipes.recipe import load_recipe
from mmkd.data_manifests.errors import InputError
from mmkd.pipeline.recipe import TeacherRecipe
from mmkd.student.checkpoints.checkpoint_file import read_state

DATA = ("data.manifest=m.jsonl", "data.videos=v")


@pytest.mark.parametrize(
    "text",
    [
        'data: {manifest: "a\\0b", videos: v}',
        'data: {manifest: m, videos: "a\\ud800"}',
        'boxes: {files: [a, "\\0"]}',
    ],
)
def test_text_that_no_name_can_hold_is_refused_with_its_line(tmp_path, text):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(InputError, match=r"r\.yaml:1: .* holds a character that no name can have"):
        load_recipe(TeacherRecipe, files=[tmp_path / "r.yaml"], environ={})


def test_a_folder_whose_name_is_not_utf_8_is_accepted():
    recipe = load_recipe(TeacherRecipe, overrides=DATA, named={"data.videos": "v\udcff"}, environ={})
    assert str(recipe.data.videos) == "v\udcff"


@pytest.mark.parametrize("text", ["{a: " * 1000 + "1" + "}" * 1000, "[" * 1000 + "]" * 1000])
def test_a_recipe_nested_without_end_is_refused(tmp_path, text):
    (tmp_path / "r.yaml").write_text(f"views: {text}")
    with pytest.raises(InputError, match=r"r\.yaml: not valid YAML") as caught:
        load_recipe(TeacherRecipe, files=[tmp_path / "r.yaml"], environ={})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "override",
    [
        *(f"experts.a.layout.{name}=1000000000" for name in ("hidden", "attention_heads", "spatial_layers")),
        *(f"experts.a.train.{name}=1000000000" for name in ("epochs", "batch_size", "loader_threads")),
        *(f"views.{name}=1000000000" for name in ("frames", "size_px", "stride")),
        *(f"build.{name}=1000000000" for name in ("views", "shard_rows", "batch_views")),
        "build.splits=[train, train]",
    ],
)
def test_a_size_that_no_machine_holds_is_refused_before_anything_is_made(override):
    with pytest.raises(InputError, match=override.split("=")[0].rpartition(".")[2]):
        load_recipe(TeacherRecipe, overrides=(*DATA, "experts.a.modality=boxes", override), environ={})


def torch_file(value) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"some text\n",
        pickle.dumps({"a": [1, 2]}, protocol=2),
        torch_file({1: torch.zeros(2)}),
        torch_file({"a": torch.zeros(2).to_sparse()}),
        torch_file([torch.zeros(2)]),
    ],
)
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_a_file_that_holds_no_parameters_is_refused_by_name(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=name) as caught:
        read_state(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_mutated_pickle_is_read_or_refused_by_name(tmp_path):
    draw = random.Random(0)
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(2), "b": {"c": torch.ones(1)}}, buffer, _use_new_zipfile_serialization=False)
    whole, path = buffer.getvalue(), tmp_path / "w.pth"
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(data[: draw.randint(len(data) // 2, len(data))])
        try:
            read_state(path)
        except InputError as error:
            assert str(path) in str(error)  # noqa: PT017  either is right
