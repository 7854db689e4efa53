"""Stand-ins for the classes and functions that a checkpoint names beside its tensors: they do nothing.

A checkpoint of a training program holds its arguments, its history and its counters, too, and torch refuses to
read any of those. Here each name that torch does not know stands for an inert class, so that the file is read and
nothing of it runs. A name that no checkpoint needs and an attack does (`os.system`, `eval`) is refused all the
same: such a file is not to be used even where it can do nothing.
"""

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, SupportsIndex

DANGEROUS_MODULES = frozenset(
    (
        "asyncio",
        "code",
        "commands",
        "ctypes",
        "http",
        "importlib",
        "marshal",
        "multiprocessing",
        "nt",
        "os",
        "pdb",
        "pickle",
        "pip",
        "posix",
        "pty",
        "requests",
        "runpy",
        "shutil",
        "signal",
        "socket",
        "subprocess",
        "sys",
        "tempfile",
        "timeit",
        "urllib",
        "webbrowser",
    )
)
"""Modules whose functions run programs or code, or reach files and networks; by their first name."""
DANGEROUS_FUNCTIONS = frozenset(
    f"builtins.{name}"
    for name in ("__import__", "breakpoint", "compile", "eval", "exec", "exit", "input", "open", "quit")
) | {"io.open"}
"""Of other modules the functions that do; `builtins.getattr` is in every checkpoint of mmengine."""


class Inert(list[Any]):
    """What any class or function of a file becomes: it takes whatever it is given, keeps nothing and does nothing.

    It is a list since torch's reader appends to nothing else, and stays empty.
    """

    __slots__ = ()
    __hash__ = object.__hash__  # type: ignore[assignment]  # a file may use one as a key of a dict, by its identity

    def __new__(cls, *_: object, **__: object) -> "Inert":
        """Return an empty one."""
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        """Take anything."""
        super().__init__()

    def __setstate__(self, _: object) -> None:
        """Take any state."""

    def append(self, _: object) -> None:
        """Take any item."""

    def extend(self, _: Iterable[object]) -> None:
        """Take any items."""

    def __eq__(self, other: object) -> bool:
        """Be equal to itself alone."""
        return self is other

    def __setitem__(self, key: SupportsIndex | slice, value: object) -> None:
        """Take any value."""


class _MadeByCall(type):
    """Tells `Class(...)`, which gives an `Inert`, from `Class.__new__(Class)`, which gives a dict."""

    def __call__(cls, *_: object, **__: object) -> Inert:
        return Inert()


class InertDict(metaclass=_MadeByCall):
    """The stand-in for files with subclasses of dict, whose items torch's reader sets on exact dicts alone."""

    def __new__(cls, *_: object) -> "OrderedDict[Any, Any]":  # type: ignore[misc]  # on purpose: an exact OrderedDict
        """Return an empty dict, as unpickling makes an object without calling its class."""
        return OrderedDict()


def is_dangerous(name: str) -> bool:
    """Return whether a global's full name, such as `os.system`, is one that no checkpoint needs."""
    return name.partition(".")[0] in DANGEROUS_MODULES or name in DANGEROUS_FUNCTIONS
