"""A cache as one HDF5 file: readable with h5py alone, back to the same bytes, and never from a damaged file."""

import os
import resource
import shutil

import h5py
import numpy as np
import pytest

from mmkd.cache_tools.cache.reader import CacheReader
from mmkd.cache_tools.upkeep import hdf5 as hdf5_export
from mmkd.cache_tools.upkeep import hdf5_import
from mmkd.cache_tools.upkeep.hdf5 import export_cache
from mmkd.cache_tools.upkeep.hdf5_import import import_cache
from mmkd.cache_tools.upkeep.verify import verify_cache
from mmkd.data_manifests.errors import InputError, StorageError, VerificationError
from tests.helpers.in_process import call_ok, refused
from tests.helpers.many_clips import EXPERTS, HEADS, files_of, logits_of, manifest_of
from tests.helpers.small_cache import write_cache

MANIFEST = manifest_of(range(20))


@pytest.fixture(scope="module", autouse=True)
def no_waiting_for_the_disk():
    """Thousands of small files: what survives a power cut is not what these tests are about."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="module", params=["fp16", "9-bit"])
def cache(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("exported") / "cache"
    write_cache(root, MANIFEST, logits_of(MANIFEST), shard_rows=6, shard_views=2, precision=request.param)
    return root


@pytest.fixture(scope="module")
def exported(cache):
    path = cache.with_name("cache.h5")
    export_cache(cache, path)
    return path


def test_it_comes_back_byte_for_byte(cache, exported, tmp_path):
    report = import_cache(exported, tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(cache)
    assert report.reencoded == 0
    assert report.clips == 20
    assert not verify_cache(tmp_path / "back").damaged
    assert import_cache(exported, tmp_path / "back") == report, "the same again is harmless"


@pytest.mark.parametrize("share", [0.01, 0.3, 0.7, 0.99])
def test_a_file_that_cannot_grow_leaves_the_old_export_and_says_so(cache, exported, tmp_path, share):
    path = shutil.copy(exported, tmp_path / "cache.h5")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * exported.stat().st_size), before[1]))
    try:
        with pytest.raises(StorageError, match=r"cannot write .*cache\.h5: File too large; free some space"):
            export_cache(cache, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == exported.read_bytes()
    assert list(tmp_path.iterdir()) == [path]
    assert h5py.h5f.get_obj_count(h5py.h5f.OBJ_ALL, h5py.h5f.OBJ_FILE) == 0, (
        "HDF5 has nothing left to write when the process ends"
    )


def test_h5py_alone_reads_logits_and_labels(cache, exported):
    reader = CacheReader(cache)
    with h5py.File(exported) as file:
        assert file.attrs["fingerprint"] == reader.fingerprint
        assert list(file["train/clip_id"].asstr()) == [clip.clip_id for clip in MANIFEST.split("train")]
        for head in HEADS:
            labels = file[f"train/label/{head.name}"]
            assert tuple(labels.attrs["classes"]) == head.classes
            np.testing.assert_array_equal(labels[:], reader.split("train").labels[head.name])
        for expert in EXPERTS:
            group = file[f"train/{expert}"]
            np.testing.assert_array_equal(group["status"][:], reader.status("train", expert))
            for head, expected in reader.logits("train", expert).items():
                maximum = group[f"maximum/{head}"][:][..., None]
                if "square" in group.attrs["format"]:  # as the attribute `decode` says, by other means than ours
                    classes = expected.shape[-1]
                    stored = group[f"logits/{head}"][:]
                    high = np.unpackbits(stored[..., classes:], axis=-1, count=classes)
                    q = stored[..., :classes] + 256.0 * high
                    logits = maximum - group[f"range/{head}"][:][..., None] * (q / 511.0) ** 2
                else:
                    logits = group[f"logits/{head}"][:].astype(np.float32) + maximum
                np.testing.assert_allclose(logits, expected, atol=1e-5)
                assert np.isnan(logits).any() == (expert == "flow")


def test_every_dataset_has_hdf5s_checksum(exported):
    with h5py.File(exported) as file:
        plain = []
        file.visititems(
            lambda name, item: plain.append(name) if getattr(item, "fletcher32", True) is False else None
        )
        assert plain == []
        assert len(file["train"]) > 5


@pytest.mark.parametrize("cache", ["fp16"], indirect=True)
def test_damage_anywhere_is_refused_and_nothing_is_served(exported, tmp_path):
    data, random = exported.read_bytes(), np.random.default_rng(7)
    refusals = 0
    for place in random.integers(0, len(data), 24).tolist():
        path = tmp_path / "flipped.h5"
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
        out = tmp_path / f"out-{place}"
        error = None
        try:
            import_cache(path, out)
        except (VerificationError, InputError) as caught:
            error = str(caught)
        if error is None:  # the byte holds nothing that a cache is made of: what came is what was exported
            assert files_of(out) == files_of(exported.with_name("cache"))
        else:
            refusals += 1
            assert str(path) in error
            assert not (out / "root.json").exists()
    assert refusals > 6


def test_a_truncated_file_is_refused(exported, tmp_path):
    path = tmp_path / "short.h5"
    path.write_bytes(exported.read_bytes()[:-3000])
    with pytest.raises(VerificationError, match=r"short\.h5 is damaged"):
        import_cache(path, tmp_path / "out")


def test_a_changed_value_is_named(exported, tmp_path):
    path = tmp_path / "changed.h5"
    path.write_bytes(exported.read_bytes())
    with h5py.File(path, "r+") as file:
        file["train/rgb/maximum/verb"][7, 1] += 1
    with pytest.raises(VerificationError, match=r"train/rgb/maximum/verb \[6\.\.11, 0\.\.1\]"):
        import_cache(path, tmp_path / "out")


def test_another_encoder_gives_a_sound_cache_of_the_same_values(cache, exported, tmp_path, monkeypatch):
    """As if another Zstandard wrote the facts: the same values under another level."""
    encode = hdf5_import.encode_object

    def other(name, metadata, key, *, values):
        data = encode(name, metadata, key, values=values)
        return zstd_again(data) if name.endswith("facts") else data

    monkeypatch.setattr(hdf5_import, "encode_object", other)
    report = import_cache(exported, tmp_path / "out")
    assert report.reencoded == 2
    assert "other bytes" in report.lines("out")[0]
    assert not verify_cache(tmp_path / "out").damaged
    ours, theirs = CacheReader(tmp_path / "out"), CacheReader(cache)
    np.testing.assert_array_equal(ours.split("train").facts, theirs.split("train").facts)
    assert ours.fingerprint != theirs.fingerprint


def zstd_again(data: bytes) -> bytes:
    from numcodecs import Zstd

    return Zstd(level=19, checksum=False).encode(Zstd().decode(data))


def test_what_is_no_export_is_refused(exported, cache, tmp_path):
    for content, what in ((b"text", "is not an HDF5 file"), (None, "is not there")):
        path = tmp_path / "foreign.h5"
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(InputError, match=what):
            import_cache(path, tmp_path / "out")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["train"] = 3
    with pytest.raises(InputError, match="is not an export of"):
        import_cache(tmp_path / "other.h5", tmp_path / "out")
    other = manifest_of(range(5))
    write_cache(tmp_path / "there", other, logits_of(other))
    with pytest.raises(InputError, match="holds a cache already"):
        import_cache(exported, tmp_path / "there")
    assert CacheReader(tmp_path / "there").split("test").clip_ids == ("clip-0", "clip-3")


def changed(exported, tmp_path, change):
    """A copy of the export that `change` has been at."""
    path = tmp_path / "hostile.h5"
    path.write_bytes(exported.read_bytes())
    with h5py.File(path, "r+") as file:
        change(file)
    return path


def put(name, value):
    """A change that puts another value, or a link, in the place of a dataset."""

    def change(file):
        del file[name]
        if value is not None:
            file[name] = value

    return change


def external_storage(file):
    del file["train/flip"]
    file.create_dataset("train/flip", (10, 4), "u1", external=[("/dev/zero", 0, h5py.h5f.UNLIMITED)])


def endless(file):
    del file["mmkd-cache/index.jsonl"]
    file.create_dataset("mmkd-cache/index.jsonl", (1 << 40,), "u1", chunks=(1 << 20,))


HOSTILE = {
    "no index": put("mmkd-cache/index.jsonl", None),
    "an index of other bytes": put("mmkd-cache/index.jsonl", np.zeros(9, np.uint8)),
    "an index that is a number": put("mmkd-cache/index.jsonl", 3),
    "an index of a tebibyte": endless,
    "objects that are a list": put("mmkd-cache/objects.json", np.frombuffer(b"[]", np.uint8)),
    "objects of numbers": put("mmkd-cache/objects.json", np.frombuffer(b'{"metadata":{"a":1}}', np.uint8)),
    "nested objects": put("mmkd-cache/objects.json", np.frombuffer(b"[" * 100_000, np.uint8)),
    "no fingerprint": lambda file: file.attrs.__delitem__("fingerprint"),
    "a number as fingerprint": lambda file: file.attrs.__setitem__("fingerprint", 3),
    "no facts": put("train/facts", None),
    "facts of another shape": put("train/facts", np.zeros((1, 4), np.int32)),
    "facts of another type": lambda file: put("train/facts", file["train/facts"][()].astype(float))(file),
    "ids that are numbers": lambda file: put("train/clip_id", np.arange(len(file["train/clip_id"])))(file),
    "logits that are a group": lambda file: (
        put("train/rgb/status", None)(file),
        file.create_group("train/rgb/status"),
    ),
    "a link to a device": put("train/facts", h5py.ExternalLink("/dev/zero", "facts")),
    "a link elsewhere": put("train/facts", h5py.SoftLink("/test/facts")),
    "values on a device": external_storage,
}


@pytest.mark.parametrize("cache", ["fp16"], indirect=True)
@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_file_is_refused_in_one_line_and_nothing_is_written(what, exported, tmp_path):
    path = changed(exported, tmp_path, HOSTILE[what])
    assert "hostile.h5 is damaged (" in refused("mmkd-cache", "import", path, "-o", tmp_path / "out", code=4)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("schema", [3, "other", b"\xff", np.arange(3)])
def test_another_schema_is_no_export(exported, tmp_path, schema):
    path = changed(exported, tmp_path, lambda file: file.attrs.__setitem__("schema", schema))
    assert "is not an export of" in refused("mmkd-cache", "import", path, "-o", tmp_path / "out")


def test_text_that_hdf5_never_ends_reading_is_damage(exported, tmp_path, monkeypatch):
    monkeypatch.setattr(hdf5_import, "HEADER_SECONDS", 3.0)
    data = bytearray(exported.read_bytes())
    at = (
        data.index(b"GCOL") + 16
    )  # the heap of texts: each one its number, 6 bytes, its size, itself; 0 is free space
    while int.from_bytes(data[at : at + 2], "little"):
        at += 16 + -(-int.from_bytes(data[at + 8 : at + 16], "little") // 8) * 8
    data[at + 8 : at + 16] = bytes(8)
    (tmp_path / "endless.h5").write_bytes(data)
    with pytest.raises(VerificationError, match="does not come to an end"):
        import_cache(tmp_path / "endless.h5", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_pipe_or_device_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        assert "is not an HDF5 file" in refused("mmkd-cache", "import", path, "-o", tmp_path / "out")


def test_a_fault_of_ours_is_not_blamed_on_the_file(exported, tmp_path, monkeypatch):
    monkeypatch.setattr(hdf5_import, "publish", lambda *_: [][0])
    with pytest.raises(IndexError):
        import_cache(exported, tmp_path / "out")


def test_a_failed_export_leaves_the_old_file_and_nothing_else(cache, exported, tmp_path, monkeypatch):
    path = shutil.copy(exported, tmp_path / "old.h5")
    monkeypatch.setattr(hdf5_export, "_explain", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(StorageError, match=r"cannot write .*old\.h5"):
        export_cache(cache, path)
    assert path.read_bytes() == exported.read_bytes()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", ["text", "hdf5", "pipe"])
def test_a_file_that_is_no_export_is_not_replaced(cache, exported, tmp_path, kind):
    path = tmp_path / "mine.h5"
    if kind == "text":
        path.write_text("mine")
    elif kind == "hdf5":
        with h5py.File(path, "w") as file:
            file["mine"] = [1, 2]
    else:
        os.mkfifo(path)
    before = path.read_bytes() if kind != "pipe" else None
    with pytest.raises(InputError, match=r"is there and not an export .*; name another file"):
        export_cache(cache, path)
    assert path.is_fifo() if kind == "pipe" else path.read_bytes() == before


def test_commands(cache, tmp_path):
    call_ok("mmkd-cache", "export", cache, tmp_path / "a.h5")
    assert "byte for byte" in call_ok("mmkd-cache", "import", tmp_path / "a.h5", "-o", tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(cache)
    assert "is not there" in refused("mmkd-cache", "import", tmp_path / "b.h5", "-o", tmp_path / "c")
