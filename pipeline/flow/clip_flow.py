"""Flow of a clip: which native frame pairs are needed, their fields, and a view's window of them.

A field joins native frames i and i + step, never two *sampled* frames, and is computed once per pair on the full
grey frame at a stated size, shared by all views. Grey conversion and resizing follow denseflow (grey first, then
bilinear). Vectors stay in pixels of the grid they were computed on.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from mmkd.cache_tools.frames.records import ClipFacts, ClipFrames, Float32Array, IntArray, UInt8Array
from mmkd.cache_tools.views.view import View
from mmkd.pipeline.flow.conventions import codes_of_flow, flow_of_codes, grey_then_resize
from mmkd.pipeline.flow.flow_method import FlowMethod
from mmkd.pipeline.flow.methods import sequence_flow
from mmkd.pipeline.recipe import FlowRecipe
from mmkd.pipeline.tvl1.params import PRESETS, TVL1Params

FILES_RULES = "flow-files-1: grey codes by cv2.imdecode, v = code / 255 * 2b - b"
I3D_RULES = "flow-files-i3d-1: float32 * 20, the last field of a frame at 25 frames a second"
FLOW_RULES = "flow-1: cv2 RGB2GRAY, INTER_LINEAR, last valid pair at the end"


def tvl1_params(recipe: FlowRecipe) -> TVL1Params:
    """Return the TV-L1 parameters of the recipe's preset."""
    return PRESETS[recipe.preset]


def flow_identity(recipe: FlowRecipe) -> dict[str, Any]:
    """Return everything that could change a flow value, for fingerprints."""
    if recipe.files is not None:  # the files say it all, and nothing of how ours would be computed counts
        stated = recipe.files.model_dump(mode="json", exclude={"path"})
        rules = I3D_RULES if recipe.files.layout == "i3d" else FILES_RULES
        return {"rules": rules, "recipe": {"step": recipe.step, "enlarge": recipe.enlarge}, "files": stated}
    fields = recipe.model_dump(mode="json", exclude={"files"})
    if recipe.enlarge:  # what every flow was made with before there was a choice: its identity stays as it was
        del fields["enlarge"]
    return {"rules": FLOW_RULES, "recipe": fields, "params": asdict(tvl1_params(recipe))}


def stated_flow(identity: dict[str, Any]) -> dict[str, Any]:
    """Return a flow identity with every value of its recipe stated, also those from before `enlarge` existed."""
    return identity | {"recipe": {"enlarge": True} | identity["recipe"]}


@dataclass(frozen=True)
class FlowFields:
    """Fields of one clip."""

    starts: IntArray
    """(P,) ascending index in the video of each pair's first frame."""
    fields: Float32Array
    """(P, 2, h, w) pixels per step on the flow grid; channel 0 horizontal, positive to the right."""

    def select(self, starts: IntArray) -> Float32Array:
        """Return the fields (T, 2, h, w) that start at the given frames, which may repeat; KeyError if absent."""
        return self.fields[positions_of(starts, self.starts)]


def positions_of(starts: IntArray, among: IntArray) -> IntArray:
    """Return the positions of `starts` in the ascending array `among`; KeyError if one is absent."""
    positions = np.searchsorted(among, starts).clip(0, len(among) - 1)
    if not np.array_equal(among[positions], starts):
        raise KeyError(f"flow pairs {starts} are not all among {among}")
    return positions


def pair_starts(frame_indices: IntArray, facts: ClipFacts, step: int) -> IntArray:
    """Return the first frame of the pair of each sampled frame: itself, at the end the last valid one."""
    last = facts.first_frame + facts.frame_count - 1
    return np.clip(frame_indices, facts.first_frame, max(facts.first_frame, last - step))


def pair_ends(starts: IntArray, facts: ClipFacts, step: int) -> IntArray:
    """Return the second frame of each pair; a clip shorter than a step pairs its frames with its last one."""
    return np.minimum(starts + step, facts.first_frame + facts.frame_count - 1)


def all_pairs(facts: ClipFacts, step: int) -> IntArray:
    """Return the starts of every native pair of the clip."""
    frames = facts.first_frame + np.arange(facts.frame_count)
    return np.unique(pair_starts(frames, facts, step))


def flow_size(facts: ClipFacts, recipe: FlowRecipe) -> tuple[int, int]:
    """Return (height, width) of the flow grid: the short side as stated, the other one in proportion.

    Frames that are smaller keep their own size, unless the recipe enlarges them.
    """
    scale = recipe.short_side_px / min(facts.height, facts.width)
    if scale > 1 and not recipe.enlarge:
        return facts.height, facts.width
    return max(1, round(facts.height * scale)), max(1, round(facts.width * scale))


def grey_frames(frames: UInt8Array, size: tuple[int, int]) -> UInt8Array:
    """Turn RGB (N, H, W, 3) into grey (N, h, w) of the given (height, width)."""
    height, width = size
    return np.stack([grey_then_resize(frame, (width, height)) for frame in frames])


def clip_flow(
    clip: ClipFrames, facts: ClipFacts, starts: IntArray, *, recipe: FlowRecipe, device: str
) -> FlowFields:
    """Compute the fields of the pairs that begin at `starts` (ascending), rounded as the recipe says."""
    size = flow_size(facts, recipe)
    ends = pair_ends(starts, facts, recipe.step)
    # Each frame once, though most are in two pairs.
    used = np.union1d(starts, ends)
    grey = torch.from_numpy(grey_frames(clip.select(used), size)).to(device)
    firsts, seconds = (np.searchsorted(used, side) for side in (starts, ends))
    fields = sequence_flow(grey, firsts, seconds, method=FlowMethod("tvl1", recipe.preset))
    return FlowFields(starts, round_flow(fields.cpu().numpy(), recipe))


def round_flow(fields: Float32Array, recipe: FlowRecipe) -> Float32Array:
    """Round fields to the recipe's precision, and return them as float32 again."""
    return decode_flow(encode_flow(fields, recipe), recipe)


def encode_flow(fields: Float32Array, recipe: FlowRecipe) -> np.ndarray[Any, Any]:
    """Return fields as float16, or as the 8-bit code round-half-even(255 (v + b) / 2b) clipped to 0..255.

    As in denseflow 0 becomes 128, which does not decode to 0 but to b / 255.
    """
    if recipe.precision == "float16":
        return fields.astype(np.float16)
    codes: UInt8Array = codes_of_flow(torch.from_numpy(fields), bound_px=recipe.bound_px).numpy()
    return codes


def decode_flow(stored: np.ndarray[Any, Any], recipe: FlowRecipe) -> Float32Array:
    """Invert `encode_flow`: float32, for 8 bits x / 255 · 2b - b."""
    if recipe.precision == "float16":
        return stored.astype(np.float32)
    flow: Float32Array = flow_of_codes(torch.from_numpy(stored), bound_px=recipe.bound_px).numpy()
    return flow


def stack_starts(frame_indices: IntArray, facts: ClipFacts, step: int, stack: int) -> IntArray:
    """Return (T · k,) the starts of the k = `stack` consecutive pairs around each sampled frame.

    Frame i has the pairs that begin at i + j - (k - 1) // 2 for j = 0..k-1, as neighbouring flow frames of
    two-stream networks; at both ends of the clip those beyond it are its first or last valid pair.
    """
    offsets = np.arange(stack) - (stack - 1) // 2
    return pair_starts((frame_indices[:, None] + offsets).reshape(-1), facts, step)


def view_flow(
    flow: FlowFields, view: View, facts: ClipFacts, *, step: int, size_px: int, stack: int = 1
) -> Float32Array:
    """Return what a flow expert sees of a view (T, 2k, S, S): k fields for each sampled frame, in the window.

    Channels are u1, v1, u2, v2, ...; k = `stack` (see `stack_starts`).
    """
    fields = flow.select(stack_starts(view.frame_indices, facts, step, stack))
    window = crop_flow(fields, view, facts, size_px=size_px)
    return window.reshape(len(view.frame_indices), 2 * stack, size_px, size_px)


def crop_flow(fields: Float32Array, view: View, facts: ClipFacts, *, size_px: int) -> Float32Array:
    """Cut a view's window out of full-frame fields (T, 2, h, w) and resize it to (T, 2, S, S), bilinearly.

    Values are not scaled; a flip mirrors the window and negates u.
    """
    left, top, width, height = view.crop_xywh
    # Half-pixel centres: destination pixel d looks at source coordinate left + (d + 0.5) · width / S.
    steps = (np.arange(size_px, dtype=np.float64) + 0.5) / size_px
    x = (left + steps * width) / facts.width * 2 - 1
    y = (top + steps * height) / facts.height * 2 - 1
    grid = np.stack(np.broadcast_arrays(x[None, :], y[:, None]), axis=-1).astype(np.float32)
    grids = torch.from_numpy(grid).expand(len(fields), -1, -1, -1)
    window = functional.grid_sample(
        torch.from_numpy(fields), grids, mode="bilinear", padding_mode="border", align_corners=False
    ).numpy()
    if view.flip:
        window = np.ascontiguousarray(window[..., ::-1])
        window[:, 0] *= -1
    return window
