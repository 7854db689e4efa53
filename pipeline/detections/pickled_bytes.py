"""A pickled list of byte strings, read without unpickling: nothing that a file says is run or looked up.

Unpickling runs what a file names. Here its instructions are gone through one by one, those that build a list of
bytes are followed, and any other one refuses the file. Python 3's own `pickle.dump(list_of_bytes)` uses no other
from protocol 3 on.
"""

import pickletools
from pathlib import Path
from typing import Any

from mmkd.data_manifests.errors import InputError
from mmkd.data_manifests.regular_file import read_regular
from mmkd.data_manifests.system_errors import cannot_read

AT_MOST_BYTES = 1 << 30
"""A pickle is read whole; the largest published one has some 30 MB."""
PASSED = {"PROTO", "FRAME", "MARK", "STOP", "APPEND", "APPENDS"}
BYTES = {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}
STORE = {"BINPUT", "LONG_BINPUT", "MEMOIZE"}
RECALL = {"BINGET", "LONG_BINGET"}


class NotBytesError(InputError):
    """A file is no pickled list of byte strings: a fault of it alone, whatever it would have run."""


def read_pickled_bytes(path: Path) -> list[bytes]:
    """Return the byte strings of a pickled list; NotBytesError names the file and what else is in it."""
    try:
        data = read_regular(path, at_most_bytes=AT_MOST_BYTES)
    except OSError as error:
        raise cannot_read(path, error) from error
    try:
        return _list_of_bytes(data)
    except ValueError as error:
        raise NotBytesError(f"{path}: not a pickled list of byte strings: {error}; it was not unpickled") from error


def _list_of_bytes(data: bytes) -> list[bytes]:
    found: list[bytes] = []
    memo: dict[int, bytes | None] = {}
    last: bytes | None = None  # None: the list itself
    lists = 0
    argument: Any
    for opcode, argument, _ in pickletools.genops(data):
        name = opcode.name
        if name == "EMPTY_LIST":
            lists, last = lists + 1, None
            if lists > 1 or found:
                raise ValueError("it holds a list within the list")
        elif name in BYTES:
            last = bytes(argument)
            found.append(last)
        elif name in STORE:
            memo[len(memo) if name == "MEMOIZE" else argument] = last
        elif name in RECALL:
            if (again := memo.get(argument)) is None:
                raise ValueError("it holds itself, or what it does not have")
            found.append(again)
        elif name not in PASSED:
            what = f" {str(argument)[:60]!r}" if argument is not None else ""
            raise ValueError(f"it holds {name}{what}")
    if lists != 1:
        raise ValueError("it holds no list")
    return found
