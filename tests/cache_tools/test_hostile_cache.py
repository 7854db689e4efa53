"""A cache whose seals and hashes hold and whose JSON says anything at all: each reader ends with one clear error.

Every field of every JSON object of a tiny cache is left out, and replaced by each kind of JSON value; then all that
vouches for it is sealed again.
"""

import copy
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmkd.cache_tools.cache.arrays import decode_array, decode_block
from mmkd.cache_tools.cache.init_record import CacheInit, read_init
from mmkd.cache_tools.cache.reader import CacheReader
from mmkd.cache_tools.cache.root_record import RootRecord
from mmkd.cache_tools.cache.sealed import seal, unsealed
from mmkd.cache_tools.layout import GROUP, INDEX, INIT, ROOT, commit_key
from mmkd.cache_tools.storage.local_store import LocalStore
from mmkd.cache_tools.tasks.build_status import read_build_status
from mmkd.cache_tools.tasks.finish import finalize_cache
from mmkd.cache_tools.upkeep.inspect import describe_cache
from mmkd.cache_tools.upkeep.verify import verify_cache
from mmkd.data_manifests.errors import MmkdError, VerificationError
from mmkd.data_manifests.manifest import Clip, Head, Manifest
from tests.helpers.small_cache import write_cache

OTHER_VALUES = (None, True, -1, 1.5, "\0", [], {}, [1])
LEFT_OUT = object()
METADATA = (
    f"{GROUP}/train/clip_id/zarr.json",
    f"{GROUP}/train/label/action/zarr.json",
    f"{GROUP}/train/rgb/logits/action/zarr.json",
)


class TinyCache:
    """The objects of a finished cache of two clips; each change starts from them again."""

    def __init__(self, root: Path) -> None:
        clips = tuple(Clip(f"c{i}", f"c{i}.webm", "train", {"action": i}, 0.0, None) for i in range(2))
        manifest = Manifest("tiny", (Head("action", ("a", "b")),), clips)
        logits = {"train": {"rgb": {"action": np.full((2, 1, 2), [[[1.0, 0.0]], [[np.nan, np.nan]]], np.float32)}}}
        self.store = write_cache(root, manifest, logits)
        self.objects = {key: self.store.read(key) for key in self.store.list()}
        self.changed: set[str] = set()

    def write(self, objects: dict[str, bytes]) -> None:
        """Put objects in the place of the cache's own; those of the change before come back."""
        for key in self.changed - objects.keys():
            (self.store.root / key).write_bytes(self.objects[key])
        for key, data in objects.items():
            (self.store.root / key).write_bytes(data)
        self.changed = {*objects, ROOT, INDEX}

    def write_init(self, fields: dict[str, Any], more: dict[str, bytes] | None = None) -> None:
        """Write a sealed init.json, and a root that vouches for it."""
        init = json.dumps(seal(fields)).encode()
        self.write({INIT: init, ROOT: root_over(init, self.objects[INDEX])} | (more or {}))

    def init(self) -> dict[str, Any]:
        return unsealed(self.objects[INIT], INIT)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return TinyCache(tmp_path_factory.mktemp("hostile") / "cache")


def root_over(init: bytes, index: bytes) -> bytes:
    return RootRecord({INIT: sha256(init), INDEX: sha256(index)}).to_bytes()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def mutations(fields: Any) -> Iterator[tuple[str, Any]]:
    """Yield (what was done, the value) for each field left out, or another kind of value."""
    for path, container, key in list(places(fields, ())):
        old = container[key]
        for new in (LEFT_OUT, *OTHER_VALUES):
            if new is LEFT_OUT:
                del container[key]
            elif type(new) is type(old) and not isinstance(new, (list, dict)) and "\0" not in str(new):
                continue
            else:
                container[key] = new
            name = ".".join(map(str, path))
            yield f"{name} left out" if new is LEFT_OUT else f"{name} = {new!r}", fields
            if new is LEFT_OUT and isinstance(container, list):
                container.insert(key, old)
            else:
                container[key] = old


def places(value: Any, path: tuple) -> Iterator[tuple[tuple, Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items)[:6]:  # of many objects, some
        yield (*path, key), value, key
        yield from places(inner, (*path, key))


def read_all(store: LocalStore) -> None:
    """Read all that training, evaluation, weighing and export read."""
    reader = CacheReader(store)
    for split in reader.layouts:
        reader.split(split)
        reader.thumbprints(split)
        reader.unusable(split)
        for expert in reader.experts:
            reader.logits(split, expert)
            reader.usable(split, expert)
    for name in reader.arrays:
        list(reader.objects_of(name))
    describe_cache(store.root)


COMMANDS = {
    "read": read_all,
    "verify": lambda store: verify_cache(store).check("the cache"),
    "status": lambda store: read_build_status(store.root).lines(),
    "finalize": finalize_cache,
}


def outcomes(store: LocalStore, change: str, commands: tuple[str, ...] = tuple(COMMANDS)) -> dict[str, str | None]:
    """Command -> its error; another exception than a clear one is the test's failure."""
    found: dict[str, str | None] = {}
    for name in commands:
        try:
            COMMANDS[name](store)
            found[name] = None
        except MmkdError as error:
            found[name] = str(error)
        except Exception as error:
            raise AssertionError(f"{name} after {change}: {error!r}") from error
    assert not any("\n" in str(error) for error in found.values()), change
    return found


def refused(cache: TinyCache, change: str) -> None:
    """No command raises anything but a clear error, and what reads the cache ends with one that names the file."""
    error = outcomes(cache.store, change)["read"]
    assert error is not None, f"was read after {change}"
    assert str(cache.store.root) in error, f"after {change}"


def test_init_with_any_field_wrong_is_refused(cache):
    count = 0
    for change, fields in mutations(cache.init()):
        if change.startswith("schema =") or (change.startswith("environment.") and "left out" in change):
            continue  # of another schema is another error; a version may be unknown
        cache.write_init(fields)
        refused(cache, change)
        count += 1
    assert count > 300


def test_a_root_with_any_field_wrong_is_refused(cache):
    for change, fields in mutations(unsealed(cache.objects[ROOT], ROOT)):
        cache.write({ROOT: json.dumps(seal(fields)).encode()})
        refused(cache, change)


@pytest.mark.parametrize("node", ["thumbprint", "rgb"])
def test_a_record_with_any_field_wrong_is_refused(cache, node):
    init = CacheInit.from_bytes(cache.objects[INIT], INIT)
    keys = [commit_key(shard, name, own) for shard, name, own in init.wanted()]
    key = next(key for key in keys if f"/{node}/" in key)
    for change, fields in mutations(unsealed(cache.objects[key], key)):
        if change.startswith("worst_kl.") or change == "reason":
            continue
        record = json.dumps(seal(fields)).encode() + b"\n"
        index = b"".join(record if other == key else cache.objects[other] for other in keys)
        cache.write({key: record, INDEX: index, ROOT: root_over(cache.objects[INIT], index)})
        found = outcomes(cache.store, change, ("read", "verify", "finalize"))
        harmless = change.startswith(
            ("worst_kl", "unusable", "schema left", "objects.")
        )  # defaults, and for people
        assert found["read"] or harmless, f"was read after {change}"


@pytest.mark.parametrize("key", METADATA)
def test_metadata_with_any_field_wrong_is_refused_or_means_the_same(cache, key):
    name = key.removeprefix(f"{GROUP}/").removesuffix("/zarr.json")
    objects = {
        other.removeprefix(f"{GROUP}/"): data
        for other, data in cache.objects.items()
        if other.startswith(f"{GROUP}/{name}/c")
    }
    same = decode_array(name, objects | {f"{name}/zarr.json": cache.objects[key]})
    for change, fields in mutations(json.loads(cache.objects[key])):
        metadata = json.dumps(fields).encode()
        init = cache.init()
        init["objects"][f"{name}/zarr.json"] = sha256(metadata)
        cache.write_init(init, {key: metadata})
        if outcomes(cache.store, change, ("read",))["read"] is None:
            found = CacheReader(cache.store).array(name)
            np.testing.assert_array_equal(found, same, err_msg=change)
            assert found.dtype == same.dtype, change


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"3", b"null", b"\xff", b"[" * 100_000, b'{"a": NaN}'])
@pytest.mark.parametrize("key", [INIT, ROOT, INDEX, METADATA[0]])
def test_what_is_no_json_object_is_refused(cache, key, data):
    index = data if key == INDEX else cache.objects[INDEX]
    if key == METADATA[0]:
        init = cache.init()
        init["objects"][key.removeprefix(f"{GROUP}/")] = sha256(data)
        cache.write_init(init, {key: data})
    else:
        init = data if key == INIT else cache.objects[INIT]
        cache.write({ROOT: root_over(init, index)} | {key: data})
    refused(cache, f"{key} = {data[:10]!r}")


@pytest.mark.parametrize(
    ("array", "change", "reason"),
    [
        ("label/action", lambda values: values + 2, "labels of no class"),
        ("facts", lambda values: values - 100, "negative numbers"),
        ("frame_index", lambda values: values - 100, "negative numbers"),
    ],
)
def test_contents_that_no_build_writes_are_refused(cache, array, change, reason):
    name = f"train/{array}"
    metadata = cache.objects[f"{GROUP}/{name}/zarr.json"]
    key = next(key for key in cache.objects if key.startswith(f"{GROUP}/{name}/c/"))
    own = key.removeprefix(f"{GROUP}/")
    reader = CacheReader(cache.store) if not cache.write({}) else None
    region = reader.form(name).region(own)
    values = decode_block(name, metadata, own, data=cache.objects[key], region=region)
    from mmkd.cache_tools.cache.arrays import encode_object

    data = encode_object(name, metadata, own, values=change(values).astype(values.dtype))
    init = cache.init()
    init["objects"][own] = sha256(data)
    cache.write_init(init, {key: data})
    with pytest.raises(VerificationError, match=rf"{array}.*{reason}"):
        CacheReader(cache.store).split("train")


def test_more_rows_than_the_record_has_objects_for_are_refused_at_once(cache):
    for rows, shard_rows in ((10**12, 1), (10**9, 10**9), (20_000, 4)):
        fields = copy.deepcopy(cache.init())
        fields["splits"][0].update(rows=rows, shard_rows=shard_rows)
        cache.write_init(fields)
        with pytest.raises(VerificationError, match=r"init\.json is damaged \(objects: train/clip_id/c/1 is not"):
            read_init(cache.store)
