"""What the README shows exists and works."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from mmkd.data_manifests.manifest_file import load_manifest
from tests.helpers.command_lines import parse
from tests.helpers.places import DATA, ROOT, needs_data

README = (ROOT / "README.md").read_text()
EPIC = DATA / "epic100"


def shown_commands() -> list[str]:
    blocks = re.findall(r"```(?:bash)?\n(.*?)```", README, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    lines = [re.sub(r"\$[A-Z_]+", "0", line) for line in lines]  # as a shell would fill in
    return [line.split(" > ")[0].split(" # ")[0].rstrip("& ") for line in lines if line.startswith("mmkd-")]


@pytest.mark.parametrize("line", shown_commands())
def test_every_command_in_the_readme_has_the_options_it_shows(line):
    parse(line)


def test_there_are_commands_to_check():
    assert len(shown_commands()) > 10


def test_the_file_tree_names_every_module_of_a_listed_kind():
    tree = README[README.index("## File tree") :]
    for line in re.findall(r"^  ([\w.*, /]+?)  ", tree, re.MULTILINE):
        for name in line.split(","):
            found = [path for folder in PROGRAM_FOLDERS for path in (ROOT / folder).glob(name.strip().rstrip("/"))]
            assert found, f"the README's file tree names {name.strip()!r}, which is not there"


PROGRAM_FOLDERS = ("data_manifests", "cache_tools", "student", "pipeline", "tests")


@needs_data
def test_the_epic_example_makes_a_manifest(tmp_path):
    for path in EPIC.glob("*.csv"):
        shutil.copy(path, tmp_path / path.name)
    for split in ("train", "validation"):
        text = (EPIC / "EPIC_100_validation_first800.csv").read_text().replace("\nP", f"\n{split[0]}P")
        (tmp_path / f"EPIC_100_{split}.csv").write_text(text)
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    environment = {**os.environ, "PYTHONWARNINGS": "error"}
    subprocess.run([sys.executable, "-c", example], cwd=tmp_path, check=True, env=environment)
    made = load_manifest(tmp_path / "epic" / "manifest.jsonl")
    assert [(head.name, len(head.classes)) for head in made.heads] == [("verb", 97), ("noun", 300)]
    assert len(made.split("train")) == len(made.split("validation")) == 800
    first = made.split("validation")[0]
    assert (first.video, first.start_seconds, first.end_seconds) == ("P01_11.MP4", 0.0, 1.89)
