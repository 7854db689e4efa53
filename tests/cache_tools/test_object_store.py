"""Caches in object stores, against an S3 server on this machine: the promises of a store, and whole caches."""

import importlib
import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from mmkd.cache_tools.cache.reader import CacheReader
from mmkd.cache_tools.layout import SplitLayout
from mmkd.cache_tools.storage.local_store import LocalStore
from mmkd.cache_tools.storage.object_store import ObjectStore
from mmkd.cache_tools.storage.open import open_store
from mmkd.cache_tools.storage.store import MissingObjectError, TakenOverError
from mmkd.cache_tools.tasks.claims import Claims
from mmkd.cache_tools.tasks.heartbeat import OtherTasks, Task, live_tasks, new_task_id
from mmkd.data_manifests.errors import InputError, StorageError, VerificationError
from mmkd.data_manifests.manifest import Clip, Head, Manifest
from mmkd.student.teacher.cached_targets import shared_targets
from mmkd.student.teacher.mixing import Mixture
from tests.helpers.commands import ENVIRONMENT
from tests.helpers.in_process import call, call_ok, refused
from tests.helpers.s3_server import BUCKET, SECRET, s3_server
from tests.helpers.small_cache import write_cache

MANIFEST = Manifest(
    "demo",
    (Head("verb", ("cut", "mix", "pour")),),
    tuple(Clip(f"c{i}", f"{i}.webm", "train", {"verb": i % 3}) for i in range(4)),
)
PLACE = "where the cache is"
LOGITS = np.random.default_rng(5).standard_normal((4, 2, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def server():
    with s3_server() as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setitem(ENVIRONMENT, name, value)
        yield environment


@pytest.fixture(params=["s3", "memory"])
def url(request, server):
    """A place that no test had before."""
    return f"{request.param}://{BUCKET}/{new_task_id()}"


@pytest.fixture(scope="module")
def cache(server):
    """A finished cache in the bucket."""
    url = f"s3://{BUCKET}/finished/cache"
    write_small(open_store(url))
    return url


def write_small(store):
    """One expert, two shards: every object is a request."""
    return write_cache(store, MANIFEST, {"train": {"rgb": {"verb": LOGITS}}}, shard_rows=2, shard_views=2)


def test_the_promises_of_a_store(url):
    store, other = open_store(url), open_store(url)
    assert store.list() == {}
    with pytest.raises(MissingObjectError):
        store.read("a/b")
    store.write("a/b", b"one")
    assert other.read("a/b") == b"one"
    assert set(other.list("a")) == {"a/b"}
    other.write("a/b", b"other")
    other.write("a/c/d", bytes(300))
    other.write("ab/c", b"")
    assert store.read("a/b") == b"other"
    assert {key: stored.size_bytes for key, stored in store.list("a").items()} == {"a/b": 5, "a/c/d": 300}
    assert list(store.list()) == ["a/b", "a/c/d", "ab/c"], "a fresh listing, whatever was listed before"
    assert store.exists("a/b")
    assert not store.exists("a")
    store.delete("a/b")
    store.delete("a/b")
    assert not other.exists("a/b")
    assert "a/b" not in other.list("a")
    assert store.locate("a/b") == f"{url}/a/b"
    for key in ("../x", "/x", "a/../../x", ""):
        with pytest.raises(VerificationError, match="lies outside"):
            store.write(key, b"")


def test_of_many_that_create_one_wins(url):
    stores = [open_store(url) for _ in range(6)]
    for round_number in range(3):
        start = threading.Barrier(len(stores))

        def create(number, round_number=round_number, start=start):
            start.wait()
            return stores[number].create(f"claim/{round_number}", f"task {number}".encode())

        with ThreadPoolExecutor(len(stores)) as pool:
            won = list(pool.map(create, range(len(stores))))
        assert sum(won) == 1
        assert stores[0].read(f"claim/{round_number}") == f"task {won.index(True)}".encode()
    assert stores[won.index(True)].create("claim/2", f"task {won.index(True)}".encode()), "an answer that was lost"


def test_claims_and_signs_of_life(url):
    layout = SplitLayout("train", 4, 1, 1, 1)
    stores = [open_store(url) for _ in range(3)]
    taken = []
    tasks = [Task(store, new_task_id(), beat_seconds=60) for store in stores]
    with tasks[0], tasks[1], tasks[2]:
        assert live_tasks(stores[0]) == {task.id for task in tasks}
        claims = [Claims(task, OtherTasks(task)) for task in tasks]

        def work(own):
            for shard in layout.shards():
                if own.take(shard):
                    taken.append(shard.name)
                    assert own.holds(shard)

        with ThreadPoolExecutor(3) as pool:
            list(pool.map(work, claims))
        assert sorted(taken) == sorted(shard.name for shard in layout.shards())
        for own in claims:
            for shard in layout.shards():
                own.release(shard)
    assert stores[0].list() == {}


def test_a_task_taken_for_dead_changes_nothing_any_more(url):
    first, second = open_store(url), open_store(url)
    with Task(first, new_task_id(), beat_seconds=60) as dead, Task(second, new_task_id()) as own:
        assert set(first.writers()) == {dead.id, own.id}
        second.write("init.json", b"theirs")
        OtherTasks(own).bury(dead.id)
        changes = (
            dead.beat,
            lambda: first.write("init.json", b"mine"),
            lambda: first.create("claims/init/0.json", b""),
            lambda: first.delete("init.json"),
        )
        for change in changes:
            with pytest.raises(TakenOverError, match="another task went on while this one slept; run it again"):
                change()
        assert second.read("init.json") == b"theirs"
        assert live_tasks(first) == {own.id}
    assert set(second.list()) == {"init.json"}
    assert second.writers() == {}


def test_a_server_without_conditional_puts_is_found_out(url, monkeypatch, caplog):
    store = ObjectStore(url)
    put = store._files.pipe_file
    monkeypatch.setattr(store._files, "pipe_file", lambda path, data, mode="overwrite": put(path, data))
    assert store.create("claim", b"a")
    assert not store.create("claim", b"b")
    assert store.read("claim") == b"a"
    assert [record.message for record in caplog.records if "one task at a time" in record.message]
    assert len(caplog.records) == 1, "said once"


def test_the_bytes_are_those_of_a_local_cache(cache, tmp_path):
    local = write_small(LocalStore(tmp_path))
    store = open_store(cache)
    assert {key: store.read(key) for key in store.list()} == {key: local.read(key) for key in local.list()}


def test_reading_and_the_trainers_targets(cache, tmp_path):
    reader, rows = CacheReader(cache), np.arange(4)
    np.testing.assert_allclose(reader.logits("train", "rgb")["verb"], LOGITS, atol=0.01)
    weights = {"verb": Mixture({"rgb": 1.0})}
    targets = shared_targets(reader, "train", weights, missing="renormalise", rows=rows, directory=tmp_path)
    found = targets.targets(rows, np.ones_like(rows))["verb"]
    np.testing.assert_array_equal(found, reader.logits("train", "rgb")["verb"][:, 1])


def test_commands_take_a_url_and_repair_it(cache, server, tmp_path):
    store, url = open_store(cache), f"s3://{BUCKET}/imported"
    call_ok("mmkd-cache", "export", cache, tmp_path / "a.h5")
    call_ok("mmkd-cache", "import", tmp_path / "a.h5", "-o", url)
    copy = open_store(url)
    assert {key: copy.read(key) for key in copy.list()} == {key: store.read(key) for key in store.list()}
    assert "finished" in call_ok("mmkd-cache", "status", url)
    assert "demo" in call_ok("mmkd-cache", "inspect", url)
    damaged = next(key for key in copy.list() if "rgb/logits/verb/c/" in key)
    copy.write(damaged, b"x" + copy.read(damaged)[1:])
    found = call("mmkd-cache", "verify", url)
    assert found.code == 4
    assert damaged in found.err
    call_ok("mmkd-cache", "verify", "--repair", url)
    assert not copy.exists(damaged)
    assert "not finished" in call_ok("mmkd-cache", "status", url)
    assert "lacks rgb of" in refused("mmkd-cache", "finalize", url, code=4)


def test_errors_are_one_line_that_says_what_to_do(server, monkeypatch):
    with pytest.raises(StorageError, match=r"cannot write s3://no-such-bucket/cache/a: .*bucket"):
        open_store("s3://no-such-bucket/cache").write("a", b"")
    assert "is not a cache" in refused("mmkd-cache", "status", f"s3://{BUCKET}/nothing")
    for bad, what in (
        ("nonsense://bucket/cache", "cannot use nonsense://bucket/cache"),
        ("simplecache::s3://bucket/cache", "not a chain"),
        ("s3://", "names no place"),
        ("ftp://me:hidden@host/cache", "give credentials by"),
    ):
        with pytest.raises(InputError, match=what) as caught:
            open_store(bad)
        assert "hidden" not in str(caught.value)
        assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(importlib.import_module("fsspec.registry")._registry, "s3", raising=False)
    with pytest.raises(InputError, match=r"pip install 'mmkd\[s3\]'"):
        open_store("s3://bucket/cache")


def test_without_credentials_it_says_so(server, monkeypatch, tmp_path):
    for name in server:
        if name.startswith("AWS_") and "KEY" in name:
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(StorageError, match="no credentials found; set AWS_PROFILE"):
        open_store(f"s3://{BUCKET}/cache").read("init.json")


def test_a_build_to_s3_is_the_local_build_and_holds_no_secret(tiny, server):
    url = f"s3://{BUCKET}/built"
    call_ok("mmkd-cache", "build", *tiny.stage_one, *tiny.experts, "-o", url)
    built, local = open_store(url), open_store(tiny.root / "cache")
    objects = {key: built.read(key) for key in built.list()}
    journal = {key for key in objects if key.startswith("journal/")}
    assert journal
    assert not [key for key, data in objects.items() if SECRET.encode() in data or b"AKIA-OF" in data]
    expected = {key: local.read(key) for key in local.list() if not key.startswith("journal/")}
    assert {key: data for key, data in objects.items() if key not in journal} == expected
    assert "nothing left to do" in call_ok("mmkd-cache", "build", *tiny.stage_one, *tiny.experts, "-o", url)


def test_plan_measures_a_bucket_and_leaves_nothing_there(tiny, server):
    url = f"s3://{BUCKET}/planned"
    found = json.loads(call_ok("mmkd-cache", "plan", *tiny.stage_one, *tiny.experts, "-o", url, "--json"))
    assert (found["disk"]["folder"], found["disk"]["free_bytes"]) == (url, None)
    assert found["disk"]["bytes_per_second"] > 1000
    assert 0 < found["disk"]["object_seconds"] < 10
    assert open_store(url).list() == {}
    assert f"disk      {url}; writes" in call_ok("mmkd-cache", "plan", *tiny.stage_one, *tiny.experts, "-o", url)


def test_weigh_and_drift_say_of_a_bucket_what_they_say_of_the_local_cache(tiny, server, tmp_path):
    url = f"s3://{BUCKET}/examined"
    store, local = open_store(url), open_store(tiny.root / "cache")
    for key in local.list():
        store.write(key, local.read(key))
    for command in (
        ("weigh", PLACE, "--split", "standard", "--json"),
        ("drift", PLACE, *tiny.stage_one, *tiny.experts, "--sample", 8, "--json"),
    ):
        of_bucket, of_folder = (
            call_ok("mmkd-cache", *(place if part == PLACE else part for part in command))
            for place in (url, tiny.root / "cache")
        )
        assert len(of_folder) > 100
        assert of_bucket.replace(url, str(tiny.root / "cache")) == of_folder
