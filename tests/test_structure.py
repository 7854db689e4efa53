"""The architecture that the folder list promises: who imports whom, and what is installed."""

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CHAIN = ("data_manifests", "cache_tools", "student", "pipeline")
"""Each may import from itself and from those before it."""
TORCH_FREE = ("data_manifests", "cache_tools")
"""Decoding workers and configuration errors load these: they must start fast."""


def imported_modules(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("package", CHAIN)
def test_imports_follow_the_chain(package):
    allowed = CHAIN[: CHAIN.index(package) + 1]
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        for module in imported_modules(path):
            if module.startswith("mmkd."):
                assert module.split(".")[1] in allowed, f"{path.name} imports {module}"
            assert module.split(".")[0] not in CHAIN, f"{path.name} imports {module} without mmkd."
            if package in TORCH_FREE:
                assert module.split(".")[0] not in ("torch", "torchvision"), f"{path.name} imports {module}"


def test_the_package_list_is_what_lies_on_disk():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    on_disk = {f"mmkd.{path.parent.name}": path.parent.name for path in ROOT.glob("*/__init__.py")}
    del_tests = {name: folder for name, folder in on_disk.items() if folder != "tests"}
    assert settings["package-dir"] == del_tests
    assert sorted(settings["packages"]) == sorted(del_tests)
    assert not list(ROOT.glob("*/*/__init__.py")), "a sub-package would not be installed"


def test_no_file_is_longer_than_500_lines():
    long = {
        str(path.relative_to(ROOT)): lines
        for package in CHAIN
        for path in (ROOT / package).rglob("*.py")
        if (lines := path.read_text().count("\n")) > 500
    }
    assert not long
