"""Does the teacher at hand still give what the cache holds? A sample of it is computed again and compared.

Rows and views are drawn with a seed, their *stored* view parameters are replayed, and the experts run in batches of
another size and composition than the build's, which promises equal bits only on one device type, thread count and
set of versions. What drifted is told apart: the pixels (their stored hash: another decoder, colour conversion or
resizing) and the networks (KL divergence of fresh from stored logits, T = 1). It gives up the views that it does
not draw: `mmkd-cache verify` checks all bytes, drift what they mean. A changed teacher, recipe or manifest is found
by fingerprints, before anything runs.
"""

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from mmkd.cache_tools.cache.clip_rows import base_differences
from mmkd.cache_tools.cache.fingerprints import differences, refuse_differences
from mmkd.cache_tools.cache.reader import CacheReader
from mmkd.cache_tools.cache.softmax import kl_divergence
from mmkd.cache_tools.frames.clip_set import ClipSet, ClipVideo
from mmkd.cache_tools.frames.data_frames import WITH_STILLS
from mmkd.cache_tools.frames.records import Float32Array
from mmkd.cache_tools.frames.source import DECODER_RULES
from mmkd.cache_tools.process.pool import run_tasks
from mmkd.cache_tools.process.progress import Progress
from mmkd.cache_tools.storage.store import Store
from mmkd.cache_tools.views.view import View
from mmkd.data_manifests.errors import FingerprintError, StorageError, VerificationError, VideoError
from mmkd.data_manifests.manifest import Manifest
from mmkd.pipeline.build.work import FLOW_FIELD, base_fields, expert_node
from mmkd.pipeline.drift.report import DriftReport, HeadDrift, PixelDrift
from mmkd.pipeline.drift.sample import Sampled, draw_sample, stored_logits
from mmkd.pipeline.experts.expert import Expert
from mmkd.pipeline.inputs.boxes import BoxFile, boxes_fields, open_boxes
from mmkd.pipeline.inputs.expert_views import Inputs
from mmkd.pipeline.inputs.modalities import MODALITIES, ViewedClip, looks_at, needs_boxes, needs_flow, open_flow
from mmkd.pipeline.inputs.prepare import ClipJob, FlowJob, PreparedClip, prepare_clip, with_flow
from mmkd.pipeline.missing import InputMissingError
from mmkd.pipeline.recipe import TeacherRecipe
from mmkd.student.data.thumbprints import MEAN_DIFFERENCE_LIMIT

MAX_KL_NATS = 2e-3
"""Default tolerance: 1.7 times the worst benign difference, a fifth of the least harmful one (see RESULTS.md)."""

SAME_TEACHER = "Give the data, recipe and experts that built it"


def measure_drift(
    recipe: TeacherRecipe,
    experts: tuple[Expert, ...],
    cache: Path | str | Store,
    *,
    sample: int = 64,
    seed: int = 0,
    max_kl_nats: float = MAX_KL_NATS,
) -> DriftReport:
    """Run the experts again over `sample` views of the cache, drawn with `seed`; see the module.

    Raises FingerprintError when data, recipe or an expert are not the cache's, VerificationError when a clip that
    it holds cannot be read any more. The report's `check` raises for drift.
    """
    reader, clip_set = CacheReader(cache), ClipSet(recipe.data)
    check_node_fields(reader, recipe, experts, clip_set.manifest)
    drawn = draw_sample(reader, [expert.name for expert in experts], sample=sample, seed=seed)
    comparison = Comparison(recipe, experts, drawn)
    comparison.run(clip_set, probed(clip_set, reader, drawn))
    report = DriftReport(max_kl_nats, len(drawn), comparison.pixels)
    for expert in experts:
        report.experts[expert.name] = compare_expert(reader, expert, drawn, comparison)
    return report


def check_node_fields(
    reader: CacheReader, recipe: TeacherRecipe, experts: Sequence[Expert], manifest: Manifest
) -> None:
    """Raise FingerprintError, field by field, unless the base and the given experts are those of the cache."""
    # A sample may miss the clips whose frames are pictures: either name of this version's rules is right.
    decoder = WITH_STILLS if reader.init.base["decoder"] == WITH_STILLS else DECODER_RULES
    base = base_fields(
        manifest, recipe.views, train_split=recipe.train_split, view_seed=recipe.view_seed, decoder=decoder
    )
    boxes = boxes_fields(recipe.boxes) if needs_boxes(expert.modality for expert in experts) else None
    fields = {expert.name: dict(expert_node(expert, boxes, recipe).fields) for expert in experts}
    for name, own in fields.items():  # that of all videos is not asked again for a sample: each clip's flow is read
        if digest := reader.init.experts.get(name, {}).get(FLOW_FIELD):
            own[FLOW_FIELD] = digest
    stored = {name: reader.init.experts[name] for name in fields if name in reader.experts}
    lines = [
        *base_differences(reader.store, reader.init, base, manifest),
        *differences({"experts": stored}, {"experts": fields}),
    ]
    refuse_differences(lines, what=f"{reader.store.locate()}: data or teacher", advice=SAME_TEACHER)


def probed(clip_set: ClipSet, reader: CacheReader, drawn: Sequence[Sampled]) -> dict[tuple[str, int], ClipVideo]:
    """Return (split, row) -> the facts of every drawn clip.

    Raises VerificationError for a clip that cannot be read any more, FingerprintError for a video that has changed.
    """
    found: dict[tuple[str, int], ClipVideo] = {}
    for split in dict.fromkeys(item.split for item in drawn):
        rows = sorted({item.row for item in drawn if item.split == split})
        clips, identities = clip_set.manifest.split(split), reader.array(f"{split}/video_identity")
        for row, item in zip(rows, clip_set.probe([clips[row] for row in rows]), strict=True):
            if isinstance(item, VideoError):
                raise VerificationError(f"clip {clips[row].clip_id!r} of {split} cannot be read any more: {item}")
            if item.video.identity != str(identities[row]):
                raise FingerprintError(
                    f"{reader.store.locate()}: the video {item.clip.video} has changed since the cache was built. "
                    f"{SAME_TEACHER}"
                )
            found[split, row] = item
    return found


def other_batch_size(batch_views: int) -> int:
    """Return the largest batch that is not the build's: it fits the device, and is usually odd."""
    return batch_views - 1 if batch_views > 1 else 2


class Comparison:
    """Fresh pixels and logits of the drawn views."""

    def __init__(self, recipe: TeacherRecipe, experts: Sequence[Expert], drawn: Sequence[Sampled]) -> None:
        """Prepare to compute the drawn views again."""
        self.pixels = PixelDrift()
        self.same_pixels = np.zeros(len(drawn), np.bool_)
        """(sample,) whether the pixels are the stored ones."""
        self.fresh: dict[str, dict[str, Float32Array]] = {
            expert.name: {
                head: np.full((len(drawn), len(classes)), np.nan, np.float32)
                for head, classes in expert.card.heads.items()
            }
            for expert in experts
        }
        """Expert -> head -> (sample, classes); NaN where the expert cannot say anything."""
        self._recipe, self._experts, self._drawn = recipe, experts, drawn
        self._queues: dict[str, list[tuple[int, Inputs]]] = {expert.name: [] for expert in experts}

    def run(self, clip_set: ClipSet, items: Mapping[tuple[str, int], ClipVideo]) -> None:
        """Decode the clips, in several processes, and give their views to the experts."""
        recipe = self._recipe
        boxes = None
        if needs_boxes(expert.modality for expert in self._experts):
            boxes = open_boxes(recipe.boxes, {item.clip.video for item in items.values()})
        positions: dict[tuple[str, int], list[int]] = {}
        for position, drawn in enumerate(self._drawn):
            positions.setdefault((drawn.split, drawn.row), []).append(position)
        jobs = [self._job(clip_set, items[key], own) for key, own in positions.items()]
        clips = run_tasks(
            prepare_clip,
            jobs,
            workers=recipe.data.workers,
            timeout_seconds=recipe.data.clip_timeout_seconds,
            recheck_errors=True,
        )
        with closing(clips), Progress("computing again", total=len(jobs)) as progress:
            for (_, clip), (key, own) in zip(clips, positions.items(), strict=True):
                if isinstance(clip, StorageError):
                    raise clip
                if isinstance(clip, VideoError):
                    raise VerificationError(f"{self._drawn[own[0]].name} cannot be decoded any more: {clip}")
                self._add(own, items[key], clip, boxes)
                progress.advance()
        for expert in self._experts:
            self._run_queue(expert)

    def _job(self, clip_set: ClipSet, item: ClipVideo, positions: Sequence[int]) -> ClipJob:
        flow, looks = None, [(expert.modality, expert.card.look) for expert in self._experts]
        if needs_flow(expert.modality for expert in self._experts):
            # Never from the scratch store, where what drifted may lie; a user's files are what the build read.
            device = self._experts[0].device
            store = open_flow(self._recipe, str(device)) if self._recipe.flow.files else None
            flow = FlowJob(self._recipe.flow, store, device.type, looks_at("flow", looks))
        further, size_px = looks_at("rgb", looks, beyond_canonical=True), self._recipe.views.size_px
        return ClipJob(clip_set.source, item, self._views(positions), size_px, flow, further)

    def _views(self, positions: Sequence[int]) -> tuple[View, ...]:
        return tuple(self._drawn[position].view for position in positions)

    def _add(self, positions: Sequence[int], item: ClipVideo, clip: PreparedClip, boxes: BoxFile | None) -> None:
        for position, own_hash, own_thumbnail in zip(positions, clip.pixel_hashes, clip.thumbnails, strict=True):
            self._compare_pixels(position, int(own_hash), own_thumbnail)
        recipe, views = self._recipe, self._views(positions)
        clip = with_flow(clip, item, views, recipe=recipe.flow, device=str(self._experts[0].device))
        seen = ViewedClip(item, views, clip, boxes)
        for expert in self._experts:
            try:
                inputs = MODALITIES[expert.modality].inputs(replace(seen, look=expert.card.look))
            except InputMissingError:
                continue  # the cache may hold no logits either; if it does, NaN tells
            queue = self._queues[expert.name]
            queue += zip(positions, inputs, strict=True)
            if len(queue) >= other_batch_size(recipe.build.batch_views):
                self._run_queue(expert)

    def _compare_pixels(self, position: int, own_hash: int, own_thumbnail: npt.NDArray[np.uint8]) -> None:
        drawn = self._drawn[position]
        self.pixels.views += 1
        self.same_pixels[position] = own_hash == drawn.pixel_hash
        if not self.same_pixels[position]:
            difference = float(np.abs(own_thumbnail.astype(np.int16) - drawn.thumbnail).mean())
            found = self.pixels.exchanged if difference > MEAN_DIFFERENCE_LIMIT else self.pixels.rounded
            found.append(f"{drawn.name}: mean difference {difference:.1f} grey levels")

    def _run_queue(self, expert: Expert) -> None:
        """Run what is queued for an expert in batches of another size than the build's."""
        queue, self._queues[expert.name] = self._queues[expert.name], []
        size = other_batch_size(self._recipe.build.batch_views)
        for start in range(0, len(queue), size):
            positions, inputs = zip(*queue[start : start + size], strict=True)
            batch = {name: torch.from_numpy(np.stack([item[name] for item in inputs])) for name in inputs[0]}
            for head, logits in expert.logits(batch).items():
                self.fresh[expert.name][head][list(positions)] = logits


def compare_expert(
    reader: CacheReader, expert: Expert, drawn: Sequence[Sampled], comparison: Comparison
) -> dict[str, HeadDrift]:
    """Return head -> how far the fresh logits are from the stored ones, over the views that have any."""
    found = {}
    for head, fresh in comparison.fresh[expert.name].items():
        stored = stored_logits(reader, expert.name, head, drawn)
        present = np.flatnonzero(~np.isnan(stored).all(-1))
        if not len(present):
            continue
        # Fresh logits may be NaN or infinite: that is the finding, infinite drift.
        with np.errstate(invalid="ignore"):
            kl = kl_divergence(stored[present], fresh[present])
        kl = np.where(np.isfinite(fresh[present]).all(-1), kl, np.inf)
        same = kl[comparison.same_pixels[present]]
        found[head] = HeadDrift(
            views=len(present),
            max_kl_nats=float(kl.max()),
            mean_kl_nats=float(kl.mean()),
            same_pixels_max_kl_nats=float(same.max(initial=0.0)),
            argmax_changes=int((stored[present].argmax(-1) != fresh[present].argmax(-1)).sum()),
            worst=drawn[present[int(kl.argmax())]].name,
        )
    return found
