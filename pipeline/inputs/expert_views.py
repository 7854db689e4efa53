"""Data sets of the expensive modalities, for teaching their experts: flow and boxes, view by view."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mmkd.cache_tools.frames.clip_set import ClipVideo
from mmkd.cache_tools.frames.source import FrameSource
from mmkd.cache_tools.views.look import look_view
from mmkd.cache_tools.views.view import View
from mmkd.data_manifests.manifest import Head
from mmkd.pipeline.audio.sound_views import clip_sound, view_sounds
from mmkd.pipeline.audio.spectrogram import MelParams
from mmkd.pipeline.flow.clip_flow import FlowFields, stack_starts, view_flow
from mmkd.pipeline.flow.flow_files import FlowFiles
from mmkd.pipeline.flow.scratch import FlowStore
from mmkd.pipeline.inputs.boxes import Track, boxes_at
from mmkd.student.data.packed_clips import PackedClips
from mmkd.student.data.rgb_views import label_arrays
from mmkd.student.data.view_streams import ViewStream

Inputs = dict[str, npt.NDArray[Any]]
"""Name -> array of one view, without a batch axis."""


def boxes_input(track: Track, view: View, item: ClipVideo) -> Inputs:
    """Return boxes float32 (T, N, 4), full-frame normalised as in STLT; categories, scores, sides, states (T, N).

    Raises BoxesMissingError when the annotation does not fit the video.
    """
    times_seconds = item.video.times_seconds[view.frame_indices]
    found = boxes_at(track, times_seconds, width=item.facts.width, height=item.facts.height)
    return {name: getattr(found, name) for name in ("boxes", "categories", "scores", "sides", "states")}


class LookStream:
    """The views of another stream at a look's number of frames."""

    def __init__(self, stream: ViewStream, frames: int | None) -> None:
        """Give every view of `stream` that many frames; None: its own."""
        self._stream, self._frames, self.views = stream, frames, stream.views

    def view(self, row: int, view: int) -> View:
        """Return one view of one row."""
        return look_view(self._stream.view(row, view), self._frames)

    def packed(self, clips: PackedClips) -> ViewStream:
        """Return the same views in a form that other processes share."""
        return LookStream(self._stream.packed(clips), self._frames)


class ClipViews:
    """What the data sets of all modalities share (see mmkd.student.data.batches.ViewDataset)."""

    def __init__(self, clips: Sequence[ClipVideo], stream: ViewStream, heads: Sequence[Head]) -> None:
        """Serve views of `clips` from `stream`."""
        self._clips = clips
        self._stream = stream
        self.rows = len(clips)
        self.views = stream.views
        self.clip_ids = [item.clip.clip_id for item in clips]
        self.labels = label_arrays(clips, heads)


class FlowViews(ClipViews):
    """Windows of fields that the scratch store holds."""

    def __init__(
        self,
        store: FlowStore | FlowFiles,
        clips: Sequence[ClipVideo],
        stream: ViewStream,
        *,
        heads: Sequence[Head],
        size_px: int,
        stack: int = 1,
    ) -> None:
        """Serve views of clips whose every pair is in `store`, `stack` fields around each frame."""
        super().__init__(clips, stream, heads)
        self._store, self._step, self._size_px, self._stack = store, store.recipe.step, size_px, stack

    def item(self, row: int, view: int) -> Inputs:
        """Return {"flow": float32 (T, 2k, S, S)} of one view."""
        item, wanted = self._clips[row], self._stream.view(row, view)
        starts = np.unique(stack_starts(wanted.frame_indices, item.facts, self._step, self._stack))
        fields = FlowFields(starts, self._store.read(item, starts))
        flow = view_flow(fields, wanted, item.facts, step=self._step, size_px=self._size_px, stack=self._stack)
        return {"flow": flow}


class SoundViews(ClipViews):
    """Spectrograms around a view's frames."""

    def __init__(
        self,
        source: FrameSource,
        clips: Sequence[ClipVideo],
        stream: ViewStream,
        *,
        heads: Sequence[Head],
        params: MelParams,
    ) -> None:
        """Serve views of clips whose videos have sound."""
        super().__init__(clips, stream, heads)
        self._source, self._params = source, params

    def item(self, row: int, view: int) -> Inputs:
        """Return {"audio": float32 (T, mels, columns)} of one view."""
        item = self._clips[row]
        sound = clip_sound(self._source, item, self._params)
        return {"audio": view_sounds(sound, item, [self._stream.view(row, view)], self._params)[0]}


class BoxViews(ClipViews):
    """Boxes at the times of a view's frames."""

    def __init__(
        self,
        tracks: Sequence[Track],
        clips: Sequence[ClipVideo],
        stream: ViewStream,
        *,
        heads: Sequence[Head],
    ) -> None:
        """Serve views of clips with their tracks, in the same order."""
        super().__init__(clips, stream, heads)
        self._tracks = tracks

    def item(self, row: int, view: int) -> Inputs:
        """Return boxes, categories and scores of one view."""
        return boxes_input(self._tracks[row], self._stream.view(row, view), self._clips[row])
