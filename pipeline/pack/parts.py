"""The folder OUT.parts beside a file that is made in parts: continued by the next run, removed with the last step.

    OUT.parts/parameters.json   how the parts are made; a run with other parameters is refused
    OUT.parts/HASH.h5           one finished video each, whole or absent

What else lies there is its owner's: a folder that holds other things to begin with is refused, and what is put
there later stays.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mmkd.cache_tools.cache.sealed import seal, unsealed
from mmkd.cache_tools.frames.records import VideoFacts
from mmkd.cache_tools.tasks.folder_lock import LOCK_NAME, FolderLock, folder_lock
from mmkd.data_manifests.atomic import TEMPORARY, storage_errors, write_atomically
from mmkd.data_manifests.errors import InputError
from mmkd.data_manifests.kinds import it_is
from mmkd.data_manifests.regular_file import read_regular

PARAMETERS = "parameters.json"
PART_NAME = re.compile(r"[0-9a-f]{32}\.h5")


@contextmanager
def parts_folder(out: Path, identity: Mapping[str, Any]) -> Iterator[tuple[Path, FolderLock]]:
    """Hold OUT.parts while the file `out` is made; leaving the block without an error removes the parts.

    Yields the folder and its lock, to be checked before `out` is written. Raises InputError for an `out` that is
    there, for parts of other parameters, for a folder of other things and for a second run at work; StorageError
    when the machine cannot.
    """
    _refuse_existing(out)
    folder = out.with_name(f"{out.name}.parts")
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with folder_lock(folder) as lock:
        _refuse_existing(out)  # the run that held the folder until now may have finished it
        _check_parameters(folder, identity)
        yield folder, lock
        with storage_errors(folder):
            _remove_parts(folder)
    with suppress(OSError):  # not empty: somebody else's files stay
        folder.rmdir()


def part_name(video: str, facts: VideoFacts) -> str:
    """Return the name of a video's part: of its path and its content, so that an exchanged video is made anew."""
    text = f"{video}\n{facts.identity}".encode("utf-8", "surrogatepass")
    return f"{hashlib.blake2b(text, digest_size=16).hexdigest()}.h5"


def _refuse_existing(out: Path) -> None:
    if out.exists():
        raise InputError(f"{out} is there{it_is(out)}; delete it or name another file with -o")


def _check_parameters(folder: Path, identity: Mapping[str, Any]) -> None:
    """Write the parameters of a new folder; InputError where it is other people's, or parts are of other ones."""
    path = folder / PARAMETERS
    if not path.exists():
        if foreign := sorted(entry.name for entry in folder.iterdir() if not _is_ours(entry.name)):
            raise InputError(f"{folder} holds other things, such as {foreign[0]}; name another file with -o")
        write_atomically(path, (json.dumps(seal(dict(identity))) + "\n").encode())
        return
    with storage_errors(path, verb="read"):
        stored = unsealed(read_regular(path), str(path), advice=f"delete {folder} and run again")
    if changed := [key for key, value in identity.items() if stored.get(key) != value]:
        texts = ", ".join(f"{key} {stored.get(key)!r}" for key in changed)
        raise InputError(f"{folder} was begun with {texts}; give the same, name another file, or delete it")


def _is_ours(name: str) -> bool:
    return bool(LOCK_NAME.fullmatch(name) or PART_NAME.fullmatch(name) or fnmatchcase(name, TEMPORARY))


def _remove_parts(folder: Path) -> None:
    """Delete the parts, and their parameters last: a killed run leaves what the next one understands."""
    for path in folder.iterdir():
        if PART_NAME.fullmatch(path.name) or fnmatchcase(path.name, TEMPORARY):
            path.unlink(missing_ok=True)
    (folder / PARAMETERS).unlink(missing_ok=True)
