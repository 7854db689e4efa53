"""How fast clips go through the stages, and objects to the disk: measured on a few, before a long job.

Nothing is kept. A clip's cost has two parts that overlap in a build: what a decoding process does, and what the
build's own process does on its device. It gives up what only a long run shows: a network file system that slows
down under load, a processor that gets hot, the one clip in a thousand that takes a minute.
"""

import os
import tempfile
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mmkd.cache_tools.layout import THUMBPRINT, Shard, SplitLayout
from mmkd.cache_tools.process.progress import Progress
from mmkd.cache_tools.storage.local_store import LocalStore
from mmkd.cache_tools.storage.store import Store
from mmkd.data_manifests.counted import counted
from mmkd.data_manifests.errors import InputError, StorageError, VideoError
from mmkd.pipeline.build.open_shard import clip_job
from mmkd.pipeline.build.shard_block import ShardBlock
from mmkd.pipeline.build.work import BuildPlan, ShardWork
from mmkd.pipeline.inputs.prepare import PreparedClip, prepare_clip, with_flow

LARGE_BYTES = 8 * 2**20
SMALL_OBJECTS = 16
SMALL_BYTES = 4096


@dataclass(frozen=True)
class ClipCost:
    """What one clip with the views of one shard costs."""

    prepare_seconds: float
    """In a decoding process, on one core: decoding, views, and flow on a CPU."""
    device_seconds: float
    """In the build's own process: the experts, and flow on a GPU."""

    def seconds(self, workers: int, *, cores: int, device_threads: int) -> float:
        """Return the wall time from one clip to the next, stages overlapping.

        `device_threads` are the cores that the device part keeps busy: torch's threads on a CPU, 1 on a GPU.
        """
        if workers == 0:
            return self.prepare_seconds + self.device_seconds
        busy = self.prepare_seconds + self.device_seconds * device_threads
        return max(self.prepare_seconds / workers, self.device_seconds, busy / cores)


@dataclass(frozen=True)
class WriteRate:
    """How fast objects are written and synced."""

    bytes_per_second: float
    """Of one large object."""
    object_seconds: float
    """Of a small object, as most are."""


def measure_clips(plan: BuildPlan, works: Sequence[ShardWork], count: int) -> ClipCost:
    """Prepare up to `count` clips of the shards, all of one split, and give them to the experts; see `ClipCost`.

    Raises InputError when none of them can be decoded.
    """
    rows = spread_rows(works, count)
    prepared, seconds, reason = [], 0.0, "no readable clip"
    with Progress("measuring", total=len(rows)) as progress:
        for number, (work, row) in enumerate(rows):
            try:
                if number == 0:
                    prepare(plan, work, row)  # libraries load and caches fill: that is no clip's cost
                began = time.perf_counter()
                prepared.append((work, row, prepare(plan, work, row)))
                seconds += time.perf_counter() - began
            except VideoError as error:
                reason = str(error)
            progress.advance()
    if not prepared:
        raise InputError(
            f"none of {counted(len(rows), 'clip')} of {works[0].split.layout.name} can be decoded: {reason}"
        )
    device_seconds(plan, prepared[:1])
    return ClipCost(seconds / len(prepared), device_seconds(plan, prepared))


def spread_rows(works: Sequence[ShardWork], count: int) -> list[tuple[ShardWork, int]]:
    """Return up to `count` rows with known facts, evenly spread over the shards."""
    rows = [(work, row) for work in works for row in readable_rows(work)]
    wanted = min(count, len(rows))
    return [rows[number * len(rows) // wanted] for number in range(wanted)]


def readable_rows(work: ShardWork) -> list[int]:
    """Return the rows of a shard whose clips the probe could read."""
    videos = work.split.items.videos
    return [row for row in work.shard.rows if not isinstance(videos[row], VideoError)]


def prepare(plan: BuildPlan, work: ShardWork, row: int) -> PreparedClip:
    """Prepare a clip in this process as a worker would, with one thread."""
    threads = torch.get_num_threads()
    job = clip_job(plan, work, row)
    if isinstance(job, VideoError):
        raise job
    try:
        return prepare_clip(job)
    finally:
        torch.set_num_threads(threads)


def device_seconds(plan: BuildPlan, prepared: Sequence[tuple[ShardWork, int, PreparedClip]]) -> float:
    """Return the seconds of each clip in the build's own process; padding of the last batch is not counted."""
    work, _, _ = prepared[0]
    nodes = {node for work, _, _ in prepared for node in work.nodes}
    experts, recipe = plan.experts_of(nodes), plan.recipe
    views = len(work.shard.views)
    layout = SplitLayout(work.split.layout.name, len(prepared), views, len(prepared), views)
    block = ShardBlock(Shard(layout, 0, 0), experts, recipe, boxes=plan.boxes, thumbprints=THUMBPRINT in nodes)
    began = time.perf_counter()
    for position, (own, row, clip) in enumerate(prepared):
        item = own.split.items[row]
        if isinstance(item, VideoError):
            raise TypeError(f"row {row} was prepared without facts")
        device = str(plan.experts[0].device)
        clip = with_flow(clip, item, own.views(row), recipe=recipe.flow, device=device)
        block.add(position, item, own.views(row), clip)
    block.finish()
    seconds = time.perf_counter() - began
    slots = len(prepared) * views
    batches = -(-slots // recipe.build.batch_views)
    return seconds / len(prepared) * slots / (batches * recipe.build.batch_views)


def measure_writes(store: Store) -> WriteRate:
    """Write a few objects as a cache would, under keys of their own, and delete them.

    Raises StorageError when that is not possible.
    """
    data = os.urandom(LARGE_BYTES)
    probe = f"probe-{uuid.uuid4().hex[:8]}"
    small = [f"{probe}/{number}" for number in range(SMALL_OBJECTS)]
    try:
        began = time.perf_counter()
        for key in small:
            store.write(key, data[:SMALL_BYTES])
        between = time.perf_counter()
        store.write(f"{probe}/large", data)
        ended = time.perf_counter()
    finally:
        for key in (*small, f"{probe}/large"):
            store.delete(key)
    object_seconds = (between - began) / SMALL_OBJECTS
    return WriteRate(LARGE_BYTES / max(ended - between, 1e-9), object_seconds)


def measure_folder(folder: Path) -> WriteRate:
    """Measure as `measure_writes` in a folder, and leave nothing there. Raises StorageError likewise."""
    try:
        with tempfile.TemporaryDirectory(prefix=".mmkd-plan-", dir=folder) as name:
            return measure_writes(LocalStore(Path(name)))
    except OSError as error:
        raise StorageError(f"cannot write in {folder}: {error.strerror}; choose another place with -o") from error
