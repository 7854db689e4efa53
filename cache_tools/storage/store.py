"""Where a cache lies: objects by key, each of them whole or absent.

The cache needs few promises of its store, and these are all of them: a write replaces an object whole and is
durable when it returns, `create` lets exactly one of several writers win, and modification times of one store come
from one clock. A local (or network) folder keeps them through temporary files, links, renames and fsync
(mmkd.cache_tools.storage.local_store); an object store (mmkd.cache_tools.storage.object_store) by its nature.
"""

from dataclasses import dataclass
from typing import Protocol

from mmkd.data_manifests.errors import StorageError


class MissingObjectError(KeyError):
    """There is no object of that key."""


class TakenOverError(StorageError):
    """This task was taken for dead, another one went on in its place, and nothing of it may be written any more."""

    def __init__(self, where: str) -> None:
        """Name the cache `where`."""
        super().__init__(f"{where}: another task went on while this one slept; run it again")


@dataclass(frozen=True)
class Stored:
    """What a listing says of an object."""

    size_bytes: int
    """Its size."""
    modified_seconds: float
    """When it was written, by the store's own clock."""


class Store(Protocol):
    """Objects by key; keys are relative paths with `/`."""

    def locate(self, key: str = "") -> str:
        """Return the object's path or URL, for messages."""

    def read(self, key: str) -> bytes:
        """Return an object; raise MissingObjectError, or StorageError when it cannot be read."""

    def write(self, key: str, data: bytes) -> None:
        """Put an object in place whole and durable; raise StorageError when that fails."""

    def create(self, key: str, data: bytes) -> bool:
        """Put an object where none is; return False when there is one. Of several callers one gets True."""

    def exists(self, key: str) -> bool:
        """Return whether there is an object."""

    def delete(self, key: str) -> None:
        """Remove an object, if it is there."""

    def list(self, prefix: str = "") -> dict[str, Stored]:
        """Return every object below the folder `prefix` (all of them without one), in the order of their keys."""

    def top(self) -> set[str]:
        """Return the first parts of all keys, somebody else's files and folders among them."""

    def begin(self, writer: str) -> None:
        """Write as `writer` from here on: each write, create and delete raises TakenOverError once it is swept."""

    def end(self) -> None:
        """Be that writer no more."""

    def writers(self) -> dict[str, float]:
        """Return those that began and did not end: writer -> when it last wrote, by the store's own clock."""

    def sweep(self, writer: str) -> None:
        """Stop a writer for good: nothing that it began, or begins, changes an object after this returns."""

    def tidy(self) -> None:
        """Remove the cache's empty folders, where a store has folders."""
