"""Exporting a finished run into a folder of its own: the ONNX file, and what it says of itself beside it."""

import json
import shutil
import uuid
from collections.abc import Collection
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mmkd.data_manifests.atomic import storage_errors, write_synced
from mmkd.data_manifests.errors import InputError
from mmkd.student.evaluation.run_files import read_run
from mmkd.student.evaluation.trained import TrainedStudent, load_student
from mmkd.student.export.check import Agreement, check_onnx, made_frames
from mmkd.student.export.onnx_file import onnx_bytes

ONNX_FILE = "model.onnx"
LABELS_FILE = "labels.json"
OWN = {ONNX_FILE, LABELS_FILE}
"""Everything that an export's folder holds."""


def export_run(run: Path, out: Path, *, trusted: Collection[str] = ()) -> Agreement:
    """Write the student of a finished run into the folder `out`, whole or not at all; return how well it agrees.

    Raises InputError for a folder with other contents, and as `load_student`, `onnx_bytes` and `check_onnx`.
    """
    refuse_foreign(out)
    student = load_student(run, trusted=trusted)
    description = describe(run, student)
    file = onnx_bytes(student, description)
    agreement = check_onnx(file, student, made_frames(student))
    beside = {**description, "check": {**asdict(agreement), "frames": "noise, not real frames"}}
    write_folder(out, {ONNX_FILE: file, LABELS_FILE: (json.dumps(beside, indent=1) + "\n").encode()})
    return agreement


def describe(run: Path, student: TrainedStudent) -> dict[str, Any]:
    """Return what a user of the file needs to know: class names by head, views, normalisation, where it is from."""
    record, normalisation = read_run(run), student.network.normalisation
    return {
        "classes": student.heads,
        "views": student.policy.model_dump(mode="json"),
        "normalisation": {"inside": True, "mean": list(normalisation.mean), "std": list(normalisation.std)},
        "model_sha256": record.model_sha256,
        "cache": record.cache,
        "mmkd": version("mmkd"),
    }


def refuse_foreign(out: Path) -> None:
    """Raise InputError where `out` is no folder, or holds anything that an export does not write."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; name a folder with -o")
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if names and (names - OWN or ONNX_FILE not in names):
        other = min(names - OWN or names)
        raise InputError(f"{out} holds {other}, and is no export of `mmkd-student export`; name another folder")


def write_folder(out: Path, files: dict[str, bytes]) -> None:
    """Write files into a folder beside `out`, which then takes its place; StorageError where the disk refuses."""
    temporary = out.with_name(f".mmkd-{uuid.uuid4().hex[:16]}.tmp")
    with storage_errors(out):
        try:
            temporary.mkdir(parents=True)
            for name, data in files.items():
                write_synced(temporary / name, data)
            refuse_foreign(out)
            if out.is_dir():
                shutil.rmtree(out)
            temporary.rename(out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
