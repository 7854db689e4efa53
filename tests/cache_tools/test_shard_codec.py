"""Our own encoding of a shard is zarr-python's, byte for byte, and zarr-python reads it."""

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from mmkd.cache_tools.cache.arrays import encode_group, split_arrays
from mmkd.cache_tools.cache.logit_formats import FORMATS
from mmkd.cache_tools.cache.shard_codec import encode_shard
from mmkd.cache_tools.layout import SplitLayout


def of_zarr(name: str, metadata: bytes, block: np.ndarray) -> tuple[bytes, np.ndarray]:
    """What zarr-python makes of the same block, and what it reads from our bytes."""
    make = default_buffer_prototype().buffer.from_bytes
    written = {f"{name}/zarr.json": make(metadata)}
    with zarr.config.set({"array.write_empty_chunks": True}):
        zarr.open_array(MemoryStore(written), path=name, mode="r+", zarr_format=3)[: block.shape[0]] = block
    (key,) = (key for key in written if not key.endswith("zarr.json"))
    ours = {f"{name}/zarr.json": make(metadata), key: make(encode_shard(metadata, block))}
    read = zarr.open_array(MemoryStore(ours), path=name, mode="r", zarr_format=3)
    return written[key].to_bytes(), np.asarray(read[: block.shape[0]])


@pytest.mark.parametrize("storage", FORMATS.values(), ids=FORMATS)
@given(
    rows=st.sampled_from([1, 6, 64, 96, 128]),
    views=st.integers(1, 3),
    classes=st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=8, deadline=None)
def test_bytes_are_those_of_zarr_python(storage, rows, views, classes, seed):
    layout = SplitLayout("train", rows, views, rows, views)
    specs = split_arrays(layout, {"rgb": storage}, {"action": classes}, thumbnail_size=144)
    objects = encode_group({}, [(spec, layout) for spec in specs], {"train": views})
    random = np.random.default_rng(seed)
    for spec in specs:
        block = np.full(spec.shape, spec.fill, spec.dtype)
        filled = random.integers(0, rows + 1)  # an empty chunk is written like any other
        block[:filled] = random.integers(0, 200, block[:filled].shape)
        expected, read = of_zarr(spec.name, objects[f"{spec.name}/zarr.json"], block)
        assert encode_shard(objects[f"{spec.name}/zarr.json"], block) == expected
        np.testing.assert_array_equal(read, block)


def test_other_blocks_and_other_arrays_are_refused():
    layout = SplitLayout("train", 4, 2, 4, 2)
    specs = split_arrays(layout, {}, {}, thumbnail_size=144)
    metadata = encode_group({}, [(spec, layout) for spec in specs], {"train": 2})["train/thumbprint/hash/zarr.json"]
    for block in (np.zeros((4, 1), np.uint64), np.zeros((4, 2), np.int64)):
        with pytest.raises(ValueError, match="is not one whole shard of uint64"):
            encode_shard(metadata, block)
    with pytest.raises(ValueError, match="none that a cache writes"):
        encode_shard(metadata.replace(b'"zstd"', b'"gzip"'), np.zeros((4, 2), np.uint64))
