"""The evaluation views of clips, drawn from their facts by the rules of `mmkd-cache build`; no cache is needed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from mmkd.cache_tools.cache.split_table import SplitTable
from mmkd.cache_tools.frames.clip_set import ClipVideo
from mmkd.cache_tools.frames.records import Float64Array, facts_table
from mmkd.cache_tools.frames.source import FrameSource
from mmkd.cache_tools.views.drawing import ViewPolicy, evaluation_view_table
from mmkd.data_manifests.manifest import Head
from mmkd.student.data.rgb_views import RGBViews, label_arrays
from mmkd.student.data.split_data import SplitData
from mmkd.student.data.view_streams import StoredViews


@dataclass(frozen=True)
class EvaluationLook:
    """How often a clip is seen when testing, where that is asked for."""

    positions: int | None = None
    """Places in time, 1 to 32, spread evenly; None: as the policy says."""
    crops: Literal[1, 3] | None = None
    """Windows along the long side; None: as the policy says."""

    def of(self, policy: ViewPolicy) -> ViewPolicy:
        """Return a policy with these evaluation views."""
        asked = {"evaluation_clips": self.positions, "evaluation_crops": self.crops}
        return policy.model_copy(update={name: value for name, value in asked.items() if value is not None})


def one_view(policy: ViewPolicy) -> ViewPolicy:
    """Return the policy whose evaluation sees each clip once, in its middle."""
    return EvaluationLook(1, 1).of(policy)


def evaluation_table(
    name: str, clips: Sequence[ClipVideo], heads: Sequence[Head], policy: ViewPolicy
) -> SplitTable:
    """Return readable clips as a table of a split, under their evaluation views."""
    facts = facts_table([item.facts for item in clips])
    times = [item.times_seconds for item in clips] if policy.is_timed else None
    return SplitTable(
        name=name,
        clip_ids=tuple(item.clip.clip_id for item in clips),
        labels=label_arrays(clips, heads),
        facts=facts.astype(np.int64),
        drawn=evaluation_view_table(facts, policy, times),
    )


def evaluation_data(
    source: FrameSource, clips: Sequence[ClipVideo], heads: Sequence[Head], policy: ViewPolicy, *, memory_bytes: int
) -> RGBViews:
    """Return the pixels of clips' evaluation views, keeping at most `memory_bytes` of decoded frames."""
    stream = evaluation_stream(clips, heads, policy)
    return RGBViews(source, clips, stream, heads=heads, size_px=policy.size_px, memory_bytes=memory_bytes)


def evaluation_stream(clips: Sequence[ClipVideo], heads: Sequence[Head], policy: ViewPolicy) -> StoredViews:
    """Return the evaluation views of readable clips, as a stream of views."""
    return StoredViews(evaluation_table("", clips, heads, policy), range(len(clips)))


def seen_under(split: SplitData, source: FrameSource, heads: Sequence[Head], policy: ViewPolicy) -> SplitData:
    """Return the clips of a split under the evaluation views of another policy, decoded when they are asked for."""
    rows = split.table.rows
    facts = np.zeros((rows, 4), np.int32)
    facts[split.rows] = facts_table([item.facts for item in split.clips])
    times: list[Float64Array | None] = [None] * rows
    for row, item in zip(split.rows.tolist(), split.clips, strict=True):
        times[row] = item.times_seconds
    table = replace(split.table, drawn=evaluation_view_table(facts, policy, times if policy.is_timed else None))
    stream = StoredViews(table, split.rows.tolist())
    data = RGBViews(source, split.clips, stream, heads=heads, size_px=policy.size_px, memory_bytes=0)
    return replace(split, table=table, data=data)
