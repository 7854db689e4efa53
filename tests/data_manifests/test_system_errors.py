"""An input that the disk or the network does not give is the machine's fault (74), and not a wrong input (2)."""

import errno
import io
import os

import pytest

from mmkd.cache_tools.recipes.yaml_text import read_recipe_file
from mmkd.data_manifests.errors import InputError, StorageError
from mmkd.data_manifests.json_file import read_json
from mmkd.data_manifests.manifest_file import load_manifest
from mmkd.pipeline.detections.json_members import iterate_members

READERS = [load_manifest, read_json, read_recipe_file, lambda path: list(iterate_members(path))]


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_a_fault_of_the_machine_is_told_from_a_wrong_input(tmp_path, monkeypatch, read, number):
    path = tmp_path / "input"
    path.write_text("{}")

    def fail(*_, **__):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(io, "open", fail)
    with pytest.raises(StorageError, match=f"cannot read .*{os.strerror(number)}"):
        read(path)


@pytest.mark.parametrize("read", READERS)
def test_an_input_that_is_not_there_is_a_wrong_input(tmp_path, read):
    with pytest.raises(InputError, match=r"cannot read .*No such file"):
        read(tmp_path / "absent")
