"""What a file or folder is that was given in the place of another: recognised by its first bytes and its names."""

import re
from pathlib import Path

HEAD_BYTES = 4096
FOLDERS = {
    "init.json": "a cache, which --cache takes",
    "expert.json": "an expert of `mmkd-cache teach`, which --expert takes",
    "run.json": "a run of `mmkd-student train`, which --run and `mmkd-student evaluate` take",
}
"""A name in a folder -> what the folder is."""
MANIFEST = "a manifest, which --manifest takes"
SCHEMAS = {
    "mmkd-manifest": MANIFEST,
    "mmkd-weights": "a weights file of `mmkd-cache weigh`, which `mmkd-student train --weights` takes",
    "mmkd-cache": "a file of a cache, whose folder --cache takes",
    "mmkd-expert": "the card of an expert, whose folder --expert takes",
    "mmkd-run": "the record of a run, whose folder --run and `mmkd-student evaluate` take",
    "mmkd-table": "a table of `mmkd-student compare --out`, which --tables takes",
}
"""Start of the first `schema` in a file -> what the file is."""
HDF5 = "an HDF5 file; of one that `mmkd-cache export` wrote, `mmkd-cache import FILE -o CACHE` makes a cache again"
SPLIT_FILE = "a split file of Something-Something; `mmkd-cache manifest something-something` makes a manifest of it"
LABELS = "a list of classes and their numbers, which `mmkd-cache manifest something-something --labels` takes"
BOXES = "box annotations, which --boxes takes"
TEACHER_RECIPE = "a teacher's recipe, which `mmkd-cache` takes with -c"
STUDENT_RECIPE = "a student's recipe, which `mmkd-student` takes with -c"
RECIPES = {
    **dict.fromkeys(("experts", "build", "views", "flow", "boxes", "held_out"), TEACHER_RECIPE),
    **dict.fromkeys(("loss", "teacher", "train", "thumbprint_sample"), STUDENT_RECIPE),
}
"""A key at the top of a recipe -> whose recipe it is."""


def what_is(path: Path) -> str | None:
    """Return what lies at `path`, as the end of a sentence; None where it is nothing that is known."""
    try:
        if path.is_dir():
            return next((kind for name, kind in FOLDERS.items() if (path / name).is_file()), None)
        if not path.is_file():
            return None
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError:
        return None
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        return HDF5
    # replace: the bytes that were read may end in the middle of a character.
    return _kind_of_text(path, head.decode("utf-8-sig", "replace"))


def it_is(path: Path) -> str:
    """Return `; it is …` for the end of an error about a file that is not what was asked for, or nothing."""
    kind = what_is(path)
    return f"; it is {kind}" if kind else ""


def _kind_of_text(path: Path, head: str) -> str | None:
    schema = re.search(r'"schema"\s*:\s*"([a-z-]+)-\d', head)
    if schema and schema[1] in SCHEMAS:
        return SCHEMAS[schema[1]]
    if head.lstrip()[:1] in ("[", "{"):
        return _kind_of_json(path, head)
    keys = re.findall(r"^([a-z_]+):", head, re.MULTILINE)
    return next((RECIPES[key] for key in keys if key in RECIPES), None)


def _kind_of_json(path: Path, head: str) -> str | None:
    """Tell published annotations by their first element, since the files may be large."""
    if re.match(r'\s*\[\s*\{[^{}]*"(template|label|id)"', head):
        return SPLIT_FILE
    if re.match(r'\s*\{\s*"[^"]+"\s*:\s*"?\d+"?\s*[,}]', head):
        return LABELS
    if re.match(r'\s*\{\s*"[^"]+"\s*:\s*\[\s*\{', head):
        return BOXES
    return None
