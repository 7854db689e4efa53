"""One shard in memory: experts run over its views in batches that depend on the shard alone.

Batches have one fixed shape; every row x view of the shard has its slot, zeroed where the clip is unusable, and
the last batch is padded. So the logits of a view do not depend on what was resumed or on who computed what.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mmkd.cache_tools.cache.arrays import Objects, encode_block
from mmkd.cache_tools.cache.commits import CommitRecord, Unusable, hash_objects
from mmkd.cache_tools.cache.logit_formats import FORMATS, StorageFormat, storable, worst_kl
from mmkd.cache_tools.frames.clip_set import ClipVideo
from mmkd.cache_tools.frames.records import Float32Array
from mmkd.cache_tools.layout import THUMBPRINT, Shard, Status, part_array, status_array, thumbprint_arrays
from mmkd.cache_tools.views.canonical import THUMBNAIL_SIZE
from mmkd.cache_tools.views.view import View
from mmkd.data_manifests.errors import InputError
from mmkd.data_manifests.manifest import Clip
from mmkd.pipeline.experts.expert import Expert
from mmkd.pipeline.inputs.boxes import BoxFile
from mmkd.pipeline.inputs.expert_views import Inputs
from mmkd.pipeline.inputs.modalities import MODALITIES, InputShapes, ViewedClip, mel_params
from mmkd.pipeline.inputs.prepare import PreparedClip
from mmkd.pipeline.missing import InputMissingError
from mmkd.pipeline.recipe import TeacherRecipe


@dataclass(frozen=True)
class NodeResult:
    """One node of a finished shard, ready to be published."""

    shard: Shard
    """The shard."""
    node: str
    """`thumbprint` or the expert's name."""
    blocks: dict[str, npt.NDArray[Any]]
    """Array name -> (shard_rows, views, ...) block."""
    unusable: tuple[Unusable, ...] = ()
    """Rows without a usable result."""
    worst_kl: dict[str, float] = field(default_factory=dict)
    """Head -> worst storage error, in nats."""

    def encode(self, metadata: Objects) -> Objects:
        """Return the blocks as the objects that will lie in the group."""
        start = (self.shard.rows.start, self.shard.views.start)
        objects: Objects = {}
        for name, block in self.blocks.items():
            objects |= encode_block(name, metadata[f"{name}/zarr.json"], start=start, block=block)
        return objects

    def record(self, fingerprint: str, objects: Objects) -> CommitRecord:
        """Return the commit record of the encoded objects."""
        return CommitRecord(
            shard=self.shard.name,
            node=self.node,
            fingerprint=fingerprint,
            objects=hash_objects(objects),
            unusable=self.unusable,
            worst_kl=self.worst_kl,
        )


class ExpertBatcher:
    """Feeds one expert with the shard's slots in order, a full batch at a time."""

    def __init__(self, expert: Expert, shard: Shard, shapes: InputShapes, *, batch_views: int) -> None:
        """Collect results for every row x view of the shard."""
        self.expert = expert
        grid = (shard.split.shard_rows, len(shard.views))
        self.status = np.full(grid, Status.NOT_COMPUTED, np.uint8)
        self.reasons: dict[int, str] = {}
        heads = {head: len(classes) for head, classes in expert.card.heads.items()}
        self.logits: dict[str, Float32Array] = {
            head: np.full((*grid, classes), np.nan, np.float32) for head, classes in heads.items()
        }
        self._empty = MODALITIES[expert.modality].empty(replace(shapes, look=expert.card.look))
        self._batch_views = batch_views
        self._slots: list[tuple[int, int]] = []
        self._inputs: list[Inputs] = []

    def add(self, slot: tuple[int, int], inputs: Inputs | None) -> None:
        """Queue one view; None queues an empty slot, whose status the caller has set."""
        self._slots.append(slot)
        self._inputs.append(self._empty if inputs is None else inputs)
        if len(self._slots) == self._batch_views:
            self.run()

    def run(self) -> None:
        """Run the queued views, padded to a full batch."""
        slots, inputs, self._slots, self._inputs = self._slots, self._inputs, [], []
        if all(self.status[slot] != Status.NOT_COMPUTED for slot in slots):
            return  # nothing but unusable clips: nobody would look at the result
        # Other batch sizes give other bits: the last batch has the shape of all others.
        padded = inputs + [self._empty] * (self._batch_views - len(inputs))
        batch = {name: torch.from_numpy(np.stack([item[name] for item in padded])) for name in self._empty}
        outputs = self.expert.logits(batch)
        for position, (row, view) in enumerate(slots):
            if self.status[row, view] != Status.NOT_COMPUTED:
                continue
            values = {head: output[position] for head, output in outputs.items()}
            # One head that cannot be stored fails the view for all heads: a row is whole or has a status.
            if all(storable(value) for value in values.values()):
                self.status[row, view] = Status.OK
                for head, value in values.items():
                    self.logits[head][row, view] = value
            else:
                self.status[row, view] = Status.NON_FINITE
                self.reasons[row] = f"expert {self.expert.name} gave logits that are not finite or do not fit fp16"


class ShardBlock:
    """The results of one shard while it is computed."""

    def __init__(
        self,
        shard: Shard,
        experts: Sequence[Expert],
        recipe: TeacherRecipe,
        *,
        boxes: BoxFile | None,
        thumbprints: bool = True,
    ) -> None:
        """Start an empty block of a shard for those of its nodes that are wanted."""
        self.shard = shard
        self._thumbprints = thumbprints
        self._recipe = recipe
        self._boxes = boxes
        shapes = InputShapes(recipe.views, recipe.boxes.max_boxes, mel_params(recipe.audio))
        self._batchers = [
            ExpertBatcher(expert, shard, shapes, batch_views=recipe.build.batch_views) for expert in experts
        ]
        grid = (shard.split.shard_rows, len(shard.views))
        self._hashes = np.zeros(grid, np.uint64)
        self._thumbnails = np.zeros((*grid, THUMBNAIL_SIZE), np.uint8)

    def add(self, row: int, item: ClipVideo, views: Sequence[View], clip: PreparedClip) -> None:
        """Give one prepared clip to every expert; what one of them lacks fails that one alone."""
        position = row - self.shard.rows.start
        self._hashes[position], self._thumbnails[position] = clip.pixel_hashes, clip.thumbnails
        seen = ViewedClip(item, views, clip, self._boxes)
        for batcher in self._batchers:
            try:
                inputs = MODALITIES[batcher.expert.modality].inputs(replace(seen, look=batcher.expert.card.look))
            except InputMissingError as error:
                self._fail(batcher, position, error.status, str(error))
                continue
            for number, value in enumerate(inputs):
                batcher.add((position, number), value)

    def fail(self, row: int, reason: str) -> None:
        """Record that a clip cannot be decoded."""
        for batcher in self._batchers:
            self._fail(batcher, row - self.shard.rows.start, Status.DECODE_FAILED, reason)

    def _fail(self, batcher: ExpertBatcher, position: int, status: Status, reason: str) -> None:
        batcher.status[position] = status
        batcher.reasons[position] = reason
        # Empty slots are run too, or the batches after them would be made up of other views.
        for number in range(len(self.shard.views)):
            batcher.add((position, number), None)

    def finish(self) -> None:
        """Run what is still queued."""
        for batcher in self._batchers:
            batcher.run()

    def results(self, clips: Sequence[Clip]) -> dict[str, NodeResult]:
        """Return node -> its result; `clips` are the split's rows."""
        names = thumbprint_arrays(self.shard.split.name)
        blocks: dict[str, npt.NDArray[Any]] = dict(zip(names, (self._hashes, self._thumbnails), strict=True))
        nodes = {THUMBPRINT: NodeResult(self.shard, THUMBPRINT, blocks)} if self._thumbprints else {}
        return nodes | {batcher.expert.name: self._result(batcher, clips) for batcher in self._batchers}

    def _result(self, batcher: ExpertBatcher, clips: Sequence[Clip]) -> NodeResult:
        split, name = self.shard.split.name, batcher.expert.name
        blocks: dict[str, npt.NDArray[Any]] = {status_array(split, name): batcher.status}
        errors = {}
        storage = FORMATS[self._recipe.build.precision]
        for head, logits in batcher.logits.items():
            errors[head] = self._storage_error(storage, logits, f"expert {name}, head {head}")
            for part, block in storage.encode(logits).items():
                blocks[part_array(split, name, part, head=head)] = block
        start = self.shard.rows.start
        unusable = tuple(
            Unusable(start + row, clips[start + row].clip_id, int(batcher.status[row].max()), batcher.reasons[row])
            for row in sorted(batcher.reasons)
        )
        return NodeResult(self.shard, name, blocks, unusable, errors)

    def _storage_error(self, storage: StorageFormat, logits: Float32Array, what: str) -> float:
        """Return the worst storage error of a head's rows; raise InputError when it is above the recipe's bound."""
        error, allowed = worst_kl(storage, logits), self._recipe.build.max_kl
        if error > allowed:
            raise InputError(
                f"{self.shard.name}, {what}: storing logits as {storage.key} costs up to {error:.1e} nats, more "
                f"than build.max_kl {allowed:g}; choose a finer build.precision, or allow more with --max-kl"
            )
        return error
