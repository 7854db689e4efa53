"""RGB views of small real videos, as training reads them: eight barcode clips of three videos."""

from pathlib import Path

import numpy as np

from mmkd.cache_tools.cache.split_table import SplitTable
from mmkd.cache_tools.frames.clip_set import ClipVideo
from mmkd.cache_tools.frames.data_frames import DataFrames
from mmkd.cache_tools.frames.records import facts_table
from mmkd.cache_tools.frames.source import clip_facts
from mmkd.cache_tools.views.drawing import ViewPolicy, random_view_table
from mmkd.data_manifests.manifest import Clip, Head
from mmkd.student.data.rgb_views import RGBViews
from mmkd.student.data.view_streams import DrawnViews, StoredViews
from tests.helpers.barcode_videos import EXACT, write_sample

HEADS = (Head("action", ("a", "b")),)
POLICY = ViewPolicy(frames=6, size_px=24)
DRAWING = {"dataset": "barcodes", "seed": 3, "flip_allowed": True}
SAMPLES = [sample for sample in EXACT if sample.name in ("vp9.webm", "open.mp4", "mpeg4_b.mp4")]


def write_videos(folder: Path) -> list[ClipVideo]:
    """Write three videos and return eight clips of them."""
    for sample in SAMPLES:
        write_sample(folder, sample)
    source, clips = DataFrames(folder), []
    for number in range(8):
        video = SAMPLES[number % 3].name
        clip = Clip(f"clip-{number}", video, "train", {"action": number % 2}, 0.1 * number, 0.1 * number + 1.2)
        facts = source.probe(video)
        clips.append(ClipVideo(clip, facts, clip_facts(clip, facts)))
    return clips


def rgb_views(folder: Path, clips: list[ClipVideo], *, stored: bool, memory_bytes: int = 0, **options) -> RGBViews:
    """Return the clips' views: three stored ones, in another order than the table's, or fresh ones."""
    if stored:
        facts, order = facts_table([item.facts for item in clips])[::-1], list(range(len(clips)))[::-1]
        ids = tuple(item.clip.clip_id for item in clips)[::-1]
        drawn = random_view_table(facts, POLICY, clip_ids=ids, numbers=range(3), **DRAWING)
        table = SplitTable("train", ids, {"action": np.zeros(len(ids), np.int64)}, facts.astype(np.int64), drawn)
        stream = StoredViews(table, order)
    else:
        stream = DrawnViews(clips, POLICY, views=None, **DRAWING)
    size_px = POLICY.size_px
    return RGBViews(
        DataFrames(folder), clips, stream, heads=HEADS, size_px=size_px, memory_bytes=memory_bytes, **options
    )
