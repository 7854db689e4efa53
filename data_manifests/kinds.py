"""What a file or folder is that was given in the place of another: recognised by its first bytes and its names."""

import re
from pathlib import Path

from mmkd.data_manifests.errors import InputError

HEAD_BYTES = 4096
FOLDERS = {
    "init.json": "a cache, which --cache takes",
    "expert.json": "an expert of `mmkd-cache teach`, which --expert takes",
    "run.json": "a run of `mmkd-student train`, which --run and `mmkd-student evaluate` take",
}
"""A name in a folder -> what the folder is."""
MANIFEST = "a manifest, which --manifest takes"
WEIGHTS = "a weights file of `mmkd-cache weigh`, which `mmkd-student train --weights` takes"
TABLE = "a table of `mmkd-student compare --out`, which --tables takes"
SCHEMAS = {
    "mmkd-manifest": MANIFEST,
    "mmkd-weights": WEIGHTS,
    "mmkd-cache": "a file of a cache, whose folder --cache takes",
    "mmkd-expert": "the card of an expert, whose folder --expert takes",
    "mmkd-run": "the record of a run, whose folder --run and `mmkd-student evaluate` take",
    "mmkd-table": TABLE,
}
"""Start of the first `schema` in a file -> what the file is."""
HDF5 = "an HDF5 file; of one that `mmkd-cache export` wrote, `mmkd-cache import FILE -o CACHE` makes a cache again"
SPLIT_FILE = "a split file of Something-Something; `mmkd-cache manifest something-something` makes a manifest of it"
LABELS = "a list of classes and their numbers, which `mmkd-cache manifest something-something --labels` takes"
BOXES = "box annotations, which --boxes takes"
TEACHER_RECIPE = "a teacher's recipe, which `mmkd-cache` takes with -c"
STUDENT_RECIPE = "a student's recipe, which `mmkd-student` takes with -c"
PER_CLASS = "a table of classes that `mmkd-student evaluate --per-class` wrote"
PER_CLASS_COLUMNS = ("split", "head", "class", "name", "clips", "top1", "top5")
PREDICTIONS = "a table of predictions that `mmkd-student predict --csv` wrote"
PREDICTION_COLUMNS = ("video", "start_seconds", "end_seconds", "head", "rank", "class", "probability", "logit")
CURVES = "a picture that `mmkd-student show` drew"
CURVES_MARK = "mmkd-student show"
"""Stands in a picture of ours, as the software that made it."""
CURVE_NUMBERS = "a table of epochs that `mmkd-student show --csv` wrote"
CURVE_COLUMNS = ("run", "epoch", "steps", "loss", "learning_rate", "clips_per_second")
"""Those that it has at least, and first."""
SUBMISSION = "a submission that `mmkd-student submission` wrote"
SUBMISSION_ENTRY = "test.json"
RECIPES = {
    **dict.fromkeys(("experts", "build", "flow", "boxes", "held_out"), TEACHER_RECIPE),
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
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return CURVES if CURVES_MARK.encode() in head else None
    if head.startswith(b"PK\x03\x04"):  # ZIP: its first entry's name stands behind 30 bytes
        return SUBMISSION if head[30:].startswith(SUBMISSION_ENTRY.encode()) else None
    # replace: the bytes that were read may end in the middle of a character.
    return _kind_of_text(path, head.decode("utf-8-sig", "replace"))


def it_is(path: Path) -> str:
    """Return `; it is …` for the end of an error about a file that is not what was asked for, or nothing."""
    kind = what_is(path)
    return f"; it is {kind}" if kind else ""


def refuse_another(out: Path, kind: str, option: str = "-o") -> None:
    """Raise InputError where something lies at `out` that is not of the kind to be written there.

    What mmkd did not write is its owner's, and is never replaced; an empty file, as of `mktemp`, holds nothing.
    """
    if out.is_file() and out.stat().st_size == 0:
        return
    if out.exists() and what_is(out) != kind:
        raise InputError(
            f"{out} is there, and is not {kind.split(',')[0]}{it_is(out)}; name another file with {option}"
        )


def _kind_of_text(path: Path, head: str) -> str | None:
    if head.splitlines()[:1] == [",".join(PER_CLASS_COLUMNS)]:
        return PER_CLASS
    if head.splitlines()[:1] == [",".join(PREDICTION_COLUMNS)]:
        return PREDICTIONS
    if head.startswith(",".join(CURVE_COLUMNS)):
        return CURVE_NUMBERS
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
