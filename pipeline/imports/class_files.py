"""Lists of class names as publishers write them, in the order of a checkpoint's numbers; free of torch.

| file | form |
|---|---|
| `config.json` of a Hugging Face model | `{"id2label": {"0": "name", …}}`, or that object alone |
| `labels.json` of Something-Something and Something-Else | `{"name": "0", …}` |
| another `.json` | `["name", …]` |
| `EPIC_100_verb_classes.csv`, `EPIC_100_noun_classes_v2.csv` | columns `id` and `key` |
| `.txt`, as MMAction's label maps | a name on each line |
"""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmkd.data_manifests.counted import counted
from mmkd.data_manifests.errors import InputError
from mmkd.data_manifests.json_file import read_json
from mmkd.data_manifests.regular_file import read_regular
from mmkd.data_manifests.system_errors import cannot_read

AT_MOST_BYTES = 64 << 20
NAME_COLUMNS = ("key", "name", "class")
"""Columns of a CSV that may hold the names, the first that is there."""


def read_class_names(path: Path) -> tuple[str, ...]:
    """Return class names by number; InputError names the file, and the line or number at fault."""
    if path.suffix == ".json":
        names = _from_json(read_json(path), path)
    elif path.suffix == ".csv":
        names = _numbered(_csv_rows(path), path)
    else:
        names = tuple(line.strip() for line in _text(path).splitlines() if line.strip())
    if len(names) < 2:
        raise InputError(f"{path}: a class list needs at least two names, this one has {len(names)}")
    return names


def _from_json(value: Any, path: Path) -> tuple[str, ...]:
    if isinstance(value, dict) and isinstance(value.get("id2label"), dict):
        value = value["id2label"]
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return tuple(value)
    if isinstance(value, dict) and all(str(number).isdecimal() for number in value.values()):
        turned = {str(number): name for name, number in value.items()}
        if len(turned) == len(value):
            return _numbered(turned, path)
    elif isinstance(value, dict) and all(isinstance(name, str) for name in value.values()):
        return _numbered(value, path)
    raise InputError(f"{path}: expected a list of class names, id2label, or names with their numbers, each once")


def _csv_rows(path: Path) -> dict[str, str]:
    reader = csv.DictReader(io.StringIO(_text(path)))
    columns = reader.fieldnames or ()
    column = next((name for name in NAME_COLUMNS if name in columns), None)
    if "id" not in columns or column is None:
        raise InputError(
            f"{path}: a class list in CSV has the columns id and key; this one has {', '.join(columns)}"
        )
    rows: dict[str, str] = {}
    for row in reader:
        number, name = row["id"], row[column]
        if not (number and name) or number in rows:
            raise InputError(
                f"{path}:{reader.line_num}: id {number!r} with {column} {name!r}: both, and each id once"
            )
        rows[number] = name
    return rows


def _numbered(names: Mapping[str, str], path: Path) -> tuple[str, ...]:
    by_number = {int(number): name for number, name in names.items() if number.isdecimal() and len(number) < 10}
    missing = next((number for number in range(len(names)) if number not in by_number), None)
    if missing is not None:
        raise InputError(f"{path}: {counted(len(names), 'class')}, but none has number {missing}")
    return tuple(by_number[number] for number in range(len(names)))


def _text(path: Path) -> str:
    try:
        return read_regular(path, at_most_bytes=AT_MOST_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise cannot_read(path, error) from error
