"""A cache of a million rows: what planning, status and opening take, and what a row costs from 10 thousand on.

    python tests/benchmarks/scale.py [--rows N ...] [--classes N] [--folder DIR]

One view, one expert, logits drawn at the writer; everything else is the cache's own: init, shards of 512 rows
published one by one, finalize. Starting (manifest, views, init), finding what is left half-way, status and opening
run each in a fresh process, so that the peak of memory is theirs; that of the imports alone is printed beside.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from mmkd.cache_tools.cache.commits import publish
from mmkd.cache_tools.cache.init_record import read_init
from mmkd.cache_tools.cache.logit_formats import FORMATS
from mmkd.cache_tools.cache.reader import CacheReader
from mmkd.cache_tools.frames.clip_set import clip_videos
from mmkd.cache_tools.frames.records import VideoFacts
from mmkd.cache_tools.layout import THUMBPRINT, Shard, SplitLayout, part_array, status_array, thumbprint_arrays
from mmkd.cache_tools.storage.local_store import LocalStore
from mmkd.cache_tools.storage.store import Store
from mmkd.cache_tools.tasks.build_status import read_build_status
from mmkd.cache_tools.tasks.claims import Claims
from mmkd.cache_tools.tasks.finish import finalize_cache
from mmkd.cache_tools.tasks.heartbeat import OtherTasks, Task, new_task_id
from mmkd.cache_tools.views.drawing import ViewPolicy
from mmkd.data_manifests.manifest import Clip, Head, Manifest
from mmkd.data_manifests.manifest_file import load_manifest, save_manifest
from mmkd.pipeline.build.shard_block import NodeResult
from mmkd.pipeline.build.start import initialise
from mmkd.pipeline.build.work import ExpertNode, SplitPlan, base_fields, committed_nodes, draw_views

MANIFEST = "manifest.jsonl"
SHARD_ROWS = 512
POLICY = ViewPolicy(frames=8, size_px=224)
VIDEO = VideoFacts(340, 256, np.arange(48) / 12, "pyav", "0" * 32)


class OneVideo(dict[str, VideoFacts]):
    """The facts of any video."""

    def __missing__(self, video: str) -> VideoFacts:
        return VIDEO


def make_manifest(file: Path, rows: int, classes: int) -> None:
    """Write a manifest of drawn clips."""
    head = Head("action", tuple(f"class {number}" for number in range(classes)))
    clips = tuple(
        Clip(f"clip-{row}", f"videos/{row}.webm", "train", {"action": row % classes}) for row in range(rows)
    )
    save_manifest(Manifest("scale", (head,), clips), file)


def start(store: Store, file: Path) -> tuple[dict, dict[str, float]]:
    """Plan a cache as a build does, and write what `init` writes; return metadata and the seconds of each step."""
    seconds, began = {}, time.perf_counter()
    manifest = load_manifest(file)
    clips = manifest.split("train")
    seconds["manifest"], began = time.perf_counter() - began, time.perf_counter()
    items = clip_videos(clips, OneVideo())
    seconds["clips"], began = time.perf_counter() - began, time.perf_counter()
    views = draw_views(items, POLICY, manifest=manifest, seed=0, training_views=1)
    seconds["views"], began = time.perf_counter() - began, time.perf_counter()
    plan = SplitPlan(SplitLayout("train", len(clips), 1, SHARD_ROWS, 1), items, views)
    base = base_fields(manifest, POLICY, train_split="train", view_seed=0)
    seconds["fingerprint"], began = time.perf_counter() - began, time.perf_counter()
    expert = ExpertNode(
        {"modality": "rgb", "precision": FORMATS["fp16"].name, "weights": "drawn"}, {"fraction": 0.0, "seed": 0}
    )
    _, metadata = initialise(store, [plan], manifest=manifest, base=base, experts={"rgb": expert})
    seconds["init"] = time.perf_counter() - began
    return metadata, seconds


def results_of(shard: Shard, classes: int, random: np.random.Generator) -> list[NodeResult]:
    """Draw what a shard holds."""
    grid = (SHARD_ROWS, 1)
    hashes, thumbnails = thumbprint_arrays("train")
    blocks = {
        hashes: random.integers(0, 2**63, grid, np.uint64),
        thumbnails: random.integers(0, 256, (*grid, 144), np.uint8),
    }
    logits = FORMATS["fp16"].encode(3 * random.standard_normal((*grid, classes), np.float32))
    expert = {part_array("train", "rgb", part, head="action"): block for part, block in logits.items()}
    expert[status_array("train", "rgb")] = np.zeros(grid, np.uint8)
    return [NodeResult(shard, THUMBPRINT, blocks), NodeResult(shard, "rgb", expert)]


def write_shards(store: Store, metadata: dict, shards: list[Shard], classes: int) -> None:
    """Publish shards of drawn logits."""
    nodes = read_init(store).fingerprints()
    random = np.random.default_rng(0)
    for shard in shards:
        for result in results_of(shard, classes, random):
            objects = result.encode(metadata)
            publish(store, shard, result.record(nodes[result.node], objects), objects)


def measured(name: str, what: str, root: Path) -> str:
    """Do one thing in a fresh process; return a line of its seconds and the peak of its memory."""
    command = [sys.executable, __file__, "--measure", what, "--folder", root]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout)
    return (
        f"{name:26} {found['seconds']:6.2f} s, processor {found['cpu']:5.2f} s, peak {found['mib']:5.0f} MiB "
        f"(at the end {found['files_mib']:.0f} of mapped files)"
    )


def measure(what: str, root: Path) -> dict[str, float]:
    """Do it here."""
    began, processor = time.perf_counter(), time.process_time()
    if what == "start":
        start(LocalStore(root.with_name("another")), root.with_name(MANIFEST))
    elif what == "plan":
        store = LocalStore(root)
        own = Task(store, new_task_id())
        committed_nodes(store, read_init(store), Claims(own, OtherTasks(own)))
    elif what == "status":
        read_build_status(root)
    elif what == "open":
        CacheReader(root)
    elif what == "open, ids, labels, views":
        CacheReader(root).split("train")
    seconds, processor = time.perf_counter() - began, time.process_time() - processor
    # Not getrusage's peak: that of a child begins at its parent's size.
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    kib = {line[0]: int(line[1]) for line in lines if line[0] in ("VmHWM:", "RssFile:")}
    mib = {"mib": kib["VmHWM:"] / 1024, "files_mib": kib["RssFile:"] / 1024}
    return {"seconds": seconds, "cpu": processor} | mib


def scale(root: Path, rows: int, classes: int) -> float:
    """Write a cache, print what it takes; return the seconds that a row cost to publish."""
    store = LocalStore(root)
    make_manifest(root.with_name(MANIFEST), rows, classes)
    metadata, seconds = start(store, root.with_name(MANIFEST))
    shards = list(SplitLayout("train", rows, 1, SHARD_ROWS, 1).shards())
    half = len(shards) // 2
    began = time.perf_counter()
    write_shards(store, metadata, shards[:half], classes)
    seconds["shards"] = time.perf_counter() - began
    asked = [
        ("imports alone", "nothing"),
        ("starting it", "start"),
        ("what is left, half-way", "plan"),
        ("status, half-way", "status"),
    ]
    lines = [measured(name, what, root) for name, what in asked]
    began = time.perf_counter()
    write_shards(store, metadata, shards[half:], classes)
    seconds["shards"] += time.perf_counter() - began
    began = time.perf_counter()
    finalize_cache(store)
    seconds["finalize"] = time.perf_counter() - began
    for what in ("status", "open", "open, ids, labels, views"):
        lines.append(measured(what, what, root))
    listed = store.list()
    size = sum(stored.size_bytes for stored in listed.values())
    print(f"\n{rows:,} rows, {len(shards)} shards: {len(listed)} objects, {size / rows:.1f} bytes a row")
    print(
        "  "
        + ", ".join(f"{name} {value:.2f} s ({1e6 * value / rows:.1f} us a row)" for name, value in seconds.items())
    )
    print("\n".join(f"  {line}" for line in lines), flush=True)
    return (seconds["shards"] + seconds["finalize"]) / rows


def main() -> None:
    """Measure each number of rows."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--classes", type=int, default=174)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--measure")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.folder)))
        return
    costs = []
    for rows in options.rows:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            costs.append(scale(Path(folder) / "cache", rows, options.classes))
    first, last = options.rows[0], options.rows[-1]
    print(f"\na row costs at {last:,} rows {costs[-1] / costs[0]:.2f} times what it costs at {first:,}")


if __name__ == "__main__":
    main()
