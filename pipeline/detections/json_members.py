"""Members of one huge JSON object or list, one at a time: the published box file holds gigabytes in one object.

As Python objects it would take several times its size on disk; here only one video's annotation exists at a
time. What it gives up: random access, and line numbers in errors.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from mmkd.data_manifests.errors import InputError
from mmkd.data_manifests.system_errors import cannot_read

CHUNK_CHARACTERS = 2**20
MAX_MEMBER_CHARACTERS = 2**26


class _Members:
    """A window over a text file from which whole JSON values are taken."""

    def __init__(self, file: TextIO, path: Path) -> None:
        """Start at the beginning of the open `file`; `path` is for errors."""
        self.file, self.path = file, path
        self.buffer, self.position, self.passed = "", 0, 0
        self.decoder = json.JSONDecoder()

    def more(self) -> bool:
        """Read on, dropping what was consumed; False at the end of the file."""
        rest = self.buffer[self.position :]
        self.passed += self.position
        # Doubling keeps the repeated attempts at one large value linear in its size.
        read = self.file.read(max(CHUNK_CHARACTERS, len(rest)))
        self.buffer, self.position = rest + read, 0
        return bool(read)

    def symbol(self) -> str:
        """Return the next character that is not white space, and step over it; `` at the end."""
        while True:
            while self.position < len(self.buffer):
                character = self.buffer[self.position]
                self.position += 1
                if character not in " \t\r\n":
                    return character
            if not self.more():
                return ""

    def value(self) -> Any:
        """Return the JSON value that starts at the next character that is not white space."""
        if not self.symbol():
            raise self.fault("the file ends early; is the download complete?")
        self.position -= 1
        while True:
            try:
                value, end = self.decoder.raw_decode(self.buffer, self.position)
            except (ValueError, RecursionError) as error:
                if len(self.buffer) - self.position > MAX_MEMBER_CHARACTERS:
                    raise self.fault(f"no value ends within {MAX_MEMBER_CHARACTERS} characters") from error
                if not self.more():
                    raise self.fault(f"not valid JSON, or cut off: {error}") from error
            else:
                self.position = end
                return value

    def fault(self, message: str) -> InputError:
        """Return the error that names the file and the place in it."""
        return InputError(f"{self.path}: near character {self.passed + self.position}: {message}")


def iterate_members(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the (key, value) pairs of the JSON object in `path`; InputError names file and place."""
    with _open(path) as file:
        yield from _iterate(_Members(file, path))


def iterate_items(path: Path) -> Iterator[Any]:
    """Yield the items of the JSON list in `path`; InputError names file and place."""
    with _open(path) as file:
        members = _Members(file, path)
        if members.symbol() != "[":
            raise members.fault("expected one JSON list of videos")
        if (separator := members.symbol()) != "]":
            members.position -= len(separator)
            separator = ","
        while separator == ",":
            yield members.value()
            separator = members.symbol()
        if separator != "]" or members.symbol():
            raise members.fault("expected ',' or the list's end" if separator != "]" else "text after the list")


@contextmanager
def _open(path: Path) -> Iterator[TextIO]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield file
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text") from error
    except OSError as error:
        raise cannot_read(path, error) from error


def _iterate(members: _Members) -> Iterator[tuple[str, Any]]:
    start = members.symbol()
    if start == "[":
        raise members.fault(
            "a list; of the authors' detections `mmkd-cache boxes --form authors` makes a table that --boxes takes"
        )
    if start != "{":
        raise members.fault("expected one JSON object of video ids")
    seen: set[str] = set()
    separator = ","
    while separator == ",":
        key = members.value() if seen else _first_key(members)
        if key is None:
            separator = "}"
            break
        if not isinstance(key, str) or members.symbol() != ":":
            raise members.fault("expected a video id and ':'")
        if key in seen:
            raise members.fault(f"video {key!r} stands in the file twice")
        seen.add(key)
        yield key, members.value()
        separator = members.symbol()
    if separator != "}" or members.symbol():
        raise members.fault("expected ',' or the object's end" if separator != "}" else "text after the object")


def _first_key(members: _Members) -> Any:
    if members.symbol() == "}":
        return None
    members.position -= 1
    return members.value()
