"""Where a cache may be written: nowhere among other people's files, and not over another cache."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from mmkd.cache_tools.cache.commits import drop_all
from mmkd.cache_tools.cache.init_record import CacheInit, read_init
from mmkd.cache_tools.layout import GROUP, INDEX, INIT, ROOT, is_own_key, is_own_name
from mmkd.cache_tools.storage.store import Store
from mmkd.cache_tools.tasks.claims import Claims
from mmkd.cache_tools.tasks.finish import finish_claimed
from mmkd.cache_tools.tasks.heartbeat import OtherTasks, Task, new_task_id
from mmkd.data_manifests.errors import InputError

OF_THE_SYSTEM = {"lost+found", "Thumbs.db", "desktop.ini"}
"""What systems put into folders; hidden files are passed over, too."""
NAMED = 3


def require_own_place(store: Store) -> None:
    """Raise InputError, naming some of it, for a place that holds anything and no cache."""
    if store.exists(INIT) or store.exists(f"{GROUP}/zarr.json"):
        return
    names = [name for name in sorted(store.top()) if not is_own_name(name) and not of_the_system(name)]
    if not names:  # a folder called `tasks` may be anybody's
        names = [key for key in store.list() if not is_own_key(key) and not of_the_system(key.rpartition("/")[2])]
    if names:
        listed = ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
        raise InputError(
            f"{store.locate()} is not empty and not a cache (it holds {listed}); name a new or empty folder with "
            f"-o, such as {store.locate('cache')}"
        )


def of_the_system(name: str) -> bool:
    """Return whether a file is nobody's."""
    return name.startswith(".") or name in OF_THE_SYSTEM


@contextmanager
def writing_whole(store: Store, init: CacheInit, *, what: str) -> Iterator[None]:
    """Let the block write all of a cache, as a task that claims the cache as a whole, and finish it.

    What vouches for objects of the cache that is there goes first. Raises as `require_free` and
    `require_own_place`, before anything is written.
    """
    require_own_place(store)
    require_free(store, init, what=what)
    with Task(store, new_task_id()) as own:
        others = OtherTasks(own)
        claims = Claims(own, others)
        with claims.whole_cache():
            if others.living():
                raise InputError(f"{store.locate()} is being built; run this again when no task is at work there")
            others.sweep()
            require_free(store, init, what=what)  # another task may have made one while this one waited
            for key in (ROOT, INDEX):
                store.delete(key)
            drop_all(store)
            yield
            finish_claimed(store, claims, others)
    store.tidy()


def require_free(store: Store, init: CacheInit, *, what: str) -> None:
    """Raise InputError when a store holds another cache than that of `init`, or a finished one."""
    if not store.exists(INIT):
        return
    if without_versions(read_init(store)) != without_versions(init):
        raise InputError(f"{store.locate()} holds a cache already, and {what}; name another place with -o")
    if store.exists(ROOT):
        raise InputError(f"{store.locate()} holds that cache already, finished; name another place with -o")


def without_versions(init: CacheInit) -> CacheInit:
    """Return an init record without what versions of libraries may change."""
    return replace(init, objects={}, environment={})
