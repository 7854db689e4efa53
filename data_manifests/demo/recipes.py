"""The recipes that come with the demo data set, copied beside it."""

from importlib.resources import files
from pathlib import Path

RECIPES = {"demo-teacher.yaml": "teacher.yaml", "demo-student.yaml": "student.yaml"}
"""Name in the package -> name in the demo's directory."""


def write_recipes(directory: Path) -> None:
    """Write teacher.yaml and student.yaml into `directory`; recipes that are there, perhaps edited, stay."""
    for source, name in RECIPES.items():
        target = directory / name
        if not target.exists():
            target.write_bytes((files("mmkd.data_manifests") / "recipe-files" / source).read_bytes())
