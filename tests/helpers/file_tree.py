"""The file tree at the end of each folder's README, made from what every module says of itself.

`python -m tests.helpers.file_tree` writes all of them; a test holds that they are up to date.
"""

import ast
import re
from pathlib import Path

FOLDERS = ("data_manifests", "cache_tools", "student", "pipeline")
ROOT = Path(__file__).resolve().parents[2]
HEADING = "## Files\n"


def summary(path: Path) -> str:
    """Return the first sentence of a module's docstring, of a C file's first comment, or of a YAML file's."""
    text = path.read_text(encoding="utf-8")
    said = ast.get_docstring(ast.parse(text)) if path.suffix == ".py" else re.sub(r"^(/\*|//|#)\s*", "", text)
    first = re.split(r"(?<=\w)[.]\s", " ".join((said or "").split("\n\n")[0].split()) + " ")[0]
    return first.strip().rstrip(".")


def tree(folder: Path) -> str:
    """Return a line per file of a folder and of the folders in it, the files first."""
    lines = []
    for path in sorted(folder.iterdir(), key=lambda path: (path.is_dir(), path.name)):
        if path.is_dir() and (path / "__init__.py").is_file():
            lines.append((f"{path.name}/", summary(path / "__init__.py")))
            lines += [(f"  {name}", text) for name, text in files(path)]
        elif path.is_dir() and path.name == "recipe-files":
            lines.append((f"{path.name}/", "Recipes that `config example` prints"))
            lines += [(f"  {inner.name}", summary(inner)) for inner in sorted(path.iterdir())]
    lines = files(folder) + lines
    width = max(len(name) for name, _ in lines) + 2
    return "".join(f"{name:{width}}{text}\n" for name, text in lines)


def files(folder: Path) -> list[tuple[str, str]]:
    """Return name and summary of the sources that lie in a folder itself."""
    wanted = {".py", ".c", ".cu"}
    found = sorted(path for path in folder.iterdir() if path.suffix in wanted and path.name != "__init__.py")
    return [(path.name, summary(path)) for path in found]


def with_tree(readme: str, folder: Path) -> str:
    """Return a README's text with its last section, the file tree, made again."""
    before = readme[: readme.index(HEADING)]
    return f"{before}{HEADING}\n```\n{tree(folder)}```\n"


def main() -> None:
    """Write every folder's tree."""
    for name in FOLDERS:
        readme = ROOT / name / "README.md"
        readme.write_text(with_tree(readme.read_text(encoding="utf-8"), ROOT / name), encoding="utf-8")


if __name__ == "__main__":
    main()
