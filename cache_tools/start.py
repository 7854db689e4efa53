"""Where a cache that comes from others (an import, a merge) may be written."""

from collections.abc import Mapping
from typing import Any

from mmkd.cache_tools.finalize import read_init
from mmkd.cache_tools.layout import INIT
from mmkd.cache_tools.store import Store
from mmkd.data_manifests.errors import InputError

LIBRARY_DEPENDENT = ("objects", "environment")
"""Fields of init.json that versions of libraries may change."""


def require_free(store: Store, init: Mapping[str, Any], *, what: str) -> None:
    """Raise InputError when a store holds a cache other than that of `init`; the same one may be written again."""
    if not store.exists(INIT):
        return
    there = read_init(store)
    if _identity(there) != _identity(init):
        raise InputError(f"{store.locate()} holds a cache already, and {what}; name another place with -o")


def _identity(init: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in init.items() if key not in (*LIBRARY_DEPENDENT, "seal")}
