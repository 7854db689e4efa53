"""The evaluation views of clips, drawn from their facts by the rules of `mmkd-cache build`; no cache is needed."""

from collections.abc import Sequence

import numpy as np

from mmkd.cache_tools.cache.split_table import SplitTable
from mmkd.cache_tools.frames.clip_set import ClipVideo
from mmkd.cache_tools.frames.records import facts_table
from mmkd.cache_tools.frames.source import FrameSource
from mmkd.cache_tools.views.drawing import ViewPolicy, evaluation_view_table
from mmkd.data_manifests.manifest import Head
from mmkd.student.data.rgb_views import RGBViews, label_arrays
from mmkd.student.data.view_streams import StoredViews


def one_view(policy: ViewPolicy) -> ViewPolicy:
    """Return the policy whose evaluation sees each clip once, in its middle."""
    return policy.model_copy(update={"evaluation_clips": 1, "evaluation_crops": 1})


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
