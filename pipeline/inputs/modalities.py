"""What an expert of each modality sees of one view: one function for teaching and for the build."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mmkd.cache_tools.frames.clip_set import ClipVideo
from mmkd.cache_tools.views.drawing import ViewPolicy
from mmkd.cache_tools.views.view import View
from mmkd.pipeline.inputs.boxes import BoxFile, BoxTrack, boxes_at
from mmkd.pipeline.inputs.prepare import PreparedClip

Inputs = dict[str, npt.NDArray[Any]]
"""Name -> array of one view, without a batch axis."""


@dataclass(frozen=True)
class InputShapes:
    """What fixes the shapes of every modality's input."""

    policy: ViewPolicy
    """T and S."""
    max_boxes: int
    """N, box slots in a frame."""

    def empty(self, modality: str) -> Inputs:
        """Return the all-zero input of a modality, for slots without a usable clip."""
        t, s, n = self.policy.frames, self.policy.size_px, self.max_boxes
        if modality == "rgb":
            return {"rgb": np.zeros((t, s, s, 3), np.uint8)}
        if modality == "flow":
            return {"flow": np.zeros((t, 2, s, s), np.float32)}
        return {
            "boxes": np.zeros((t, n, 4), np.float32),
            "categories": np.zeros((t, n), np.int64),
            "scores": np.zeros((t, n), np.float32),
        }


def boxes_input(track: BoxTrack, view: View, item: ClipVideo) -> Inputs:
    """Return boxes float32 (T, N, 4), full-frame normalised as in STLT, categories int64 and scores (T, N).

    Raises BoxesMissingError when the annotation does not fit the video.
    """
    times_seconds = item.video.times_seconds[view.frame_indices]
    found = boxes_at(track, times_seconds, width=item.facts.width, height=item.facts.height)
    return {"boxes": found.boxes, "categories": found.categories, "scores": found.scores}


def view_inputs(
    modality: str,
    item: ClipVideo,
    views: Sequence[View],
    clip: PreparedClip,
    *,
    boxes: BoxFile | None,
) -> list[Inputs]:
    """Return what an expert of a modality sees of each view of a prepared clip.

    {"rgb": uint8 (T, S, S, 3)}, {"flow": float32 (T, 2, S, S)}, or what `boxes_input` returns.
    Raises BoxesMissingError when the annotation does not fit the video.
    """
    if modality == "rgb":
        return [{"rgb": pixels} for pixels in clip.pixels]
    if modality == "flow" and clip.flow is not None:
        return [{"flow": flow} for flow in clip.flow]
    if modality == "boxes" and boxes is not None:
        track = boxes.track(item.clip.video)
        return [boxes_input(track, view, item) for view in views]
    raise ValueError(f"an expert wants {modality!r}, which was not prepared")
