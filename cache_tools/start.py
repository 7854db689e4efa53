"""Where a cache that comes from others (an import, a merge) may be written."""

from dataclasses import replace

from mmkd.cache_tools.init_record import CacheInit, read_init
from mmkd.cache_tools.layout import INIT
from mmkd.cache_tools.store import Store
from mmkd.data_manifests.errors import InputError


def require_free(store: Store, init: CacheInit, *, what: str) -> None:
    """Raise InputError when a store holds a cache other than that of `init`; the same one may be written again."""
    if not store.exists(INIT):
        return
    if without_versions(read_init(store)) != without_versions(init):
        raise InputError(f"{store.locate()} holds a cache already, and {what}; name another place with -o")


def without_versions(init: CacheInit) -> CacheInit:
    """Return an init record without what versions of libraries may change."""
    return replace(init, objects={}, environment={})
