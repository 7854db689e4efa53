"""The build: the data's way from video files to a cache, from top to bottom of this file.

    plan      manifest, facts of every video, views of every clip, experts   (mmkd.pipeline.build.work)
    start     static part of the cache written, or the one there checked     (mmkd.pipeline.build.start)
    claim     each shard by one of any number of tasks                       (mmkd.cache_tools.tasks.claims)
    prepare   decoding processes read each clip once for all its views       (mmkd.pipeline.inputs.prepare)
    flow      TV-L1 in the same processes on a CPU, here on a GPU            (mmkd.pipeline.flow.clip_flow)
    experts   logits in batches that depend on the shard alone               (mmkd.pipeline.build.shard_block)
    write     objects, then the commit record of each node                   (mmkd.cache_tools.cache.commits)
    finalize  one root record over all records                               (mmkd.cache_tools.tasks.finish)

One shard is, in this order, a `ShardWork` (what is missing of it), an `OpenShard` (takes its clips one by one), in
that a `ShardBlock` (the experts' results), and for the `ShardWriter` a `NodeResult` of each node, to be published.

Killed at any instant it loses the shards in flight: the next run computes what has no commit record.
"""

import dataclasses
import time
from collections import deque
from collections.abc import Collection, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mmkd.cache_tools.cache.arrays import Objects
from mmkd.cache_tools.cache.commits import publish
from mmkd.cache_tools.cache.init_record import read_init
from mmkd.cache_tools.cache.reader import CacheReader
from mmkd.cache_tools.layout import commit_key
from mmkd.cache_tools.process.interrupt import StopRequest, stop_on_signals
from mmkd.cache_tools.process.pool import run_tasks
from mmkd.cache_tools.process.progress import Progress
from mmkd.cache_tools.process.stages import Stages
from mmkd.cache_tools.storage.open import open_store
from mmkd.cache_tools.storage.store import Store
from mmkd.cache_tools.tasks.claims import Claims, claimed_shards
from mmkd.cache_tools.tasks.finish import IncompleteError, finish
from mmkd.cache_tools.tasks.heartbeat import OtherTasks, Task, new_task_id
from mmkd.cache_tools.tasks.journal import Journal
from mmkd.cache_tools.upkeep.free_place import require_own_place
from mmkd.data_manifests.counted import ARE, counted
from mmkd.data_manifests.errors import FingerprintError, InterruptedByUserError, StorageError, VideoError
from mmkd.pipeline.build.open_shard import OpenShard, clip_job
from mmkd.pipeline.build.retry_unusable import retry_unusable
from mmkd.pipeline.build.start import initialise, stored_init
from mmkd.pipeline.build.work import BuildPlan, ShardWork, committed_nodes, count_clips, pending_shards, plan_build
from mmkd.pipeline.experts.expert import Expert
from mmkd.pipeline.inputs.prepare import ClipJob, prepare_clip
from mmkd.pipeline.recipe import TeacherRecipe


@dataclass
class BuildReport:
    """What a build did."""

    clips: int = 0
    """Clips computed by this run."""
    shards: int = 0
    """Shards written by this run."""
    skipped_shards: int = 0
    """Shards that were already committed."""
    left_shards: int = 0
    """Shards without all their records when this run ended: other tasks compute them, or experts were not given."""
    failed: dict[str, str] = field(default_factory=dict)
    """Shard -> why the machine could not compute it."""
    unusable: dict[str, str] = field(default_factory=dict)
    """split/clip id -> reason, over the whole cache, once it is finished."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Stage -> seconds; decode and flow on a CPU are summed over processes. `start` lasts until the first clip."""

    def lines(self, out: Path | str) -> list[str]:
        """Return the report for people."""
        total = self.seconds["total"]
        stages = ", ".join(f"{name} {value:.1f} s" for name, value in self.seconds.items() if name != "total")
        rate = f"{self.clips / total:.1f} clips/s" if self.clips else "nothing left to do"
        left = (
            f"; {counted(self.left_shards, 'shard', ARE)} left to other tasks or experts"
            if self.left_shards
            else ""
        )
        return [
            f"{out}: {counted(self.shards, 'shard')} built, {self.skipped_shards} were there; "
            f"{counted(self.clips, 'clip')} in "
            f"{total:.1f} s, {rate}; {len(self.unusable)} unusable{left}",
            *([f"time: {stages} (decode and flow summed over processes)"] if stages else []),
        ]


def build_cache(
    recipe: TeacherRecipe,
    experts: tuple[Expert, ...],
    out: Path | str | Store,
    *,
    task: tuple[int, int] = (0, 1),
    replace: Collection[str] = (),
    retry: bool = False,
) -> BuildReport:
    """Build the cache in `out`, or finish or extend the one there; `task` is (i, n) for task i of n.

    Experts of the cache that are not given stay as they are; those named in `replace` are computed again. With
    `retry` the clips that are recorded as unusable and can be read now are computed again.
    Raises InputError, FingerprintError, StorageError, or InterruptedByUserError after a clean stop.
    """
    began = time.perf_counter()
    report = BuildReport()
    store = open_store(out) if isinstance(out, (Path, str)) else out
    require_own_place(store)
    plan = plan_build(recipe, experts, stored_init(store), replace=replace)
    task_id = new_task_id()
    with stop_on_signals() as stop, Task(store, task_id) as own:
        others = OtherTasks(own)
        others.sweep()
        claims = Claims(own, others)
        with claims.whole_cache():
            if retry:
                retry_unusable(store, plan, others)
            init, metadata = initialise(
                store,
                plan.splits,
                manifest=plan.clip_set.manifest,
                base=plan.base,
                experts=plan.nodes,
                replace=replace,
                still_ours=claims.holds_cache,
            )
        report.seconds["start"] = time.perf_counter() - began
        pending, report.skipped_shards = pending_shards(plan, committed_nodes(store, init, claims), task=task)
        journal = Journal(store, task_id)
        while pending:
            writer = ShardWriter(plan, store, claims=claims, metadata=metadata, pending=pending)
            writer.run(report, journal, stop)
            left, _ = pending_shards(plan, committed_nodes(store, init, claims), task=task)
            left = [work for work in left if work.shard.name not in report.failed]
            pending = abandoned(left, store, others, stop)
        if report.failed:
            shard, reason = next(iter(report.failed.items()))
            raise StorageError(
                f"{counted(len(report.failed), 'shard')} failed; the first is {shard}: {reason}. "
                f"Nothing else was lost; run "
                "again"
            )
        report.left_shards = finish_or_leave(store, claims, others)
    if not report.left_shards:
        store.tidy()
        report.unusable = unusable_clips(CacheReader(store))
    report.seconds["total"] = time.perf_counter() - began
    return report


def finish_or_leave(store: Store, claims: Claims, others: OtherTasks) -> int:
    """Finish the cache, or return how many shards other tasks have still to compute."""
    left = left_shards(store)
    if left:
        return left
    try:
        finish(store, claims, others)
    except IncompleteError:  # it was given more views or experts since, and who did so is at work on them
        return left_shards(store)
    return 0


def left_shards(store: Store) -> int:
    """Return how many shards lack a record; read again, for the cache may have grown."""
    return len({shard.name for shard, _ in read_init(store).missing(store)})


def abandoned(left: list[ShardWork], store: Store, others: OtherTasks, stop: StopRequest) -> list[ShardWork]:
    """Return the shards left that no task at work holds, such as those of a task that was killed elsewhere."""
    holders = claimed_shards(store)
    held = {work.shard.name: holders[work.shard.name] for work in left if work.shard.name in holders}
    others.await_signs(set(held.values()), stop)
    return [work for work in left if work.shard.name not in held or not others.alive(held[work.shard.name])]


def unusable_clips(reader: CacheReader) -> dict[str, str]:
    """Return split/clip id -> reason of every clip that some expert has no logits for."""
    return {
        f"{split}/{item.clip_id}": item.reason
        for split in reader.layouts
        for items in reader.unusable(split).values()
        for item in items
    }


class ShardWriter:
    """Shards on their way from claim to commit, one task's share of a build."""

    def __init__(
        self, plan: BuildPlan, store: Store, *, claims: Claims, metadata: Objects, pending: list[ShardWork]
    ) -> None:
        """Compute `pending`; `metadata` holds every array's metadata object."""
        self._plan, self._store, self._claims, self._metadata = plan, store, claims, metadata
        self._pending = pending
        self._claimed: deque[ShardWork] = deque()

    def run(self, report: BuildReport, journal: Journal, stop: StopRequest) -> None:
        """Compute and commit the shards, clips flowing through all of them without a pause."""
        recipe, stage = self._plan.recipe, Stages(report.seconds)
        clips = run_tasks(
            prepare_clip,
            self._jobs(),
            workers=recipe.data.workers,
            timeout_seconds=recipe.data.clip_timeout_seconds,
            recheck_errors=True,
            extra_items=self._batch_clips(),  # so that decoding goes on while the experts take a whole batch
            canaries=canary_jobs(self._plan),
        )
        current: OpenShard | None = None
        faults = 0
        try:
            with closing(clips), Progress("building", total=count_clips(self._pending), unit="clip") as progress:
                for clip in stage.waits(clip for _, clip in clips):
                    if stop.requested:
                        raise InterruptedByUserError("stopped; run the same command again to go on")
                    faults = refuse_many_faults(faults, clip)
                    current = current or OpenShard(self._plan, self._claimed[0], stage)
                    current.add(clip)
                    progress.advance(1, note=stage.shares())
                    if current.is_full:
                        self._finish(current, report, journal)
                        current = None
        finally:
            for work in self._claimed:
                self._claims.release(work.shard)

    def _batch_clips(self) -> int:
        """Return how many clips fill a batch of the experts."""
        views = min((len(work.shard.views) for work in self._pending), default=1)
        return -(-self._plan.recipe.build.batch_views // views)

    def _jobs(self) -> Iterator[ClipJob | VideoError]:
        """Yield a job (or why there is none) for each clip of each shard that nobody else holds or has done."""
        for planned in self._pending:
            if not self._claims.take(planned.shard):
                continue
            # Asked under the claim: another task may have committed it between the plan and now.
            nodes = tuple(node for node in planned.nodes if not self._is_committed(planned, node))
            work = dataclasses.replace(planned, nodes=nodes)
            if not nodes:
                self._claims.release(work.shard)
                continue
            self._claimed.append(work)
            for row in work.shard.rows:
                yield clip_job(self._plan, work, row)

    def _finish(self, shard: "OpenShard", report: BuildReport, journal: Journal) -> None:
        name, rows = shard.work.shard.name, len(shard.work.shard.rows)
        if shard.failure:
            report.failed[name] = shard.failure
            journal.add(shard=name, error=shard.failure)
        else:
            try:
                size_bytes = self._publish(shard)
            except StorageError as error:
                with suppress(StorageError):  # the disk that is full may hold the journal, too
                    journal.add(shard=name, error=str(error))
                raise
            report.clips += rows
            report.shards += 1
            journal.add(shard=name, rows=rows, bytes=size_bytes, seconds=round(shard.seconds, 3))
        self._claims.release(self._claimed.popleft().shard)

    def _publish(self, shard: "OpenShard") -> int:
        """Write every node of a finished shard, unless another task took it over; return the bytes written."""
        size_bytes = 0
        for node, result in shard.results().items():
            with shard.stage("write"):
                if self._is_committed(shard.work, node) or not self._claims.holds(shard.work.shard):
                    continue
                self._refuse_replaced(node)
                objects = result.encode(self._metadata)
                record = result.record(self._plan.fingerprints[node], objects)
                publish(self._store, shard.work.shard, record, objects)
                size_bytes += sum(map(len, objects.values()))
        return size_bytes

    def _refuse_replaced(self, node: str) -> None:
        """Raise FingerprintError when an expert was replaced while this task computed with the old one.

        Asked under the claim on the shard, so whoever replaced it computes that shard later, and has the last word.
        """
        if read_init(self._store).fingerprints().get(node) != self._plan.fingerprints[node]:
            raise FingerprintError(
                f"{self._store.locate()}: {node!r} was replaced while this task was at work; run the build again "
                "with the new expert"
            )

    def _is_committed(self, work: ShardWork, node: str) -> bool:
        return self._store.exists(commit_key(work.shard, node, self._plan.fingerprints[node]))


FAULTS_IN_A_ROW = 8
"""So many clips that the machine cannot read end a build: with a lost disk none of the others can be read."""


def refuse_many_faults(before: int, clip: object) -> int:
    """Return how many of the latest clips in a row the machine could not read; StorageError when they are many."""
    faults = before + 1 if isinstance(clip, StorageError) else 0
    if faults == FAULTS_IN_A_ROW:
        raise StorageError(
            f"stopped, since the machine cannot read {counted(faults, 'clip')} in a row; the last one: {clip}"
        )
    return faults


def canary_jobs(plan: BuildPlan) -> list[ClipJob]:
    """Return a few clips that can be read if the machine is well: the first and the last one of each split."""
    jobs = []
    for split in plan.splits:
        readable = np.flatnonzero(split.items.facts[:, 3])
        work = ShardWork(split, next(split.layout.shards()), ())
        jobs += [clip_job(plan, work, row) for row in readable[[0, -1][: len(readable)]].tolist()]
    return [job for job in jobs if isinstance(job, ClipJob)]
