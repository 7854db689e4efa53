"""Looking targets up, side by side in one run: ours, a bare memory map, h5py, and Zarr row by row.

    python tests/benchmarks/targets.py [--rows N] [--views N] [--classes N] [--folder DIR]

All four hold the same float32 logits of one head, and give the same batches of 32 rows x 1 view, drawn at random;
Zarr is sharded, chunked and compressed as a cache is. Times are of the wall, the least of the repetitions, with
files in the page cache. Then what a lookup is of a training step: the demo's student, 32 clips of 8 frames at 56
px, CPU, one thread.
"""

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
import zarr
from zarr.codecs import ZstdCodec

from mmkd.cache_tools.cache.arrays import INNER_ROWS
from mmkd.student.data.batches import Batch
from mmkd.student.networks.networks import build_network
from mmkd.student.recipes.loss import LossOptions
from mmkd.student.recipes.train import TrainRecipe
from mmkd.student.teacher.cached_targets import CachedTargets
from mmkd.student.teacher.copy_file import ArrayPlan
from mmkd.student.teacher.node_copy import open_or_make
from mmkd.student.teacher.targets import fetch_targets
from mmkd.student.training import run as training
from mmkd.student.training.ranks import ALONE
from mmkd.student.training.watch import NOBODY

BATCH, SHARD_ROWS, STEPS = 32, 1024, 12
Lookup = Callable[[np.ndarray, np.ndarray], np.ndarray]


def blocks_of(shape: tuple[int, int, int]) -> Iterator[np.ndarray]:
    """Yield the logits in blocks of a shard's rows, drawn again each time from the same seed."""
    random = np.random.default_rng(0)
    for start in range(0, shape[0], SHARD_ROWS):
        yield random.standard_normal((min(SHARD_ROWS, shape[0] - start), *shape[1:]), np.float32)


def fill(array: Any, shape: tuple[int, int, int]) -> None:
    """Write the logits into whatever takes slices of rows."""
    for number, block in enumerate(blocks_of(shape)):
        array[number * SHARD_ROWS : number * SHARD_ROWS + len(block)] = block


def our_source(folder: Path, shape: tuple[int, int, int]) -> tuple[CachedTargets, float, float]:
    """Return the targets, and the seconds of making the node's copy and of opening it a second time."""

    def make() -> Iterator[ArrayPlan]:
        yield ArrayPlan("logits", shape, "float32", blocks_of(shape))
        yield ArrayPlan("valid", shape[:2], "bool", [np.ones(shape[:2], np.bool_)])

    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        maps = open_or_make(folder, {"benchmark": shape}, make())
        seconds.append(time.perf_counter() - start)
    logits, valid = np.asarray(maps["logits"]), np.asarray(maps["valid"])
    return CachedTargets({"action": logits[None]}, valid, np.arange(shape[0])), *seconds


def bare_map(folder: Path, shape: tuple[int, int, int]) -> Lookup:
    """Write and open a plain .npy."""
    path = folder / "bare.npy"
    array = np.lib.format.open_memmap(path, "w+", np.float32, shape)
    fill(array, shape)
    array.flush()
    array = np.load(path, mmap_mode="r")
    return lambda rows, views: array[rows, views]


def zarr_rows(folder: Path, shape: tuple[int, int, int]) -> Lookup:
    """Write and open a sharded array, read a row at a time."""
    padded = (-(-shape[0] // SHARD_ROWS) * SHARD_ROWS, *shape[1:])
    array = zarr.create_array(
        folder / "rows.zarr",
        shape=padded,
        shards=(SHARD_ROWS, *shape[1:]),
        chunks=(INNER_ROWS, *shape[1:]),
        dtype="float32",
        compressors=ZstdCodec(level=3, checksum=True),
    )
    fill(array, shape)
    array = zarr.open_array(folder / "rows.zarr", mode="r")
    return lambda rows, views: np.stack([array[row, view] for row, view in zip(rows, views, strict=True)])


def h5py_rows(folder: Path, shape: tuple[int, int, int], **layout: object) -> Lookup:
    """Write and open an HDF5 data set, read a row at a time."""
    path = folder / f"rows-{len(layout)}.h5"
    with h5py.File(path, "w") as file:
        data = file.create_dataset("logits", shape, "float32", **layout)
        fill(data, shape)
    data = h5py.File(path, "r")["logits"]
    return lambda rows, views: np.stack([data[row, view] for row, view in zip(rows, views, strict=True)])


def rows_per_second(
    cases: dict[str, tuple[Lookup, int]], shape: tuple[int, int, int], repetitions: int = 7
) -> dict[str, float]:
    """Return each case's best rate; the cases take turns, so that other work on the machine meets them all."""
    random, best = np.random.default_rng(1), dict.fromkeys(cases, 0.0)
    for _ in range(repetitions):
        for name, (lookup, batches) in cases.items():
            drawn = [[random.integers(size, size=BATCH) for size in shape[:2]] for _ in range(batches)]
            start = time.perf_counter()
            for rows, views in drawn:
                lookup(rows, views)
            best[name] = max(best[name], batches * BATCH / (time.perf_counter() - start))
    return best


def compare_lookups(folder: Path, shape: tuple[int, int, int]) -> CachedTargets:
    """Print the table of lookups."""
    source, making, opening = our_source(folder, shape)
    chunks = {"chunks": (INNER_ROWS, *shape[1:]), "compression": "gzip", "compression_opts": 4}
    cases: dict[str, tuple[Lookup, int]] = {
        "bare numpy memmap": (bare_map(folder, shape), 2000),
        "ours, logits": (lambda rows, views: source.targets(rows, views)["action"], 2000),
        "ours, logits and mask": (
            lambda rows, views: (source.targets(rows, views)["action"], source.valid(rows, views))[0],
            2000,
        ),
        "h5py, contiguous": (h5py_rows(folder, shape), 20),
        "h5py, chunked and compressed": (h5py_rows(folder, shape, **chunks), 4),
        "Zarr, sharded": (zarr_rows(folder, shape), 4),
    }
    rows, views = np.arange(BATCH) * 7 % shape[0], np.arange(BATCH) % shape[1]
    for name, (lookup, _) in cases.items():
        assert np.array_equal(lookup(rows, views), cases["bare numpy memmap"][0](rows, views)), name
    gigabytes = 4e-9 * np.prod(shape)
    print(f"{gigabytes:.2f} GB: the node's copy made in {making:.2f} s (drawing the numbers included),")
    print(f"opened with every byte verified in {opening:.2f} s, {gigabytes / opening:.2f} GB/s")
    rates = rows_per_second(cases, shape)
    print(f"{'':32}{'rows/s':>12}{'of the memmap':>16}")
    for name, rate in rates.items():
        print(f"{name:32}{rate:12,.0f}{rate / rates['bare numpy memmap']:16.5f}")
    return source


class DemoClips:
    """What the loop asks of a data set, without reading: the batches are made by hand."""

    def __init__(self, rows: int, views: int) -> None:
        self.rows, self.views = rows, views
        self.clip_ids = [str(row) for row in range(rows)]
        self.labels = {"action": np.zeros(rows, np.int64)}


def compare_step(source: CachedTargets) -> None:
    """Print the share that looking targets up has of a training step."""
    rows, views, classes = (source.mask.shape[0], source.mask.shape[1], source.logits["action"].shape[-1])
    recipe = TrainRecipe(network="small3d", batch_size=BATCH, epochs=1000, warmup_epochs=0, learning_rate=1e-5)
    network, clips = build_network(recipe, heads={"action": classes}, modality="rgb"), DemoClips(rows, views)
    loss = LossOptions(temperature=4)
    device = torch.device("cpu")
    run = training.Run(network, clips, recipe, targets=source, loss=loss, device=device, ranks=ALONE, watch=NOBODY)
    lookups: list[float] = []

    def timed(*arguments: object, **options: object):
        start = time.perf_counter()
        found = fetch_targets(*arguments, **options)
        lookups.append(time.perf_counter() - start)
        return found

    training.fetch_targets = timed
    random, steps = np.random.default_rng(2), []
    for _ in range(STEPS):
        inputs = {"rgb": random.integers(0, 256, (BATCH, 8, 56, 56, 3), np.uint8)}
        batch = Batch(random.integers(rows, size=BATCH), random.integers(views, size=BATCH), inputs)
        start = time.perf_counter()
        run.step(batch)
        steps.append(time.perf_counter() - start)
    lookup, step = sorted(lookups)[STEPS // 2], sorted(steps)[STEPS // 2]
    print(f"step {1e3 * step:.1f} ms, its lookup {1e6 * lookup:.0f} us: {100 * lookup / step:.3f} %, medians")


def main() -> None:
    """Print both."""
    parser = argparse.ArgumentParser(description="target lookups side by side")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--views", type=int, default=8)
    parser.add_argument("--classes", type=int, default=174)
    parser.add_argument("--folder", type=Path, help="where to write [default: the system's temporary folder]")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{platform.machine()}, {os.cpu_count()} cores, numpy {np.__version__}, torch {torch.__version__},")
    print(f"zarr {zarr.__version__}, h5py {h5py.__version__}")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        compare_step(compare_lookups(Path(folder), (options.rows, options.views, options.classes)))


if __name__ == "__main__":
    main()
