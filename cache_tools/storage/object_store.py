"""A cache in an object store: S3 and what speaks its protocol, or any other file system that fsspec knows.

A put replaces an object whole and is durable when it is answered; `create` is a conditional put (If-None-Match), of
which the server lets one win; times are the server's. Credentials and endpoints are found where the tools of each
store look (for S3: AWS_* variables, AWS_ENDPOINT_URL, ~/.aws, the machine's role); none is taken from a URL and
none is ever written. Nothing is kept in between: every listing is fresh.

A task's right to write is an object of its own, `.tmp/<task>/alive`, made once: who takes the task for dead deletes
it, and each write asks for it first.

What it gives up: a request that is on its way when its task is taken for dead still arrives; what it changed is
found by its hash, by readers and by `verify`. Requests cost time (a shard is some dozen of them, and a write is
two), an upload that was killed may leave invisible parts of a large object (give the bucket a rule that aborts
incomplete uploads), and a server that ignores conditions cannot keep tasks apart: there `create` warns, and one
task at a time should build. fsspec runs a thread, so a store is used by the process that opened it and never after
a fork; decoding workers see no store.
"""

import inspect
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from mmkd.cache_tools.layout import TEMPORARY, WRITER
from mmkd.cache_tools.storage.store import MissingObjectError, Stored, TakenOverError
from mmkd.data_manifests.errors import InputError, MmkdError, StorageError, VerificationError

log = logging.getLogger("mmkd")
CHATTY = ("aiobotocore", "botocore")
CONFLICT_ATTEMPTS = 5
CONFLICT_SECONDS = 0.2
TIME_FIELDS = ("LastModified", "last_modified", "mtime", "updated", "modified", "created")
"""What file systems call the time of an object's last write."""


class ObjectStore:
    """Objects below an fsspec URL; see `mmkd.cache_tools.storage.store.Store` for each method's promise."""

    def __init__(self, url: str) -> None:
        """Open `url`, e.g. `s3://bucket/cache`; nothing is read yet.

        Raises InputError for a URL that nothing can read, that carries a password, or that goes through a copy
        kept elsewhere (`simplecache::...`), which could be stale.
        """
        self.url = url if url.endswith("://") else url.rstrip("/")
        self._files, self._root = open_file_system(self.url)
        self._conditions: bool | None = None if has_conditional_put(self._files) else False
        """Whether the server honours conditional puts; None as long as nobody knows."""
        self._writer = ""
        self._warned = False

    def locate(self, key: str = "") -> str:
        """Return the object's URL."""
        return f"{self.url}/{key}" if key else self.url

    def read(self, key: str) -> bytes:
        """Get an object."""
        with self._errors("read", key):
            try:
                return bytes(self._files.cat_file(self._path(key)))
            except FileNotFoundError:
                raise MissingObjectError(key) from None

    def write(self, key: str, data: bytes) -> None:
        """Put an object."""
        path = self._path(key)
        self._refuse_swept()
        with self._errors("write", key):
            self._files.pipe_file(path, data)

    def create(self, key: str, data: bytes) -> bool:
        """Put an object on the condition that there is none.

        An object of the same bytes counts as this call's own: the client sends a put again whose answer was lost.
        """
        self._path(key)
        self._refuse_swept()
        if self._conditions is False:
            return self._create_unguarded(key, data)
        if not self._put_new(key, data):
            self._conditions = True
            with suppress(MissingObjectError):  # deleted meanwhile
                return self.read(key) == data
            return False
        if self._conditions is None:
            # The first put succeeds whether or not the server knows conditions: a refused second one tells.
            self._conditions = not self._put_new(key, data)
            if not self._conditions:
                self._warn()
        return True

    def exists(self, key: str) -> bool:
        """Ask for an object's size."""
        with self._errors("read", key):
            return bool(self._files.isfile(self._path(key)))

    def delete(self, key: str) -> None:
        """Remove an object, if it is there."""
        self._refuse_swept()
        with self._errors("delete", key), suppress(FileNotFoundError):
            self._files.rm_file(self._path(key))

    def list(self, prefix: str = "") -> dict[str, Stored]:
        """Ask for a fresh listing, however many pages it has."""
        top = f"{self._root}/{prefix}".rstrip("/")
        with self._errors("list", prefix):
            try:
                found: dict[str, dict[str, Any]] = self._files.find(top, detail=True)
            except FileNotFoundError:
                return {}
            return {
                name.removeprefix(f"{self._root}/"): Stored(int(info["size"]), modified_seconds(info))
                for name, info in sorted(found.items())
                if info["type"] == "file" and name.startswith(f"{top}/")
                if prefix or not name.startswith(f"{top}/{TEMPORARY}/")
            }

    def top(self) -> set[str]:
        """Ask for the names directly below the URL."""
        with self._errors("list", ""):
            try:
                names = self._files.ls(self._root, detail=False)
            except FileNotFoundError:
                return set()
        start = f"{self._root}/"
        return {str(name).removeprefix(start).partition("/")[0] for name in names if str(name).startswith(start)}

    def begin(self, writer: str) -> None:
        """Make the object that lets a writer write."""
        self._writer = ""
        # As nobody, for `write` would ask for the very object that it is to make.
        self.write(alive_key(writer), b"")
        self._writer = writer

    def end(self) -> None:
        """Remove it."""
        if writer := self._writer:
            self._writer = ""
            self.delete(alive_key(writer))

    def writers(self) -> dict[str, float]:
        """Ask for these objects."""
        listed = self.list(TEMPORARY)
        writers = {key.split("/")[1]: stored.modified_seconds for key, stored in listed.items()}
        return {writer: seconds for writer, seconds in writers.items() if WRITER.fullmatch(writer)}

    def sweep(self, writer: str) -> None:
        """Remove another writer's."""
        if WRITER.fullmatch(writer) and writer != self._writer:
            self.delete(alive_key(writer))

    def tidy(self) -> None:
        """Do nothing: there are no folders."""

    def _path(self, key: str) -> str:
        parts = PurePosixPath(key).parts
        if not parts or ".." in parts or parts[0] == "/":
            raise VerificationError(f"{self.url}: an object named {key!r} lies outside of it")
        return f"{self._root}/{key}"

    def _refuse_swept(self) -> None:
        """Raise TakenOverError when this writer was taken for dead."""
        if self._writer and not self.exists(alive_key(self._writer)):
            raise TakenOverError(self.url)

    def _put_new(self, key: str, data: bytes) -> bool:
        """Send one conditional put; return whether it was taken."""
        with self._errors("write", key):
            for attempt in range(CONFLICT_ATTEMPTS):
                try:
                    self._files.pipe_file(self._path(key), data, mode="create")
                    return True
                except OSError as error:
                    code = error_code(error)
                    if isinstance(error, FileExistsError) or code in ("PreconditionFailed", "412"):
                        return False
                    # S3 answers so when another put to the key has not ended: its outcome decides.
                    if code not in ("ConditionalRequestConflict", "409") or attempt == CONFLICT_ATTEMPTS - 1:
                        raise
                    time.sleep(CONFLICT_SECONDS * 2**attempt)
        return False

    def _create_unguarded(self, key: str, data: bytes) -> bool:
        self._warn()
        if self.exists(key):
            return False
        self.write(key, data)
        return True

    def _warn(self) -> None:
        """Say once that tasks cannot be kept apart here."""
        if self._warned:
            return
        self._warned = True
        log.warning(
            "%s cannot create an object only where there is none (no conditional put): let one task at a time work "
            "here, others would compute the same shards",
            self.url,
        )

    @contextmanager
    def _errors(self, what: str, key: str) -> Iterator[None]:
        """Turn whatever a file system raises into one line that names the URL."""
        try:
            yield
        except (MmkdError, MissingObjectError):
            raise
        except Exception as error:  # each file system brings exceptions of its own, of no common base
            raise StorageError(f"cannot {what} {self.locate(key)}: {reason(error)}") from error


def alive_key(writer: str) -> str:
    """Return the key of the object that lets a writer write."""
    return f"{TEMPORARY}/{writer}/alive"


def open_file_system(url: str) -> tuple[Any, str]:
    """Return the fsspec file system of a URL and the path within it; raise InputError when there is none."""
    if not url.partition("://")[2]:
        raise InputError(f"{url} names no place within the store; name one, such as s3://bucket/cache")
    if "::" in url:
        raise InputError(f"{url}: name the store itself, not a chain of file systems")
    if urlsplit(url).password:
        host = urlsplit(url).hostname
        raise InputError(f"the URL on {host} holds a password: give credentials by the environment or a profile")
    try:
        from fsspec.core import url_to_fs

        # A listing kept from before, also by another user of fsspec in this process, would hide others' objects.
        files, root = url_to_fs(url, use_listings_cache=False, skip_instance_cache=True)
    except ImportError as error:
        package = "'mmkd[s3]'" if url.startswith(("s3://", "s3a://")) else "fsspec and the package that it names"
        raise InputError(
            f"{url} needs a package that is missing ({reason(error)}): pip install {package}"
        ) from None
    except Exception as error:  # an unknown protocol, a bad profile, and whatever else a file system dislikes
        raise InputError(f"cannot use {url} as a cache: {reason(error)}") from error
    for name in CHATTY:  # each client says where it found its credentials
        logging.getLogger(name).setLevel(logging.WARNING)
    return files, str(root).rstrip("/")


def has_conditional_put(files: Any) -> bool:
    """Return whether a file system has a put of its own that can be told to create (fsspec's only looks first)."""
    from fsspec.asyn import AsyncFileSystem
    from fsspec.spec import AbstractFileSystem

    for name, base in (("_pipe_file", AsyncFileSystem), ("pipe_file", AbstractFileSystem)):
        method = getattr(type(files), name, None)
        if method is not None and method is not getattr(base, name, None):
            return "mode" in inspect.signature(method).parameters
    return False


def modified_seconds(info: Mapping[str, Any]) -> float:
    """Return when an object was written, from what a listing says; 0 where it does not say."""
    for name in TIME_FIELDS:
        value = info.get(name)
        if isinstance(value, str):
            value = datetime.fromisoformat(value)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
    return 0.0


def error_code(error: BaseException) -> str:
    """Return the server's own code of an error that s3fs translated, or nothing."""
    response = getattr(error.__cause__, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def reason(error: BaseException) -> str:
    """Return an error in one line."""
    if type(error).__name__ == "NoCredentialsError":
        return "no credentials found; set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    text = " ".join(str(error).split())
    return text or type(error).__name__
