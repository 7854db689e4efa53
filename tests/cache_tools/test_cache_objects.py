"""The bytes of a cache: whole shards, records written last, and everything damaged or missing is refused."""

import dataclasses
import errno
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmkd.cache_tools.cache.arrays import (
    ArraySpec,
    decode_array,
    encode_block,
    encode_group,
    split_arrays,
    static_arrays,
)
from mmkd.cache_tools.cache.commits import CommitRecord, Unusable, hash_objects, publish, read_commit, read_verified
from mmkd.cache_tools.cache.logit_formats import FORMATS
from mmkd.cache_tools.layout import Shard, SplitLayout, commit_key, group_key
from mmkd.cache_tools.storage.local_store import LocalStore
from mmkd.data_manifests import atomic
from mmkd.data_manifests.atomic import write_atomically
from mmkd.data_manifests.errors import InputError, StorageError, VerificationError

SPLIT = SplitLayout("train", rows=13, views=4, shard_rows=6, shard_views=2)
SPEC = ArraySpec("train/rgb/logits/action", (18, 4, 5), "float16", float("nan"))
FINGERPRINT = "f" * 64
META = f"{SPEC.name}/zarr.json"


def group_of(*specs, split=SPLIT, static=None):
    return encode_group(static or {}, [(spec, split) for spec in specs], {split.name: split.shard_views})


def random_block(seed=0, shape=(6, 2, 5)):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float16)


# ---- layout


@given(st.integers(1, 40), st.integers(1, 8), st.integers(1, 12), st.integers(1, 8))
@settings(deadline=None, database=None, derandomize=True)
def test_shards_tile_rows_and_views_exactly_once(rows, blocks, shard_rows, shard_views):
    split = SplitLayout("train", rows, blocks * shard_views, shard_rows, shard_views)
    shards = list(split.shards())
    cells = [(row, view) for shard in shards for row in shard.rows for view in shard.views]
    assert sorted(cells) == [(row, view) for row in range(rows) for view in range(split.views)]
    assert len({shard.name for shard in shards}) == len(shards)
    assert all(len(shard.rows) > 0 and len(shard.views) == shard_views for shard in shards)
    assert split.padded_rows % shard_rows == 0
    assert 0 <= split.padded_rows - rows < shard_rows


@pytest.mark.parametrize("values", [(0, 2, 1, 1), (3, 0, 1, 1), (3, 2, 0, 1), (3, 2, 1, 0), (3, 4, 1, 3)])
def test_blocks_that_tile_nothing_are_refused(values):
    with pytest.raises(ValueError, match="do not tile"):
        SplitLayout("train", *values)


# ---- arrays


def test_blocks_come_back_where_they_were_written_and_the_rest_is_fill():
    objects = group_of(SPEC)
    expected = np.full(SPEC.shape, np.nan, np.float16)
    for seed, shard in enumerate(list(SPLIT.shards())[:-1]):
        start = (shard.rows.start, shard.views.start)
        block = random_block(seed)
        expected[start[0] : start[0] + 6, start[1] : start[1] + 2] = block
        encoded = encode_block(SPEC.name, objects[META], start=start, block=block)
        assert list(encoded) == [f"{SPEC.name}/c/{shard.row_block}/{shard.view_block}/0"]
        objects |= encoded
    np.testing.assert_array_equal(decode_array(SPEC.name, objects), expected)


@pytest.mark.parametrize("shard_rows", [1, 7, 64, 65, 200])
@pytest.mark.parametrize(("dtype", "fill"), [("float16", float("nan")), ("uint64", 0), ("uint8", 255)])
def test_round_trip_of_one_shard(shard_rows, dtype, fill):
    split = SplitLayout("train", rows=shard_rows, views=3, shard_rows=shard_rows, shard_views=3)
    spec = ArraySpec("train/a", (split.padded_rows, 3, 2), dtype, fill)
    block = np.random.default_rng(shard_rows).integers(0, 256, spec.shape).astype(dtype)
    objects = group_of(spec, split=split)
    objects |= encode_block(spec.name, objects["train/a/zarr.json"], start=(0, 0), block=block)
    decoded = decode_array(spec.name, objects)
    assert decoded.dtype == dtype
    np.testing.assert_array_equal(decoded, block)


def test_a_block_of_nothing_but_fill_is_still_an_object():
    metadata = group_of(SPEC)[META]
    block = np.full((6, 2, 5), np.nan, np.float16)
    encoded = encode_block(SPEC.name, metadata, start=(6, 2), block=block)
    assert list(encoded) == [f"{SPEC.name}/c/1/1/0"]


def test_an_inner_chunk_of_nothing_but_fill_is_stored_with_its_checksum():
    split = SplitLayout("train", rows=128, views=1, shard_rows=128, shard_views=1)
    spec = ArraySpec("train/rgb/logits/action", (128, 1, 5), "float16", float("nan"))
    block = np.full(spec.shape, np.nan, np.float16)
    block[64:] = 1
    encoded = encode_block(spec.name, group_of(spec, split=split)[META], start=(0, 0), block=block)
    # The shard ends in its index: offset and length of both inner chunks, all ones where one is absent, and a CRC.
    index = np.frombuffer(next(iter(encoded.values()))[-36:-4], "<u8").reshape(2, 2)
    assert (index[:, 1] < 2**20).all()


def test_a_block_is_encoded_to_the_same_bytes_again():
    metadata = group_of(SPEC)[META]
    first, second = (encode_block(SPEC.name, metadata, start=(0, 0), block=random_block()) for _ in range(2))
    assert first == second
    assert group_of(SPEC) == group_of(SPEC)


@pytest.mark.parametrize(
    ("start", "block"),
    [
        ((0, 0), random_block(shape=(5, 2, 5))),
        ((0, 0), random_block(shape=(6, 1, 5))),
        ((0, 0), random_block(shape=(12, 2, 5))),
        ((0, 0), random_block(shape=(6, 2, 4))),
        ((3, 0), random_block()),
        ((0, 1), random_block()),
        ((0, 0), random_block().astype(np.float32)),
    ],
)
def test_what_is_not_one_whole_shard_is_refused(start, block):
    metadata = group_of(SPEC)[META]
    with pytest.raises(ValueError, match="not one whole shard"):
        encode_block(SPEC.name, metadata, start=start, block=block)


def test_a_flipped_bit_is_caught_by_the_checksums_inside_a_shard():
    objects = group_of(SPEC)
    ((key, data),) = encode_block(SPEC.name, objects[META], start=(0, 0), block=random_block()).items()
    for position in range(0, len(data), 3):
        torn = bytearray(data)
        torn[position] ^= 1 << position % 8
        with pytest.raises(Exception):  # noqa: B017, PT011 - which codec notices first is zarr's own affair
            decode_array(SPEC.name, objects | {key: bytes(torn)})


def test_static_arrays_round_trip_with_an_object_for_each_chunk():
    values = {
        "clip_id": ["74225", "Straße", "a b"],
        "flip": np.zeros((3, 2), np.bool_),
        "facts": np.arange(12, dtype=np.int32).reshape(3, 4),
    }
    labels = {"action": np.zeros(3, np.int64), "noun": np.array([-1, 0, 2])}
    static = static_arrays("train", values, labels)
    assert list(static) == ["train/clip_id", "train/flip", "train/facts", "train/label/action", "train/label/noun"]
    objects = group_of(static=static)
    for name, value in static.items():
        decoded = decode_array(name, objects)
        assert decoded.tolist() == np.asarray(value).tolist()
        chunk = f"{name}/c/" + "/".join("0" * decoded.ndim)
        assert chunk in objects, "an absent chunk would read as zeros, unchecked"


def test_arrays_of_a_split_have_room_for_every_expert_and_head():
    specs = split_arrays(
        SPLIT, dict.fromkeys(["rgb", "flow"], FORMATS["fp16"]), {"verb": 97, "noun": 300}, thumbnail_size=144
    )
    found = {spec.name: (spec.shape, spec.dtype) for spec in specs}
    assert found == {
        "train/thumbprint/hash": ((18, 4), "uint64"),
        "train/thumbprint/thumbnail": ((18, 4, 144), "uint8"),
    } | {
        f"train/{expert}/{name}": value
        for expert in ("rgb", "flow")
        for name, value in {
            "status": ((18, 4), "uint8"),
            "logits/verb": ((18, 4, 97), "float16"),
            "maximum/verb": ((18, 4), "float32"),
            "logits/noun": ((18, 4, 300), "float16"),
            "maximum/noun": ((18, 4), "float32"),
        }.items()
    }
    fills = {spec.name: spec.fill for spec in specs}
    assert fills["train/rgb/status"] == 255
    assert np.isnan([fills["train/rgb/logits/verb"], fills["train/rgb/maximum/verb"]]).all()


@pytest.mark.parametrize("name", ["thumbprint", "label", "flip", "facts", "a/b", "..", "", "a b"])
def test_a_name_that_another_array_has_cannot_be_an_experts(name):
    with pytest.raises(InputError, match="cannot name an expert"):
        split_arrays(SPLIT, {name: FORMATS["fp16"]}, {"action": 3}, thumbnail_size=144)


# ---- commits


@pytest.fixture
def committed(tmp_path):
    """A cache with one published shard of one expert."""
    store, shard = LocalStore(tmp_path / "cache"), Shard(SPLIT, 1, 0)
    objects = encode_block(SPEC.name, group_of(SPEC)[META], start=(6, 0), block=random_block())
    record = CommitRecord(
        shard=shard.name,
        node="rgb",
        fingerprint=FINGERPRINT,
        objects=hash_objects(objects),
        unusable=(Unusable(7, "clip-7", 1, "frames after 3 s: cannot decode"),),
        worst_kl={"action": 1.5e-7},
    )
    publish(store, shard, record, objects)
    return store, shard, record, objects


def path_of(store, shard, node="rgb"):
    return store.root / commit_key(shard, node, FINGERPRINT)


def test_a_published_shard_reads_back_whole(committed):
    store, shard, record, objects = committed
    assert read_commit(store, shard, "rgb", FINGERPRINT) == record
    for key, data in objects.items():
        assert read_verified(store, group_key(key), record.objects[key]) == data
    assert read_commit(store, shard, "flow", FINGERPRINT) is None
    assert read_commit(store, Shard(SPLIT, 0, 0), "rgb", FINGERPRINT) is None
    assert not [path for path in (store.root / ".tmp").rglob("*") if path.is_file()]


def test_records_of_equal_results_are_equal_bytes(committed):
    *_, record, _ = committed
    shuffled = dataclasses.replace(record, objects=dict(reversed(record.objects.items())))
    assert shuffled.to_bytes() == record.to_bytes()
    assert CommitRecord.from_bytes(record.to_bytes(), "here") == record


def test_the_record_is_written_after_every_object(committed, monkeypatch):
    store, shard, record, objects = committed
    objects = objects | {"train/rgb/status/c/1/0": b"more"}
    record = dataclasses.replace(record, objects=hash_objects(objects))
    written = []
    monkeypatch.setattr(store, "write", lambda key, data: written.append(store.root / key))
    publish(store, shard, record, objects)
    assert written[-1] == path_of(store, shard)
    assert set(written[:-1]) == {store.root / group_key(key) for key in objects}


def test_a_record_that_does_not_describe_the_objects_is_never_published(committed):
    store, shard, record, objects = committed
    changed = {key: data + b"\0" for key, data in objects.items()}
    before = path_of(store, shard).read_bytes()
    with pytest.raises(ValueError, match="does not describe"):
        publish(store, shard, record, changed)
    with pytest.raises(ValueError, match="does not describe"):
        publish(store, shard, record, objects | {"extra": b""})
    assert path_of(store, shard).read_bytes() == before
    assert not (store.root / group_key("extra")).exists()


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: b"", lambda data: data[:9] + b"!" + data[10:]]
)
def test_a_truncated_or_changed_object_is_refused(committed, damage):
    store, _, record, objects = committed
    (key,) = objects
    path = store.root / group_key(key)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(VerificationError, match=r"c/1/0/0 is damaged .*build"):
        read_verified(store, group_key(key), record.objects[key])


def test_a_missing_object_is_refused(committed):
    store, _, record, objects = committed
    (key,) = objects
    (store.root / group_key(key)).unlink()
    with pytest.raises(VerificationError, match=r"c/1/0/0 is missing; run `mmkd-cache verify --repair`"):
        read_verified(store, group_key(key), record.objects[key])


def test_an_object_that_cannot_be_read_is_a_storage_error(committed):
    store, shard, record, objects = committed
    (key,) = objects
    (store.root / group_key(key)).unlink()
    (store.root / group_key(key)).mkdir()
    with pytest.raises(StorageError, match="cannot read"):
        read_verified(store, group_key(key), record.objects[key])
    path_of(store, shard).unlink()
    path_of(store, shard).mkdir()
    with pytest.raises(StorageError, match="cannot read"):
        read_commit(store, shard, "rgb", FINGERPRINT)


@pytest.mark.parametrize("key", ["../../init.json", "../init.json", "train/../../init.json"])
def test_an_object_outside_of_the_group_is_never_read(committed, key):
    store = committed[0]
    (store.root.parent / "init.json").write_bytes(b"")
    empty = hash_objects({"": b""})[""]
    with pytest.raises(VerificationError, match="outside"):
        read_verified(store, group_key(key), empty)


def test_a_record_with_any_byte_changed_is_refused(committed):
    store, shard, record, _ = committed
    path = path_of(store, shard)
    data = path.read_bytes()
    for position in range(len(data) - 1):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with pytest.raises(VerificationError, match=r"1-0\.json is (damaged|of schema)"):
            read_commit(store, shard, "rgb", FINGERPRINT)
    path.write_bytes(data)
    assert read_commit(store, shard, "rgb", FINGERPRINT) == record


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"3", b'"text"', b"null", b"\xff", b'{"seal": 3}'])
def test_what_is_no_record_is_refused(data):
    with pytest.raises(VerificationError, match=r"here is damaged .*run `mmkd-cache verify --repair`"):
        CommitRecord.from_bytes(data, "here")


def test_a_truncated_record_is_refused(committed):
    data = committed[2].to_bytes()
    for length in range(len(data) - 1):
        with pytest.raises(VerificationError, match="here is damaged"):
            CommitRecord.from_bytes(data[:length], "here")


def test_a_record_of_another_schema_is_refused(committed):
    other = dataclasses.replace(committed[2], schema="mmkd-cache-1")
    with pytest.raises(VerificationError, match=r"here is of schema 'mmkd-cache-1', this version reads"):
        CommitRecord.from_bytes(other.to_bytes(), "here")


def test_a_record_in_another_shards_place_is_refused(committed):
    store, shard, *_ = committed
    for other, node in ((Shard(SPLIT, 0, 0), "rgb"), (shard, "flow")):
        place = path_of(store, other, node)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(path_of(store, shard).read_bytes())
        with pytest.raises(VerificationError, match="is the record of rgb of train/1-0"):
            read_commit(store, other, node, FINGERPRINT)


def test_a_record_says_no_time_and_no_host(committed):
    value = json.loads(committed[2].to_bytes())
    assert set(value) == {"shard", "node", "fingerprint", "objects", "unusable", "worst_kl", "schema", "seal"}


# ---- atomic writes


def test_a_write_makes_folders_and_replaces_the_old_file(tmp_path):
    path = tmp_path / "a" / "b" / "file"
    write_atomically(path, b"old")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(path.parent.iterdir()) == [path]


def test_the_longest_name_that_a_file_may_have_can_be_written(tmp_path):
    path = tmp_path / ("n" * 255)
    write_atomically(path, [b"in ", b"parts"])
    assert path.read_bytes() == b"in parts"


def test_two_writers_of_one_path_never_share_a_temporary_file(tmp_path):
    path = tmp_path / "file"
    with atomic.atomic_path(path) as first, atomic.atomic_path(path) as second:
        first.write_bytes(b"first")
        second.write_bytes(b"second")
    assert path.read_bytes() == b"first"  # the outer block ends last
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("failing", ["fsync", "open", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failing, code):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(*arguments, **options):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(
        *{"fsync": (atomic.os, "fsync"), "open": (Path, "open"), "replace": (Path, "replace")}[failing], fail
    )
    with pytest.raises(StorageError) as caught:
        write_atomically(path, b"new")
    monkeypatch.undo()
    assert str(path) in str(caught.value)
    assert ("free some space" in str(caught.value)) == (code == errno.ENOSPC)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_in_the_place_of_a_folder_is_a_storage_error(tmp_path):
    (tmp_path / "folder").write_bytes(b"")
    with pytest.raises(StorageError, match="cannot write"):
        write_atomically(tmp_path / "folder" / "deeper" / "file", b"data")


LIMITED_WRITE = """
import resource, signal, sys
from pathlib import Path
from mmkd.data_manifests.atomic import write_atomically
from mmkd.data_manifests.errors import StorageError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_atomically(Path(sys.argv[1]), b"n" * 5000)
except StorageError as error:
    print(error)
    sys.exit(74)
"""


def test_the_system_refusing_half_of_a_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    done = subprocess.run(
        [sys.executable, "-c", LIMITED_WRITE, path], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 74, done.stderr
    assert str(path) in done.stdout
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


KILLED_WRITES = """
import sys
from pathlib import Path
from mmkd.data_manifests.atomic import write_atomically
print("ready", flush=True)
for number in range(10**9):
    write_atomically(Path(sys.argv[1]), bytes([number % 256]) * 300_000)
"""


def test_a_killed_writer_leaves_a_whole_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"\0" * 300_000)
    with subprocess.Popen([sys.executable, "-c", KILLED_WRITES, path], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        for _ in range(300):  # a reader beside it never sees a part either
            data = path.read_bytes()
            assert len(data) == 300_000
            assert len(set(data)) == 1
        process.send_signal(signal.SIGKILL)
    data = path.read_bytes()
    assert len(data) == 300_000
    assert len(set(data)) == 1


def test_a_write_is_synced_before_it_is_moved_and_its_folder_after(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, Path.replace

    def record_fsync(descriptor):
        calls.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def record_replace(self, target):
        calls.append("replace")
        return replace(self, target)

    monkeypatch.setattr(atomic.os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "replace", record_replace)
    write_atomically(tmp_path / "file", b"data")
    assert calls == ["file", "replace", "folder"]
