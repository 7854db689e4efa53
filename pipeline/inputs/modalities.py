"""The modalities: what sets each one apart, in one table that teaching, the build and drift look into.

A further one is an entry in `MODALITIES`, the data set that teaches it (in mmkd.pipeline.inputs.expert_views or a
file of its own), a name in the recipe and a network in mmkd.pipeline.experts.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmkd.cache_tools.frames.clip_set import ClipVideo
from mmkd.cache_tools.frames.source import FrameSource
from mmkd.cache_tools.views.drawing import ViewPolicy
from mmkd.cache_tools.views.look import CANONICAL_LOOK, Look, look_view
from mmkd.cache_tools.views.view import View
from mmkd.data_manifests.manifest import Head
from mmkd.pipeline.audio.sound import SOUND_RULES
from mmkd.pipeline.audio.spectrogram import AUTHORS, MelParams
from mmkd.pipeline.flow.clip_flow import flow_identity
from mmkd.pipeline.flow.flow_files import FlowFiles
from mmkd.pipeline.flow.scratch import FlowStore
from mmkd.pipeline.inputs.boxes import BoxFile, boxes_fields
from mmkd.pipeline.inputs.expert_views import BoxViews, FlowViews, Inputs, SoundViews, boxes_input
from mmkd.pipeline.inputs.prepare import PreparedClip
from mmkd.pipeline.missing import FlowMissingError, SoundMissingError
from mmkd.pipeline.recipe import AudioRecipe, ModalityName, TeacherRecipe
from mmkd.student.data.batches import ViewDataset
from mmkd.student.data.rgb_views import RGBViews
from mmkd.student.data.view_streams import ViewStream


@dataclass(frozen=True)
class InputShapes:
    """What fixes the shapes of every modality's input."""

    policy: ViewPolicy
    """T and S."""
    max_boxes: int
    """N, box slots in a frame."""
    mel: MelParams = AUTHORS
    """Rows and columns of a spectrogram."""
    look: Look = CANONICAL_LOOK
    """What the expert sees of a view."""

    @property
    def frames(self) -> int:
        """T', frames that the expert sees."""
        return self.look.frames or self.policy.frames

    @property
    def size_px(self) -> int:
        """S', side that the expert sees."""
        return self.look.size_px or self.policy.size_px


@dataclass(frozen=True)
class ViewedClip:
    """A prepared clip with what experts look into."""

    item: ClipVideo
    """The clip with its facts."""
    views: Sequence[View]
    """(V,) the views that were prepared."""
    prepared: PreparedClip
    """Their pixels, and flow where an expert needs it."""
    boxes: BoxFile | None
    """Object annotations, where an expert needs them."""
    look: Look = CANONICAL_LOOK
    """What the expert sees of each view."""


@dataclass(frozen=True, kw_only=True)
class TaughtClips:
    """Clips that an expert can use, with what its data set reads."""

    clips: Sequence[ClipVideo]
    """Clips with their facts."""
    stream: ViewStream
    """Their views."""
    heads: Sequence[Head]
    """What they are labelled with."""
    size_px: int
    """S, side of a view."""
    source: FrameSource
    """Where frames come from."""
    memory_bytes: int
    """How much decoded video may be kept."""
    flow: FlowStore | FlowFiles | None
    """What has every pair's flow, where the modality needs it."""
    boxes: BoxFile | None
    """Object annotations, where it needs them."""
    flow_stack: int = 1
    """Consecutive fields around each frame."""
    mel: MelParams = AUTHORS
    """How sound becomes a spectrogram."""


@dataclass(frozen=True, kw_only=True)
class Modality:
    """What sets one modality apart."""

    needs_flow: bool = False
    """Whether clips are prepared with their flow."""
    needs_boxes: bool = False
    """Whether object annotations are read."""
    needs_sound: bool = False
    """Whether clips are prepared with their sound."""
    empty: Callable[[InputShapes], Inputs]
    """The all-zero input, for slots without a usable clip."""
    inputs: Callable[[ViewedClip], list[Inputs]]
    """(V,) what an expert sees of each view; raises InputMissingError for a clip that lacks it."""
    data_set: Callable[[TaughtClips], ViewDataset]
    """What teaches an expert."""

    def identity(self, recipe: TeacherRecipe) -> dict[str, Any]:
        """Return what an expert's card says of its inputs beyond the canonical views."""
        return {
            "flow": flow_identity(recipe.flow) if self.needs_flow else None,
            "boxes": boxes_fields(recipe.boxes) if self.needs_boxes else None,
            **({"audio": audio_identity(recipe)} if self.needs_sound else {}),
        }


def audio_identity(recipe: TeacherRecipe) -> dict[str, Any]:
    """Return all that could change what an audio expert hears."""
    return {"rules": SOUND_RULES, "spectrogram": mel_params(recipe.audio).identity()}


def mel_params(recipe: AudioRecipe) -> MelParams:
    """Return how the recipe makes spectrograms."""
    return MelParams(**recipe.model_dump())


def open_flow(recipe: TeacherRecipe, device: str) -> FlowStore | FlowFiles:
    """Return where flow comes from: the files that a user has, or the scratch store of what is computed."""
    if recipe.flow.files is not None:
        return FlowFiles(recipe.flow.files, recipe.flow)
    return FlowStore(recipe.scratch, recipe.flow, device)


def needs_flow(modalities: Iterable[str]) -> bool:
    """Return whether any of these modalities needs flow."""
    return any(MODALITIES[modality].needs_flow for modality in modalities)


def looks_at(
    modality: str, experts: Iterable[tuple[str, Look]], *, beyond_canonical: bool = False
) -> tuple[Look, ...]:
    """Return the distinct looks of the experts (modality, look) of one modality, in their order."""
    looks = dict.fromkeys(look for own, look in experts if own == modality)
    return tuple(look for look in looks if not (beyond_canonical and look == CANONICAL_LOOK))


def needs_boxes(modalities: Iterable[str]) -> bool:
    """Return whether any of these modalities needs boxes."""
    return any(MODALITIES[modality].needs_boxes for modality in modalities)


def _rgb_empty(shapes: InputShapes) -> Inputs:
    t, s = shapes.frames, shapes.size_px
    return {"rgb": np.zeros((t, s, s, 3), np.uint8)}


def _rgb_inputs(clip: ViewedClip) -> list[Inputs]:
    """Return {"rgb": uint8 (T, S, S, 3)} of each view."""
    prepared = clip.prepared
    seen = prepared.pixels if clip.look == CANONICAL_LOOK else prepared.looks[clip.look]
    return [{"rgb": pixels} for pixels in seen]


def _rgb_data(taught: TaughtClips) -> ViewDataset:
    return RGBViews(
        taught.source,
        taught.clips,
        taught.stream,
        heads=taught.heads,
        size_px=taught.size_px,
        memory_bytes=taught.memory_bytes,
    )


def _flow_empty(shapes: InputShapes) -> Inputs:
    t, s = shapes.frames, shapes.size_px
    return {"flow": np.zeros((t, 2 * shapes.look.flow_stack, s, s), np.float32)}


def _flow_inputs(clip: ViewedClip) -> list[Inputs]:
    """Return {"flow": float32 (T, 2k, S, S)} of each view."""
    if clip.prepared.flow is None:
        raise ValueError("an expert wants flow, which was not prepared")
    if isinstance(clip.prepared.flow, str):
        raise FlowMissingError(clip.prepared.flow)
    return [{"flow": flow} for flow in clip.prepared.flow[clip.look]]


def _flow_data(taught: TaughtClips) -> ViewDataset:
    if taught.flow is None:
        raise ValueError("an expert wants flow, and there is no store of it")
    return FlowViews(
        taught.flow,
        taught.clips,
        taught.stream,
        heads=taught.heads,
        size_px=taught.size_px,
        stack=taught.flow_stack,
    )


def _boxes_empty(shapes: InputShapes) -> Inputs:
    t, n = shapes.frames, shapes.max_boxes
    return {
        "boxes": np.zeros((t, n, 4), np.float32),
        "categories": np.zeros((t, n), np.int64),
        "scores": np.zeros((t, n), np.float32),
        "sides": np.zeros((t, n), np.int64),
        "states": np.zeros((t, n), np.int64),
    }


def _boxes_inputs(clip: ViewedClip) -> list[Inputs]:
    if clip.boxes is None:
        raise ValueError("an expert wants boxes, which were not read")
    track = clip.boxes.track(clip.item.clip.video)
    return [boxes_input(track, look_view(view, clip.look.frames), clip.item) for view in clip.views]


def _boxes_data(taught: TaughtClips) -> ViewDataset:
    if taught.boxes is None:
        raise ValueError("an expert wants boxes, which were not read")
    tracks = [taught.boxes.track(item.clip.video) for item in taught.clips]
    return BoxViews(tracks, taught.clips, taught.stream, heads=taught.heads)


def _audio_empty(shapes: InputShapes) -> Inputs:
    return {"audio": np.zeros((shapes.frames, shapes.mel.mels, shapes.mel.columns), np.float32)}


def _audio_inputs(clip: ViewedClip) -> list[Inputs]:
    """Return {"audio": float32 (T, mels, columns)} of each view."""
    sound = clip.prepared.sound
    if sound is None:
        raise ValueError("an expert wants sound, which was not prepared")
    if isinstance(sound, str):
        raise SoundMissingError(sound)
    return [{"audio": spectrograms} for spectrograms in sound[clip.look]]


def _audio_data(taught: TaughtClips) -> ViewDataset:
    return SoundViews(taught.source, taught.clips, taught.stream, heads=taught.heads, params=taught.mel)


RGB = Modality(empty=_rgb_empty, inputs=_rgb_inputs, data_set=_rgb_data)
FLOW = Modality(needs_flow=True, empty=_flow_empty, inputs=_flow_inputs, data_set=_flow_data)
BOXES = Modality(needs_boxes=True, empty=_boxes_empty, inputs=_boxes_inputs, data_set=_boxes_data)
AUDIO = Modality(needs_sound=True, empty=_audio_empty, inputs=_audio_inputs, data_set=_audio_data)
MODALITIES: Mapping[str, Modality] = dict[ModalityName, Modality](rgb=RGB, flow=FLOW, boxes=BOXES, audio=AUDIO)
"""Name in recipes -> modality."""
