"""A shard that takes its clips: what each one's job is, and what becomes of it in the shard's block."""

import time
from dataclasses import replace

from mmkd.cache_tools.layout import THUMBPRINT
from mmkd.cache_tools.process.stages import Stages
from mmkd.data_manifests.errors import StorageError, VideoError
from mmkd.pipeline.build.shard_block import NodeResult, ShardBlock
from mmkd.pipeline.build.work import BuildPlan, ShardWork
from mmkd.pipeline.inputs.modalities import looks_at, mel_params, needs_flow, open_flow
from mmkd.pipeline.inputs.prepare import ClipJob, FlowJob, PreparedClip, SoundJob, with_flow


class OpenShard:
    """A shard that takes its clips, one after the other."""

    def __init__(self, plan: BuildPlan, work: ShardWork, stage: Stages) -> None:
        """Start with the shard's first row."""
        self.work, self.stage = work, stage
        self.failure = ""
        """Why the machine could not compute the shard; empty as long as it can."""
        self._plan, self._row = plan, work.shard.rows.start
        self._began = time.perf_counter()
        self._block = ShardBlock(
            work.shard,
            plan.experts_of(work.nodes),
            plan.recipe,
            boxes=plan.boxes,
            thumbprints=THUMBPRINT in work.nodes,
        )

    @property
    def is_full(self) -> bool:
        """Whether every row has come."""
        return self._row == self.work.shard.rows.stop

    @property
    def seconds(self) -> float:
        """Time since the first clip."""
        return time.perf_counter() - self._began

    def add(self, clip: PreparedClip | VideoError | StorageError) -> None:
        """Give the next row's clip to the experts; one that cannot be read fails its row alone."""
        row, self._row = self._row, self._row + 1
        if self.failure:
            return
        if isinstance(clip, StorageError):
            self.failure = f"clip {self.work.split.clips[row].clip_id!r}: {clip}"
            return
        if isinstance(clip, VideoError):
            self._block.fail(row, str(clip))
            return
        for name, seconds in clip.seconds.items():
            self.stage.add(name, seconds)
        item, views = self.work.split.items[row], self.work.views(row)
        if isinstance(item, VideoError):
            raise TypeError(f"row {row} was prepared without facts")
        if clip.frames is not None:
            with self.stage("flow"):
                device = str(self._plan.experts[0].device)
                clip = with_flow(clip, item, views, recipe=self._plan.recipe.flow, device=device)
        with self.stage("experts"):
            self._block.add(row, item, views, clip)

    def results(self) -> dict[str, NodeResult]:
        """Run what is still queued and return node -> result."""
        with self.stage("experts"):
            self._block.finish()
        return self._block.results(self.work.split.clips)


def clip_job(plan: BuildPlan, work: ShardWork, row: int) -> ClipJob | VideoError:
    """Return the job of one clip: its views in the shard, and flow where a wanted expert sees it.

    Of a clip that cannot be used return why: no process has to find it out again.
    """
    recipe, item = plan.recipe, work.split.items[row]
    if isinstance(item, VideoError):
        return item
    flow, experts = None, [(expert.modality, expert.card.look) for expert in plan.experts_of(work.nodes)]
    if needs_flow(modality for modality, _ in experts):
        device = plan.experts[0].device
        flow = FlowJob(recipe.flow, open_flow(recipe, str(device)), device.type)
        flow = replace(flow, looks=looks_at("flow", experts))
    further = looks_at("rgb", experts, beyond_canonical=True)
    heard = looks_at("audio", experts)
    sound = SoundJob(mel_params(recipe.audio), heard) if heard else None
    return ClipJob(plan.clip_set.source, item, work.views(row), recipe.views.size_px, flow, further, sound)
