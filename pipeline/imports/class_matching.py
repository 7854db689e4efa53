"""Classes matched by name, never by number: two lists of the same classes are rarely in the same order.

Brackets are stripped, since Something-Something's templates are published with and without them, and case and
runs of blanks do not count.
"""

from collections.abc import Sequence
from pathlib import Path

from mmkd.data_manifests.counted import counted
from mmkd.data_manifests.errors import InputError
from mmkd.data_manifests.manifest import Head

MOST_SHOWN = 3


def match_classes(names: Sequence[str], head: Head, path: Path) -> list[int]:
    """Return (classes of the head,) the number in `names` of each of the head's classes.

    Raises InputError, naming the file, where a class is not there, or two names of a list cannot be told apart.
    """
    numbers = numbers_by_name(names, str(path))
    numbers_by_name(head.classes, f"head {head.name!r} of the manifest")
    missing = [name for name in head.classes if plain(name) not in numbers]
    if missing:
        shown = ", ".join(repr(name) for name in missing[:MOST_SHOWN])
        more = f" and {len(missing) - MOST_SHOWN} more" if len(missing) > MOST_SHOWN else ""
        raise InputError(
            f"{path} lacks {counted(len(missing), 'class')} of head {head.name!r}: {shown}{more}; is it the list "
            "of this checkpoint, and the manifest one of its classes?"
        )
    return [numbers[plain(name)] for name in head.classes]


def numbers_by_name(names: Sequence[str], where: str) -> dict[str, int]:
    """Return plain name -> number; InputError when two names are the same but for brackets, case and blanks."""
    numbers: dict[str, int] = {}
    for number, name in enumerate(names):
        first = numbers.setdefault(plain(name), number)
        if first != number:
            raise InputError(f"{where}: classes {first} and {number} have the same name, {name!r}")
    return numbers


def plain(name: str) -> str:
    """Return a class name as it is compared."""
    return " ".join(name.replace("[", "").replace("]", "").casefold().split())
