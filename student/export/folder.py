"""The folder of an export: written whole beside the old one, which it replaces; never over what is not its own.

`card.json` makes a folder an export: it carries a seal and the hash of every file beside it. What it does not list,
or what was changed since, such as a README that somebody filled in, is its owner's and is never replaced.
"""

import hashlib
import json
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmkd.cache_tools.cache.sealed import open_seal, seal
from mmkd.data_manifests.atomic import storage_errors, sync_directory, write_synced
from mmkd.data_manifests.errors import InputError
from mmkd.data_manifests.kinds import it_is
from mmkd.data_manifests.regular_file import open_regular

CARD_FILE = "card.json"
SCHEMA = "mmkd-export-1"
CARD_BYTES = 1 << 28
"""More than any card has: class names of a million classes."""


def whole_path(out: Path) -> Path:
    """Return a folder's real path, which has a name and a parent; InputError for one that cannot be replaced."""
    path = out.resolve()
    if path == Path.cwd():
        raise InputError(f"{out} is the folder that you are in; name another one with -o")
    if path.exists() and not path.is_dir():
        raise InputError(f"{out} is a file; name a folder with -o")
    return path


def set_aside(out: Path) -> Path:
    """Return where the old export stays while the new one takes its place."""
    return out.with_name(f".mmkd-{hashlib.sha256(out.name.encode()).hexdigest()[:16]}.old")


def recover(out: Path) -> None:
    """Put back the old export of a process that was killed before the new one had its place."""
    old = set_aside(out)
    with storage_errors(out):
        if old.is_dir() and not out.exists():
            old.rename(out)
        elif old.is_dir():
            shutil.rmtree(old)


def refuse_foreign(out: Path) -> None:
    """Raise InputError where a folder holds anything that no export wrote, or that was changed since."""
    with storage_errors(out, verb="read"):
        names = {path.name for path in out.iterdir()} if out.is_dir() else set()
        if not names:
            return
        listed = listed_files(out / CARD_FILE)
        if listed is None:
            raise InputError(
                f"{out} is no export of `mmkd-student export`{it_is(out)}; name another folder with -o"
            )
        for name in sorted(names - {CARD_FILE}):
            if name not in listed:
                raise InputError(
                    f"{out} holds {name}, which no export wrote; move it, or name another folder with -o"
                )
            if hash_of(out / name) != listed[name]:
                raise InputError(
                    f"{out / name} was changed after its export; move it, or name another folder with -o"
                )


def listed_files(card: Path) -> dict[str, str] | None:
    """Return file name -> SHA-256 of what a card lists; None where there is no card, or it is not as written."""
    try:
        with open_regular(card) as file:
            value = open_seal(file.read(CARD_BYTES))
    except (FileNotFoundError, IsADirectoryError, ValueError):
        return None
    files = value.get("files")
    return files if value.get("schema") == SCHEMA and isinstance(files, dict) else None


def hash_of(path: Path) -> str:
    """Return a file's SHA-256; of what is no regular file, or cannot be read, a word that no hash is."""
    try:
        with open_regular(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return "unread"


def card_bytes(card: Mapping[str, Any], files: Mapping[str, bytes]) -> bytes:
    """Return card.json: what it says, the hash of each file, and its seal."""
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    return (json.dumps(seal({"schema": SCHEMA, **card, "files": hashes}), indent=1) + "\n").encode()


def write_folder(out: Path, card: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
    """Write files and their card into a folder beside `out`, which then takes its place.

    A kill at any moment leaves the old export, or the new one, or the old one aside, which `recover` puts back.
    Raises InputError as `refuse_foreign`, StorageError where the disk refuses.
    """
    temporary = out.with_name(f".mmkd-{uuid.uuid4().hex[:16]}.tmp")
    old = set_aside(out)
    with storage_errors(out):
        try:
            temporary.mkdir(parents=True)
            for name, data in {**files, CARD_FILE: card_bytes(card, files)}.items():
                write_synced(temporary / name, data)
            sync_directory(temporary)
            refuse_foreign(out)
            if out.is_dir():
                out.rename(old)
            temporary.rename(out)
            sync_directory(out.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            recover(out)
