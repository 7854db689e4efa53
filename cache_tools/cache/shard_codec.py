"""One shard of an array as bytes: Zarr's sharding codec for the one form that a cache writes.

zarr-python encodes through an event loop and a thread for every inner chunk: 3 ms of processor time and, on a busy
machine, a hundred times that in waiting, for each of a shard's dozen small objects. This is the same encoding in
line, and a test holds its bytes equal to zarr-python's, which continues to read them.
"""

import json
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
from numcodecs.zstd import Zstd  # type: ignore[import-untyped]  # numcodecs has no types


def encode_shard(metadata: bytes, block: npt.NDArray[Any]) -> bytes:
    """Return the object of one whole shard: inner chunks in order, then offset and length of each, then crc32c.

    `metadata` is the array's zarr.json and `block` has its shard's shape and type. Raises ValueError for an array
    of another form than mmkd.cache_tools.cache.arrays makes: one sharding codec around little-endian bytes and
    zstd, chunks that split the first axis alone.
    """
    fields = json.loads(metadata)
    shard = fields["chunk_grid"]["configuration"]["chunk_shape"]
    (sharding,) = fields["codecs"]
    inner = sharding["configuration"]["chunk_shape"]
    to_bytes, zstd = sharding["configuration"]["codecs"]
    known = (sharding["name"], to_bytes["name"], zstd["name"]) == ("sharding_indexed", "bytes", "zstd")
    if not known or inner[1:] != shard[1:] or shard[0] % inner[0]:
        raise ValueError(f"an array of shards {shard} and chunks {inner} is none that a cache writes")
    if list(block.shape) != shard or block.dtype != np.dtype(fields["data_type"]):
        raise ValueError(
            f"a block of {block.dtype} {block.shape} is not one whole shard of {fields['data_type']} {shard}"
        )
    codec = Zstd(level=zstd["configuration"]["level"], checksum=zstd["configuration"]["checksum"])
    little = np.ascontiguousarray(block, block.dtype.newbyteorder("<"))
    chunks = [bytes(codec.encode(little[start : start + inner[0]])) for start in range(0, shard[0], inner[0])]
    index = np.empty((len(chunks), 2), "<u8")
    index[:, 1] = [len(chunk) for chunk in chunks]
    # Offsets count from the shard's first byte: Zarr's default puts the index behind the chunks.
    index[:, 0] = np.cumsum(index[:, 1]) - index[:, 1]
    # Over the index alone: each inner chunk has a checksum of zstd's.
    checksum = np.array(google_crc32c.value(index.tobytes()), "<u4")
    return b"".join((*chunks, index.tobytes(), checksum.tobytes()))
