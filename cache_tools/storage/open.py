"""Opening the store that a path or URL names.

fsspec is an extra: `object_store` imports it when a URL is opened, so a local cache never needs it.
"""

from pathlib import Path

from mmkd.cache_tools.storage.local_store import LocalStore
from mmkd.cache_tools.storage.object_store import ObjectStore
from mmkd.cache_tools.storage.store import Store


def open_store(location: Path | str) -> Store:
    """Return the store of a cache: a folder, or what an fsspec URL such as `s3://bucket/cache` names."""
    if isinstance(location, str) and "://" in location and not location.startswith("file://"):
        return ObjectStore(location)
    return LocalStore(Path(str(location).removeprefix("file://")))


def same_place(one: Store, other: Store) -> bool:
    """Return whether two stores are the same one, however each is spelt."""
    if isinstance(one, LocalStore) and isinstance(other, LocalStore):
        return one.root.resolve() == other.root.resolve()
    return one.locate() == other.locate()
