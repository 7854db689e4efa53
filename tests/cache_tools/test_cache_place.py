"""The folder of a cache: what others keep there is let be, and what lies in the way is named."""

import json
import os
import re
import shutil
import threading
from pathlib import Path

import pytest

from mmkd.cache_tools.cache.reader import CacheReader
from mmkd.cache_tools.layout import SplitLayout, commit_key, is_own_key
from mmkd.cache_tools.storage.local_store import LocalStore
from mmkd.cache_tools.storage.open import open_store
from mmkd.cache_tools.upkeep.free_place import require_own_place
from mmkd.cache_tools.upkeep.merge import merge_caches
from mmkd.cache_tools.upkeep.verify import verify_cache
from mmkd.data_manifests.errors import InputError, StorageError, VerificationError
from mmkd.data_manifests.regular_file import read_regular
from tests.helpers.forked import Forked, contents
from tests.helpers.in_process import call, call_ok, refused
from tests.helpers.many_clips import files_of, logits_of, manifest_of
from tests.helpers.small_cache import write_cache

MANIFEST = manifest_of(range(6))
MINE = (
    "notes.txt",
    "thesis/chapter.tex",
    "commits/README",
    "targets.zarr/.DS_Store",
    "tasks/todo.md",
    "a b/x.json",
)
LOGITS = "targets.zarr/train/rgb/logits/verb/c/0/0/0"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A finished cache, not to be written into."""
    root = tmp_path_factory.mktemp("small") / "cache"
    write_cache(root, MANIFEST, logits_of(MANIFEST), shard_rows=4, shard_views=2)
    return root


@pytest.fixture
def cache(small, tmp_path):
    return shutil.copytree(small, tmp_path / "cache")


def put(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("mine")


# ---- other people's files


def test_every_key_of_a_cache_is_known_and_nothing_else(small):
    keys = set(files_of(small))
    assert len(keys) > 60
    assert not [key for key in keys if not is_own_key(key)]
    shard = next(SplitLayout("train", 4, 2, 2, 2).shards())
    own = [commit_key(shard, "rgb", "f" * 64), "claims/init/3.json", "claims/train/0-0/0.json"]
    own += ["tasks/0123456789ab-1-1-01234567.json", "journal/0123456789ab-12-345-89abcdef-0.jsonl"]
    assert not [key for key in own if not is_own_key(key)]
    others = [*MINE, *(f"{key}.swp" for key in sorted(keys)[:9]), "init.json/x", "targets.zarr/train/rgb/mine"]
    others += ["claims/train/0-0/.nfs0001", "tasks/.nfs0001", "journal/a.txt", "targets.zarr/a/b/c/d/zarr.json", ""]
    assert not [key for key in others if is_own_key(key)]


def test_repair_removes_what_is_damaged_or_left_over_and_no_file_of_others(cache, small):
    leftover = "targets.zarr/train/rgb/logits/verb/c/9/0/0"
    put(cache, *MINE, leftover)
    (cache / "mine" / "empty").mkdir(parents=True)
    found = json.loads(call_ok("mmkd-cache", "verify", cache, "--json"))
    assert (found["leftovers"], found["foreign"]) == ([leftover], sorted(MINE))
    assert "foreign   6 files, e.g. a b/x.json: not the cache's, left alone" in call_ok(
        "mmkd-cache", "verify", cache
    )
    (cache / LOGITS).write_bytes(b"torn")
    assert "leftovers 1, e.g. targets.zarr/train/rgb/logits/verb/c/9/0/0: removed" in call_ok(
        "mmkd-cache", "verify", cache, "--repair"
    )
    left = files_of(cache)
    assert [name for name in MINE if left.pop(name) != b"mine"] == []
    assert (cache / "mine" / "empty").is_dir()
    record = next(key for key in files_of(small) if re.fullmatch(r"commits/train/rgb/\w+/0-0\.json", key))
    assert files_of(small).keys() - left.keys() == {"root.json", "index.jsonl", LOGITS, record}
    assert left.items() <= files_of(small).items()


def test_a_folder_that_holds_other_things_is_refused_and_named(quick: Forked, small, tmp_path):
    out = tmp_path / "project"
    put(out, "notes.txt", "src/main.py")
    result = quick.build(out)
    assert result.code == 2
    assert "not a cache (it holds notes.txt, src); name a new or empty folder with -o, such as" in result.err
    assert set(files_of(out)) == {"notes.txt", "src/main.py"}
    call_ok("mmkd-cache", "export", small, tmp_path / "cache.h5")
    assert "it holds notes.txt, src" in refused("mmkd-cache", "import", tmp_path / "cache.h5", "-o", out)
    put(tmp_path / "tasks", "tasks/todo.md")
    with pytest.raises(InputError, match=r"it holds tasks/todo\.md"):
        require_own_place(LocalStore(tmp_path / "tasks"))
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="is a file, not a folder"):
        require_own_place(LocalStore(tmp_path / "file"))
    put(tmp_path / "new", ".DS_Store", "Thumbs.db", ".nfs0000001")
    call_ok("mmkd-cache", "import", tmp_path / "cache.h5", "-o", tmp_path / "new")
    put(tmp_path / "new", "notes.txt")
    require_own_place(LocalStore(tmp_path / "new"))  # a cache is there


# ---- paths


def test_a_cache_is_found_by_a_path_with_dots(cache, small, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for name in ("../cache", "../elsewhere/../cache", f"file://{tmp_path}/elsewhere/../cache"):
        assert "0 damaged" in call_ok("mmkd-cache", "verify", name)
        assert "finished" in call_ok("mmkd-cache", "status", name)
        with pytest.raises(VerificationError, match="lies outside"):
            open_store(name).read("../cache/init.json")
    with pytest.raises(InputError, match="is one of the caches to merge"):
        merge_caches([cache], "../cache", MANIFEST)
    call_ok("mmkd-cache", "export", "../cache", "../a.h5")
    call_ok("mmkd-cache", "import", "../a.h5", "-o", "../elsewhere/../b")
    assert files_of(tmp_path / "b") == files_of(small)


# ---- strangers within an unfinished cache


def test_stray_files_in_an_unfinished_cache_are_passed_over(quick: Forked, tmp_path):
    out = tmp_path / "cache"
    acts = [{"match": r"opened commits/train/rgb/\w+/1-0\.json", "do": "kill"}]
    assert quick.build(out, faults={"acts": acts}).code == -9
    strays = []
    for folder in ("claims/init", "claims/train/0-0", "tasks", "commits", "journal", "targets.zarr/train"):
        strays += [f"{folder}/{name}" for name in (".nfs0000002a", ".DS_Store", "0.json.swp", "x.json", "²-²")]
    strays += ["commits/train/rgb/x/0-0.json", ".tmp/notes/x"]
    put(out, *strays)
    (out / "journal" / f"0123456789ab-1-1-{'0' * 8}-0.jsonl").write_text('[1]\n{"unix_seconds": []}\n3\n{\n')
    (out / "claims" / "train" / "1-0" / "7.json").write_text("[]")  # half a claim
    assert "not finished" in quick.run("status", out).out
    assert quick.run("verify", out).code == 0
    resumed = quick.build(out)
    assert resumed.code == 0, resumed.err
    left = contents(out)  # without the journal
    assert [name for name in strays if (out / name).read_bytes() != b"mine"] == []
    assert {key: data for key, data in left.items() if key not in strays} == contents(quick.cache)


@pytest.mark.parametrize("key", ["claims/init/0.json", "claims/train/0-0/0.json", "init.json"])
def test_a_folder_in_the_place_of_a_file_is_named_and_waits_for_nobody(quick: Forked, tmp_path, key):
    (tmp_path / "cache" / key / "x").mkdir(parents=True)
    result = quick.build(tmp_path / "cache")
    assert result.code == 74, result.err
    assert "Traceback" not in result.err
    assert re.search(rf"{key}( is in the way|: Is a directory)", result.err.splitlines()[-1]), result.err


# ---- what is not a file


def test_pipes_devices_and_huge_files_are_refused_at_once(tmp_path):
    pipe, huge = tmp_path / "pipe", tmp_path / "huge"
    os.mkfifo(pipe)
    huge.touch()
    os.truncate(huge, 1 << 42)
    for path, what in ((pipe, "a named pipe"), (Path("/dev/zero"), "a device"), (huge, "larger than")):
        with pytest.raises(OSError, match=what):
            read_regular(path)
    with pytest.raises(IsADirectoryError):
        read_regular(tmp_path)
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert read_regular(tmp_path / "link", at_most_bytes=5) == b"12345"
    with pytest.raises(OSError, match="larger than the 4 bytes"):
        read_regular(tmp_path / "file", at_most_bytes=4)


@pytest.mark.parametrize("key", [LOGITS, "root.json", "init.json"])
@pytest.mark.parametrize("what", ["pipe", "device"])
def test_a_pipe_or_device_in_the_place_of_an_object_is_damage_that_repair_removes(cache, key, what):
    (cache / key).unlink()
    if what == "pipe":
        os.mkfifo(cache / key)
    else:
        (cache / key).symlink_to("/dev/zero")
    found = call("mmkd-cache", "verify", cache)
    assert found.code == 4
    assert key in found.err
    assert "not a regular file" in found.out
    if key != LOGITS:
        assert "not a regular file" in refused("mmkd-cache", "inspect", cache, code=4)
    call_ok("mmkd-cache", "verify", cache, "--repair")
    assert not os.path.lexists(cache / key)
    assert Path("/dev/zero").exists()


# ---- parts that lie elsewhere


def move_and_link(part: Path, elsewhere: Path) -> None:
    shutil.move(part, elsewhere)
    part.symlink_to(elsewhere)


def test_parts_that_were_moved_and_linked_back_are_parts_of_the_cache(quick: Forked, tmp_path):
    out = tmp_path / "cache"
    acts = [{"match": r"opened commits/train/rgb/\w+/1-0\.json", "do": "kill"}]
    assert quick.build(out, faults={"acts": acts}).code == -9
    for number, part in enumerate(("targets.zarr/train", "commits", "claims")):
        move_and_link(out / part, tmp_path / f"elsewhere-{number}")
    (out / "commits" / "train" / "around").symlink_to(out)
    built = quick.build(out, "--json")
    assert built.code == 0, built.err
    assert json.loads(built.out)["skipped_shards"] == 1
    assert quick.run("verify", out).code == 0
    (out / "commits" / "train" / "around").unlink()
    files = {
        os.path.relpath(Path(folder) / name, out): (Path(folder) / name).read_bytes()
        for folder, _, names in os.walk(out, followlinks=True)
        for name in names
    }
    assert {key: data for key, data in files.items() if not key.startswith("journal/")} == contents(quick.cache)


def test_parts_on_another_disk_are_read_and_refused_by_name_when_written(small, tmp_path):
    disk = Path("/dev/shm")
    if not disk.is_dir() or disk.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system")
    out, elsewhere = shutil.copytree(small, tmp_path / "cache"), disk / f"mmkd-{os.getpid()}"
    try:
        move_and_link(out / "commits", elsewhere)
        assert verify_cache(out).damaged == {}
        with pytest.raises(InputError, match=r"lies on another disk than .*link the cache's whole folder"):
            LocalStore(out).write("commits/train/x", b"")
        with pytest.raises(InputError, match="lies on another disk"):
            LocalStore(out).delete(next(key for key in files_of(small) if key.startswith("commits/")))
    finally:
        shutil.rmtree(elsewhere)


def test_a_link_to_nowhere_is_not_waited_for(cache):
    shutil.rmtree(cache / "targets.zarr" / "train")
    (cache / "targets.zarr" / "train").symlink_to(cache / "lost disk")
    assert call("mmkd-cache", "verify", cache).code == 4
    with pytest.raises(StorageError, match=r"cannot write .*Not a directory"):
        LocalStore(cache).create(LOGITS, b"")


# ---- repair


def test_what_was_computed_of_other_videos_does_not_survive_a_lost_init(quick: Forked, tmp_path):
    out, videos = tmp_path / "cache", shutil.copytree(quick.root / "videos", tmp_path / "videos")
    assert quick.build(out, "--videos", videos).code == 0
    first, second = (next(videos.glob(f"{clip}.*")) for clip in CacheReader(out).split("train").clip_ids[:2])
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(kept)
    (out / "init.json").write_bytes((out / "init.json").read_bytes()[:-9])
    assert quick.run("verify", out, "--repair").code == 0
    rebuilt, fresh = (quick.build(place, "--videos", videos) for place in (out, tmp_path / "fresh"))
    assert (rebuilt.code, fresh.code) == (0, 0), rebuilt.err
    assert contents(out) == contents(tmp_path / "fresh")
    (out / "init.json").unlink()
    again = json.loads(quick.build(out, "--videos", videos, "--json").out)
    assert again["shards"] == 0, "of the same videos nothing is computed again"
    other = json.loads(quick.build(out, "--videos", videos, "--set", "build.shard_rows=5", "--json").out or "{}")
    assert other == {}, "the layout of a cache stays"
    (out / "init.json").unlink()
    other = json.loads(quick.build(out, "--videos", videos, "--set", "build.shard_rows=5", "--json").out)
    assert other["skipped_shards"] == 0, "blocks of other rows vouch for nothing"


def test_experts_that_a_lost_init_knew_come_back_without_being_computed_again(quick: Forked, tmp_path):
    out = quick.copy(tmp_path / "cache")
    for name in ("init.json", "root.json", "index.jsonl"):
        (out / name).unlink()
    for expert in ("rgb", "boxes"):
        built = quick.build(out, "--json", experts=(expert,))
        assert (built.code, json.loads(built.out)["shards"]) == (0, 0), built.err
    assert contents(out) == contents(quick.cache)


def test_two_tasks_never_share_a_writers_folder(tmp_path):
    stores = [LocalStore(tmp_path) for _ in range(4)]
    start = threading.Barrier(4)

    def write(number):
        start.wait()
        for key in range(20):
            stores[number].write(f"a/{number}-{key}", b"x")
            stores[number].tidy()
            stores[number].delete(f"a/{number}-{key}")

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(stores[0].writers()) == 4
    for store in stores:
        store.end()
    assert files_of(tmp_path) == {}
