"""What a cache costs, counted: objects and bytes of a shard, what status and opening read, whatever its size."""

from collections import Counter

import pytest

from mmkd.cache_tools.cache.init_record import read_init
from mmkd.cache_tools.cache.reader import CacheReader
from mmkd.cache_tools.layout import SplitLayout
from mmkd.cache_tools.storage.local_store import LocalStore
from mmkd.cache_tools.tasks.finish import finalize_cache
from tests.benchmarks.scale import SHARD_ROWS, make_manifest, start, write_shards

CLASSES = 11


class CountingStore(LocalStore):
    """A store that counts what is asked of it."""

    def __init__(self, root):
        super().__init__(root)
        self.asked = Counter()

    def read(self, key):
        self.asked["read"] += 1
        return super().read(key)

    def list(self, prefix=""):
        self.asked["list"] += 1
        return super().list(prefix)

    def exists(self, key):
        self.asked["exists"] += 1
        return super().exists(key)


@pytest.fixture(scope="module", params=[2, 7])
def written(request, tmp_path_factory):
    """A store with all shards of so many, before and after finalize."""
    folder = tmp_path_factory.mktemp("scale")
    store = LocalStore(folder / "cache")
    rows = request.param * SHARD_ROWS - 5
    make_manifest(folder / "manifest.jsonl", rows, CLASSES)
    metadata, _ = start(store, folder / "manifest.jsonl")
    before = set(store.list())
    shards = list(SplitLayout("train", rows, 1, SHARD_ROWS, 1).shards())
    write_shards(store, metadata, shards, CLASSES)
    return store, shards, before


def test_a_shard_is_seven_objects_of_known_size(written):
    store, shards, before = written
    there = store.list()
    added = {key: there[key].size_bytes for key in there.keys() - before}
    assert len(shards) in (2, 7)
    assert len(added) == 7 * len(shards), "hash, thumbnail, logits, maximum, status and two records"
    logits = [size for key, size in added.items() if "/logits/" in key]
    assert max(logits) < SHARD_ROWS * CLASSES * 2 + 64 * 16, (
        "drawn logits do not compress, and cost 2 bytes a class"
    )
    records = [size for key, size in added.items() if key.startswith("commits/")]
    assert max(records) < 1200


def test_opening_and_planning_ask_as_often_whatever_the_size(written):
    store = CountingStore(written[0].root)
    read_init(store).missing(store)
    assert store.asked == {"read": 1, "list": 1}
    finalize_cache(written[0])
    store.asked.clear()
    CacheReader(store)
    assert store.asked == {"read": 3}
