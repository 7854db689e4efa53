"""What a decoding process does with one clip: read it once, make every view's pixels, thumbprint and flow.

These functions run in worker processes that may die or be killed, as many as there are cores, so that the process
with the experts has nothing left to do but to run them. On the CPU flow is computed here too, one thread to a
process, since TV-L1 scales by processes there; on a GPU the build computes it from `frames`.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from mmkd.cache_tools.frames.clip_set import ClipVideo
from mmkd.cache_tools.frames.records import ClipFrames, Float32Array, IntArray, UInt8Array, UInt64Array
from mmkd.cache_tools.frames.source import FrameSource
from mmkd.cache_tools.views.canonical import canonical_view, pixel_hash, thumbnail
from mmkd.cache_tools.views.look import CANONICAL_LOOK, Look, look_view
from mmkd.cache_tools.views.view import View
from mmkd.data_manifests.errors import VideoError
from mmkd.pipeline.audio.sound_views import clip_sound, view_sounds
from mmkd.pipeline.audio.spectrogram import MelParams
from mmkd.pipeline.flow.clip_flow import FlowFields, all_pairs, clip_flow, pair_ends, stack_starts, view_flow
from mmkd.pipeline.flow.flow_files import FlowFiles
from mmkd.pipeline.flow.scratch import DamagedFlowError, FlowStore
from mmkd.pipeline.missing import FlowMissingError, SoundMissingError
from mmkd.pipeline.recipe import FlowRecipe


@dataclass(frozen=True)
class FlowJob:
    """How a worker gets a clip's flow."""

    recipe: FlowRecipe
    """What is computed."""
    store: FlowStore | FlowFiles | None
    """Scratch store that is read where it has the clip, or files that are read and nothing else."""
    device: str
    """Type of device: on `cpu` the worker computes, on any other the caller does."""
    looks: tuple[Look, ...] = (CANONICAL_LOOK,)
    """What flow experts see of each view."""


@dataclass(frozen=True)
class SoundJob:
    """What of a clip's sound is wanted."""

    params: MelParams
    """How sound becomes a spectrogram."""
    looks: tuple[Look, ...]
    """What audio experts see of each view."""


@dataclass(frozen=True)
class ClipJob:
    """One clip to prepare."""

    source: FrameSource
    """Where frames come from."""
    item: ClipVideo
    """The clip with its facts."""
    views: tuple[View, ...]
    """The views wanted."""
    size_px: int
    """S, side of a view."""
    flow: FlowJob | None
    """None when no expert needs flow."""
    looks: tuple[Look, ...] = ()
    """Looks of rgb experts beyond the canonical view; each adds V · T' · S'² · 3 bytes to what is prepared."""
    sound: SoundJob | None = None
    """None when no expert needs sound."""


@dataclass(frozen=True)
class PreparedClip:
    """A clip ready for the experts."""

    pixels: UInt8Array
    """(V, T, S, S, 3) canonical views."""
    pixel_hashes: UInt64Array
    """(V,) their hashes."""
    thumbnails: UInt8Array
    """(V, 144) their thumbnails."""
    flow: Mapping[Look, Float32Array] | str | None
    """Look -> (V, T', 2k, S', S') flow in pixels per step; why there is none; or None: unwanted, or not here."""
    frames: ClipFrames | None
    """The frames of those pairs, when flow is left to the build's device."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Stage -> seconds of this process."""
    looks: Mapping[Look, UInt8Array] = field(default_factory=dict)
    """Look -> (V, T', S', S', 3) pixels, of the looks beyond the canonical one."""
    flow_looks: tuple[Look, ...] = ()
    """The looks at flow that are left to the build's device."""
    sound: Mapping[Look, Float32Array] | str | None = None
    """Look -> (V, T', mels, columns) spectrograms in decibels; why there are none; or None when not wanted."""


def needed_pairs(views: tuple[View, ...], item: ClipVideo, step: int, looks: tuple[Look, ...]) -> IntArray:
    """Return the ascending starts of all pairs that the looks at the views need."""
    needed = [
        stack_starts(look_view(view, look.frames).frame_indices, item.facts, step, look.flow_stack)
        for look in looks
        for view in views
    ]
    return np.unique(np.concatenate(needed))


def prepare_clip(job: ClipJob) -> PreparedClip:
    """Decode the union of frames once, make the canonical views, and compute or fetch the flow.

    Raises VideoError when the clip cannot be read exactly, StorageError when the machine's reading fails.
    """
    began = time.perf_counter()
    looks = (CANONICAL_LOOK, *job.looks)
    sampled = [look_view(view, look.frames).frame_indices for look in looks for view in job.views]
    starts = needed_pairs(job.views, job.item, job.flow.recipe.step, job.flow.looks) if job.flow else None
    fields = stored_flow(job.flow, job.item, starts) if job.flow and starts is not None else None
    if job.flow and starts is not None and fields is None:
        sampled += [starts, pair_ends(starts, job.item.facts, job.flow.recipe.step)]
    looked_up = time.perf_counter()
    frames = job.source.read(job.item.clip.video, np.unique(np.concatenate(sampled)), job.item.video)
    check_size(frames, job.item)
    seen = {look: look_pixels(frames, job, look) for look in looks}
    pixels = seen.pop(CANONICAL_LOOK)
    hashes = np.array([pixel_hash(view) for view in pixels], np.uint64)
    thumbnails = np.stack([thumbnail(view) for view in pixels])
    decoded = time.perf_counter()
    flow: Mapping[Look, Float32Array] | str | None = fields if isinstance(fields, str) else None
    if job.flow and starts is not None and not isinstance(fields, str):
        if fields is None and job.flow.device == "cpu":
            fields = _flow(frames, job.item, starts, job.flow)
        if fields is not None:
            recipe = job.flow.recipe
            flow = {
                look: view_flows(fields, job.views, job.item, recipe=recipe, size_px=job.size_px, look=look)
                for look in job.flow.looks
            }
    seconds = {"decode": decoded - looked_up, "flow": looked_up - began + time.perf_counter() - decoded}
    left = frames if job.flow and flow is None else None
    flow_looks = job.flow.looks if job.flow else ()
    sound = prepared_sound(job) if job.sound else None
    return PreparedClip(pixels, hashes, thumbnails, flow, left, seconds, seen, flow_looks, sound)


def prepared_sound(job: ClipJob) -> Mapping[Look, Float32Array] | str:
    """Return the spectrograms of each look, or why the clip has none."""
    if job.sound is None:
        raise ValueError("no sound is wanted")
    torch.set_num_threads(1)  # as many processes as cores do this at the same time
    params = job.sound.params
    try:
        sound = clip_sound(job.source, job.item, params)
    except SoundMissingError as error:
        return str(error)
    looked = {look: [look_view(view, look.frames) for view in job.views] for look in job.sound.looks}
    return {look: view_sounds(sound, job.item, views, params) for look, views in looked.items()}


def look_pixels(frames: ClipFrames, job: ClipJob, look: Look) -> UInt8Array:
    """Return (V, T', S', S', 3): the views as a look sees them."""
    size_px = look.size_px or job.size_px
    return np.stack([canonical_view(frames, look_view(view, look.frames), size_px) for view in job.views])


def stored_flow(flow: FlowJob, item: ClipVideo, starts: IntArray) -> FlowFields | str | None:
    """Return the fields that the scratch store has; None when they are to be computed, as damaged ones are.

    Of a user's files the fields, or why there are none.
    """
    if isinstance(flow.store, FlowFiles):
        try:
            return FlowFields(starts, flow.store.read(item, starts))
        except FlowMissingError as error:
            return str(error)
    if flow.store is None or not flow.store.has(item):
        return None
    try:
        return FlowFields(starts, flow.store.read(item, starts))
    except DamagedFlowError:
        return None


def with_flow(
    clip: PreparedClip, item: ClipVideo, views: tuple[View, ...], *, recipe: FlowRecipe, device: str
) -> PreparedClip:
    """Compute the flow that preparing left to the caller's device; a clip without such frames stays as it is."""
    if clip.frames is None:
        return clip
    starts = needed_pairs(views, item, recipe.step, clip.flow_looks)
    fields = clip_flow(clip.frames, item.facts, starts, recipe=recipe, device=device)
    size_px = clip.pixels.shape[2]
    flow = {
        look: view_flows(fields, views, item, recipe=recipe, size_px=size_px, look=look) for look in clip.flow_looks
    }
    return replace(clip, flow=flow, frames=None)


def view_flows(
    fields: FlowFields,
    views: tuple[View, ...],
    item: ClipVideo,
    *,
    recipe: FlowRecipe,
    size_px: int,
    look: Look = CANONICAL_LOOK,
) -> Float32Array:
    """Return (V, T', 2k, S', S'): what a flow expert with this look sees of each view; `size_px` is the view's."""
    side, stack = look.size_px or size_px, look.flow_stack
    seen = (look_view(view, look.frames) for view in views)
    return np.stack(
        [view_flow(fields, view, item.facts, step=recipe.step, size_px=side, stack=stack) for view in seen]
    )


def check_size(frames: ClipFrames, item: ClipVideo) -> None:
    """Raise VideoError when decoding gave frames of another size than the probe found."""
    if frames.frames.shape[1:3] != (item.facts.height, item.facts.width):
        height, width = frames.frames.shape[1:3]
        raise VideoError(
            f"frames of {width} x {height} where the header says {item.facts.width} x {item.facts.height}"
        )


@dataclass(frozen=True)
class FlowFill:
    """One clip whose every native pair goes to the scratch store."""

    source: FrameSource
    """Where frames come from."""
    item: ClipVideo
    """The clip with its facts."""
    flow: FlowJob
    """Recipe and store; computed in the worker when its device is `cpu`."""


def fill_flow(job: FlowFill) -> ClipFrames | None:
    """Decode a clip and store the flow of every native pair; off the CPU return the frames instead."""
    facts = job.item.facts
    whole = np.arange(facts.first_frame, facts.first_frame + facts.frame_count)
    frames = job.source.read(job.item.clip.video, whole, job.item.video)
    check_size(frames, job.item)
    if job.flow.device != "cpu":
        return frames
    if not isinstance(job.flow.store, FlowStore):
        raise ValueError("filling needs the scratch store")
    starts = all_pairs(facts, job.flow.recipe.step)
    job.flow.store.write(job.item, _flow(frames, job.item, starts, job.flow))
    return None


def _flow(frames: ClipFrames, item: ClipVideo, starts: IntArray, job: FlowJob) -> FlowFields:
    # As many processes as cores do this at the same time.
    torch.set_num_threads(1)
    return clip_flow(frames, item.facts, starts, recipe=job.recipe, device="cpu")
