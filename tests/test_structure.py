"""The architecture that the folder list promises: who imports whom, and what is installed."""

import ast
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.places import ROOT

CHAIN = ("data_manifests", "cache_tools", "student", "pipeline")
"""Each may import from itself and from those before it."""
TORCH_FREE = ("data_manifests", "cache_tools")
"""Decoding workers and configuration errors load these: they must start fast."""
ORDER = (
    "data_manifests pipeline/tvl1",
    "data_manifests/demo data_manifests/published cache_tools/layout",
    "cache_tools/process cache_tools/recipes cache_tools/storage student/network_table",
    "cache_tools/frames cache_tools/cluster student/checkpoints",
    "cache_tools/views student/key_maps",
    "student/recipes",
    "student/augment",
    "cache_tools/cache student/networks pipeline/recipe pipeline/missing",
    "cache_tools/tasks student/data student/teacher",
    "cache_tools/upkeep student/loss",
    "student/training",
    "student/evaluation",
    "student/looking student/prediction student/submit",
    "student/distil student/export student/notebook student/weighing",
    "pipeline/flow pipeline/audio pipeline/detections",
    "student/cli pipeline/flow_command pipeline/inputs pipeline/pack",
    "pipeline/experts pipeline/detecting",
    "pipeline/build pipeline/imports",
    "pipeline/forecast pipeline/drift",
    "pipeline/commands",
    "pipeline/cli",
)
"""Rooms (folders, and the modules that lie beside them); each imports from itself and from the rows above it."""
FLOOR = {room: floor for floor, row in enumerate(ORDER) for room in row.split()}
MOST_MODULES = 14
MOST_LINES = 500


def source_files() -> Iterator[Path]:
    """Every module of the four folders, relative to the root."""
    for package in CHAIN:
        files = sorted((ROOT / package).rglob("*.py"))
        assert files
        yield from (path.relative_to(ROOT) for path in files)


def imported_modules(path: Path) -> set[str]:
    """The modules that a file imports, as dotted names: a.b of `from a import b` where that is a module, else a."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in inner if place(name)}
            found |= modules or {node.module or ""}
    return found


def place(module: str) -> Path | None:
    """The file of one of our modules, relative to the root; None for what is not one."""
    parts = module.split(".")
    if parts[0] != "mmkd" or len(parts) == 1:
        return None
    path = Path(*parts[1:])
    found = [file for file in (path.with_suffix(".py"), path / "__init__.py") if (ROOT / file).is_file()]
    return found[0] if found else None


def room(path: Path) -> str:
    """The room that a module stands in."""
    itself = str(path.with_suffix(""))
    return itself if itself in FLOOR else str(path.parent)


@pytest.mark.parametrize("package", CHAIN)
def test_imports_follow_the_chain(package):
    allowed = CHAIN[: CHAIN.index(package) + 1]
    for path in source_files():
        if path.parts[0] != package:
            continue
        for module in imported_modules(path):
            if module.startswith("mmkd."):
                assert module.split(".")[1] in allowed, f"{path} imports {module}"
            assert module.split(".")[0] not in CHAIN, f"{path} imports {module} without mmkd."
            if package in TORCH_FREE:
                assert module.split(".")[0] not in ("torch", "torchvision"), f"{path} imports {module}"


def test_every_room_imports_only_from_the_rows_above_it():
    upward = [
        f"{path} ({room(path)}) imports {module} ({room(other)})"
        for path in source_files()
        if path.name != "__init__.py" or room(path) in FLOOR
        for module in imported_modules(path)
        if (other := place(module)) is not None
        and room(other) != room(path)
        and FLOOR[room(other)] >= FLOOR[room(path)]
    ]
    assert not upward, "\n".join(upward)


def test_no_room_is_missing_from_the_order_or_gone():
    rooms = {room(path) for path in source_files() if path.name != "__init__.py"}
    assert rooms == set(FLOOR)


def test_every_folder_of_modules_is_installed():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    on_disk = {"mmkd." + ".".join(path.parent.parts) for path in source_files()}
    assert sorted(settings["packages"]) == sorted(on_disk)
    assert settings["package-dir"] == {f"mmkd.{package}": package for package in CHAIN}
    without_init = {
        str(path.parent) for path in source_files() if not (ROOT / path.parent / "__init__.py").is_file()
    }
    assert not without_init


def test_no_folder_holds_more_than_14_modules():
    counts = Counter(str(path.parent) for path in source_files() if path.name != "__init__.py")
    assert {folder: count for folder, count in counts.items() if count > MOST_MODULES} == {}


def test_no_file_is_longer_than_500_lines():
    lines = {str(path): (ROOT / path).read_text().count("\n") for path in source_files()}
    assert {path: count for path, count in lines.items() if count > MOST_LINES} == {}
