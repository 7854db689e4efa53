"""What the READMEs show exists and works."""

import re

import pytest

from tests.helpers.command_lines import parse
from tests.helpers.file_tree import FOLDERS, with_tree
from tests.helpers.places import ROOT

READMES = ("README.md", *(f"{folder}/README.md" for folder in FOLDERS))
MOST_LINES = 160
"""Of the first README: a newcomer reads it whole."""


def text_of(readme: str) -> str:
    return (ROOT / readme).read_text(encoding="utf-8")


def shown_commands(readme: str) -> list[str]:
    blocks = re.findall(r"```(?:bash)?\n(.*?)```", text_of(readme), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    lines = [re.sub(r"\$[A-Z_]+", "0", line) for line in lines]  # as a shell would fill in
    return [line.split(" > ")[0].split(" # ")[0].rstrip("& ") for line in lines if line.startswith("mmkd-")]


@pytest.mark.parametrize("line", sorted({line for readme in READMES for line in shown_commands(readme)}))
def test_every_command_in_a_readme_has_the_options_it_shows(line):
    parse(line)


@pytest.mark.parametrize(("readme", "count"), [*zip(READMES, (12, 4, 10, 4, 3), strict=True)])
def test_there_are_commands_to_check(readme, count):
    assert len(shown_commands(readme)) >= count


def test_the_first_readme_is_short():
    assert text_of("README.md").count("\n") <= MOST_LINES


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_file_tree_is_true_for_every_file(folder):
    readme = text_of(f"{folder}/README.md")
    assert readme == with_tree(readme, ROOT / folder), "`python -m tests.helpers.file_tree` writes the trees"


@pytest.mark.parametrize("readme", [*READMES, "CONTRIBUTING.md", "tests/README.md"])
def test_every_linked_or_named_file_exists(readme):
    text = re.sub(r"```.*?```", "", text_of(readme), flags=re.DOTALL)
    linked = [target for target in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in target]
    named = re.findall(r"(?:python|pytest|sh) (tests/[\w/.]+)", text)
    there = {target: ((ROOT / readme).parent / target).exists() for target in linked}
    there |= {name: (ROOT / name).exists() for name in named}
    assert [name for name, found in there.items() if not found] == []


def test_every_test_that_the_student_s_readme_names_is_there():
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", text_of("student/README.md"))
    assert len(named) > 30
    sources = {file: (ROOT / "tests" / "student" / file).read_text() for file, _ in named}
    assert [name for file, name in named if f"def {name}(" not in sources[file]] == []
