"""What the cache's arrays are made of depends on no setting of Zarr's that a user's environment holds."""

import hashlib
import os
import subprocess
import sys

import numpy as np

from mmkd.cache_tools.cache.arrays import decode_array, encode_block, encode_group, split_arrays, static_arrays
from mmkd.cache_tools.cache.logit_formats import FORMATS
from mmkd.cache_tools.layout import SplitLayout

HOSTILE = {
    "ZARR_ARRAY__ORDER": "F",
    "ZARR_ARRAY__V3_DEFAULT_COMPRESSORS": "[]",
    "ZARR_CODECS__ZSTD": "no.such.Codec",
    "ZARR_CODEC_PIPELINE__PATH": "no.such.Pipeline",
    "ZARR_DEFAULT_ZARR_FORMAT": "2",
    "ZARR_BUFFER": "no.such.Buffer",
    "ZARR_JSON_INDENT": "7",
}


def written_and_read() -> str:
    """One hash over a group's objects, a shard's, and what they decode to."""
    layout = SplitLayout("train", 5, 2, 4, 1)
    values = {"clip_id": [f"clip {number}" for number in range(5)], "flip": np.zeros((5, 2), np.bool_)}
    static = static_arrays("train", values, {"action": np.arange(5)})
    specs = split_arrays(layout, {"rgb": FORMATS["fp16"]}, {"action": 3}, thumbnail_size=4)
    objects = encode_group(static, [(spec, layout) for spec in specs], {"train": 1})
    name = "train/rgb/logits/action"
    block = np.arange(12, dtype=np.float16).reshape(4, 1, 3)
    objects |= encode_block(name, objects[f"{name}/zarr.json"], start=(0, 0), block=block)
    found = [decode_array(array, objects) for array in ("train/clip_id", name)]
    text = repr(sorted(objects.items())) + repr([value.tolist() for value in found])
    return hashlib.sha256(text.encode()).hexdigest()


def test_a_users_configuration_of_zarr_changes_nothing(tmp_path):
    (tmp_path / ".config" / "zarr").mkdir(parents=True)
    (tmp_path / ".config" / "zarr" / "zarr.yaml").write_text("array: [not, {closed")
    program = f"from {__name__} import written_and_read as f; print(f())"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | HOSTILE | {"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == written_and_read()
