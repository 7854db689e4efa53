"""How much time a dense view covers: less than a second of a kitchen says little of what a hand does there."""

from collections.abc import Sequence

import numpy as np

from mmkd.cache_tools.frames.clip_set import ClipVideo, ClipVideos
from mmkd.cache_tools.views.drawing import ViewPolicy
from mmkd.cache_tools.views.timed import median_interval_seconds
from mmkd.data_manifests.counted import counted

SHORT_SECONDS = 1.0
"""The authors' stride of 8 at 60 fps is 1.07 s; EPIC-KITCHENS' reference models look at 2 s, or at all."""
ROUNDING = 1e-3
"""Share by which rates such as 59.94 are not taken for short of a nominal one."""


def short_views_line(policy: ViewPolicy, clips: Sequence[ClipVideos]) -> str | None:
    """Return one line where a view covers less than a second of a clip that lasts longer; None where none does.

    A view of T frames covers T times their distance. Only dense views are stated by a distance.
    """
    if policy.sampling != "dense":
        return None
    spans: dict[str, float] = {}
    short, total, least = 0, 0, SHORT_SECONDS
    for item in (item for items in clips for item in items if isinstance(item, ClipVideo)):
        total += 1
        identity = item.video.identity
        if identity not in spans:
            interval = median_interval_seconds(item.video.times_seconds)
            spans[identity] = policy.frames * (policy.seconds_between_frames or policy.stride * interval)
        span = spans[identity]
        lasts = float(np.ptp(item.times_seconds[[0, -1]]))
        if span < SHORT_SECONDS * (1 - ROUNDING) and lasts > span:
            short, least = short + 1, min(least, span)
    if not short:
        return None
    wanted = f"{SHORT_SECONDS / policy.frames:g}"
    return (
        f"a view covers less than {SHORT_SECONDS:g} s of {short} of {counted(total, 'clip')} (the least: "
        f"{least:.2f} s): "
        f"--set views.seconds_between_frames={wanted} covers {SHORT_SECONDS:g} s at every frame rate"
    )
