"""Published CSV files, row by row: every fault is named by file and line, and a missing column by its nearest."""

import csv
import difflib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmkd.data_manifests.errors import InputError
from mmkd.data_manifests.regular_file import read_regular
from mmkd.data_manifests.system_errors import cannot_read

MAX_CSV_BYTES = 2**30
MOST_DIGITS = 6
"""Of a class number: a longer one is a mistake, and a list of so many classes would fill the memory."""


@dataclass(frozen=True)
class Row:
    """One line of a table."""

    place: str
    """File and line, for errors: `FILE:12`."""
    values: dict[str, str]
    """Column -> text, without surrounding blanks."""

    def text(self, column: str) -> str:
        """Return a value that must be there."""
        if not self.values[column]:
            raise InputError(f"{self.place}: {column} is empty")
        return self.values[column]

    def number(self, column: str, count: int, what: str) -> int:
        """Return a class number below `count`; `what` names the list that it counts in."""
        text = self.text(column)
        if not text.isascii() or not text.isdigit():
            raise InputError(f"{self.place}: {column} {text!r} is not a whole number from 0")
        if len(text.lstrip("0")) > MOST_DIGITS or int(text) >= count:
            raise InputError(f"{self.place}: {column} {text[:20]} is outside {what} (0..{count - 1})")
        return int(text)

    def seconds(self, column: str) -> float:
        """Return a time: seconds (`12.5`), or hours, minutes and seconds (`00:01:02.34`)."""
        text = self.text(column)
        parts = text.split(":")
        try:
            numbers = [float(part) for part in parts]
        except ValueError:
            numbers = []
        usual = all(number >= 0 for number in numbers) and all(number < 60 for number in numbers[1:])
        if not 1 <= len(numbers) <= 3 or not usual or numbers[-1] == float("inf"):
            raise InputError(f"{self.place}: {column} {text!r} is no time; write 12.5 or 00:01:02.34")
        seconds = 0.0
        for number in numbers:
            seconds = 60 * seconds + number
        return seconds


def read_table(path: Path, columns: Sequence[str] = ()) -> list[Row]:
    """Return the rows of a CSV file with a header line (UTF-8, byte order mark allowed), at least one.

    Raises InputError, with file and line, for a file that is none, and where one of `columns` is missing.
    """
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    lines = _lines(reader, path)
    header = next(lines, None)
    if header is None:
        raise InputError(f"{path} is empty")
    names = [name.strip() for name in header[1]]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"{path}: column {twice!r} stands there twice")
    for column in columns:
        require_column(column, names, path)
    rows = []
    for line, values in lines:
        if len(values) != len(names):
            raise InputError(f"{path}:{line}: {len(values)} values in a table of {len(names)} columns")
        named = zip(names, (value.strip() for value in values), strict=True)
        rows.append(Row(f"{path}:{line}", dict(named)))
    if not rows:
        raise InputError(f"{path} holds no row below its header")
    return rows


def require_column(column: str, names: Sequence[str], path: Path) -> None:
    """Raise InputError, with the nearest name, unless a table has a column."""
    if column not in names:
        near = difflib.get_close_matches(column, names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(names[:20])}"
        raise InputError(f"{path} has no column {column!r}{hint}")


def read_text(path: Path) -> str:
    """Return the text of a regular file (UTF-8, byte order mark allowed); InputError names the file."""
    try:
        if path.stat().st_size > MAX_CSV_BYTES:
            raise InputError(f"{path}: larger than {MAX_CSV_BYTES} bytes; is it the annotation file?")
        return read_regular(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise cannot_read(path, error) from error


def _lines(reader: Any, path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the lines that are not blank, with the number of each one's last."""
    try:
        for values in reader:
            if any(value.strip() for value in values):
                yield reader.line_num, values
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num}: not CSV: {error}") from error
