"""What the commands say: commands, options and recipe keys that a text names exist, and one clip is `1 clip`."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from mmkd.cache_tools.recipes.faults import leaf_paths
from mmkd.data_manifests.counted import ARE, counted
from mmkd.pipeline.recipe import TeacherRecipe
from mmkd.student.recipes.student import StudentRecipe
from tests.helpers.command_lines import ALL, options_of
from tests.helpers.places import ROOT

FOLDERS = ("data_manifests", "cache_tools", "student", "pipeline")
SOURCES = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("**/*.py"))]
RECIPES = sorted((ROOT / "data_manifests").glob("**/*.yaml"))
COMMAND = re.compile(r"mmkd-(?:cache|student)(?: [a-z-]+)*")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
SETTING = re.compile(r"--set ([a-z_.]+)=(?!value)")
OF_OTHERS = {
    *("--signal", "--requeue", "--array", "--ntasks", "--nproc-per-node", "--standalone"),
    *(
        "--open-mode",
        "--parsable",
        "--jobs",
        "--dependency",
        "--kill-on-bad-exit",
        "--cpus-per-task",
        "--constraint",
    ),
    *("--force-reinstall", "--gpu-architecture", "--std", "--fmad"),
}
"""Options of programs that are not ours: sbatch, torchrun, pip, nvrtc."""
HOLE = "1"
"""What stands for a value in a text."""
COUNTED = (
    "clips|views|shards|videos|rows|tasks|objects|splits|steps|experts|frames|records|classes|files|heads|runs"
)


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Yield every text of a source file with its line: constants, and f-strings with a hole for each value."""
    tree = ast.parse(path.read_text())
    inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [str(part.value) if isinstance(part, ast.Constant) else HOLE for part in node.values]
            yield node.lineno, "".join(parts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner:
            yield node.lineno, node.value


ALL_TEXTS = [
    (f"{path.relative_to(ROOT)}:{line}", " ".join(text.replace("\\\n", " ").split()))
    for path in SOURCES
    for line, text in texts(path)
] + [
    (f"{path.relative_to(ROOT)}:{n}", line)
    for path in RECIPES
    for n, line in enumerate(path.read_text().splitlines(), 1)
]
WITH_COMMANDS = [(place, text) for place, text in ALL_TEXTS if COMMAND.search(text)]


def named_command(text: str) -> str | None:
    """Return the longest command at the start of `mmkd-cache some words`, None where there is no such command."""
    words = text.split()
    found = [" ".join(words[:count]) for count in range(len(words), 0, -1)]
    return next((name for name in found if name in ALL), None)


def faults_of(text: str) -> Iterator[str]:
    """Yield what is wrong with the commands in a text."""
    for found in COMMAND.finditer(text):
        if named_command(found[0]) is None:
            yield found[0]
    for quoted in re.findall(r"`(mmkd-(?:cache|student)[^`]*)`", text):
        name = named_command(COMMAND.match(quoted)[0])
        if name is None:
            continue  # said above
        rest = quoted[len(name) :].split()
        if isinstance(ALL[name], click.Group) and rest and rest[0][0].islower():
            yield f"{quoted}: {name} has no command {rest[0]}"
        if unknown := set(OPTION.findall(quoted)) - options_of(ALL[name]):
            yield f"{quoted}: {name} has no {unknown}"


def test_every_command_that_a_text_names_exists():
    assert len(WITH_COMMANDS) > 50
    assert [f"{place}: {fault}" for place, text in WITH_COMMANDS for fault in faults_of(text)] == []


@pytest.mark.parametrize("text", ["`mmkd-cache buidl`", "`mmkd-cache verify CACHE --mend`"])
def test_a_command_that_does_not_exist_is_noticed(text):
    assert list(faults_of(text))


def test_every_option_that_a_text_names_is_one_of_a_command_s():
    known = set().union(*(options_of(command) for command in ALL.values())) | OF_OTHERS
    named = [(place, option) for place, text in ALL_TEXTS for option in OPTION.findall(text)]
    assert len(named) > 100
    assert [pair for pair in named if pair[1] not in known] == []


def test_every_recipe_key_that_a_text_sets_is_one():
    keys = {".".join(path) for model in (TeacherRecipe, StudentRecipe) for path in leaf_paths(model)}
    known = [re.compile(re.escape(key).replace("<name>", r"\w+")) for key in keys]
    named = [(place, key) for place, text in ALL_TEXTS for key in SETTING.findall(text)]
    assert named
    assert [pair for pair in named if not any(key.fullmatch(pair[1]) for key in known)] == []


def test_one_thing_is_not_called_many():
    assert [counted(count, "clip") for count in (0, 1, 2)] == ["0 clips", "1 clip", "2 clips"]
    assert [counted(count, "class", ARE) for count in (1, 2)] == ["1 class is", "2 classes are"]
    after_a_value = re.compile(rf"\s({COUNTED})\b")
    faults = []
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        bugs = [
            node for node in ast.walk(tree) if isinstance(node, ast.Raise) and "ValueError" in ast.unparse(node)
        ]
        unseen = {id(part) for node in bugs for part in ast.walk(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr) and id(node) not in unseen:
                for value, then in zip(node.values, node.values[1:], strict=False):
                    bare = isinstance(value, ast.FormattedValue) and value.format_spec is None
                    named = ast.unparse(value.value).endswith(".name") if bare else False
                    if bare and not named and after_a_value.match(str(getattr(then, "value", ""))):
                        faults.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(value)}{then.value}")
    assert faults == []
