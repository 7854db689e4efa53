"""What a notebook needs, in few lines: a cache's clips and targets, a network, the loss, and a student's word.

All of it is a thin order of calls into the rooms below, which a program of one's own may call as well.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmkd.cache_tools.cache.reader import CacheReader
from mmkd.cache_tools.frames.clip_set import ClipSet, DataRecipe
from mmkd.student.data.batches import stack
from mmkd.student.data.split_data import check_manifest, open_split
from mmkd.student.evaluation.trained import TrainedStudent, load_student
from mmkd.student.loss.losses import total_loss
from mmkd.student.networks.networks import VideoClassifier, build_network
from mmkd.student.prediction.predict_videos import predict_videos
from mmkd.student.prediction.predictions import Predictions
from mmkd.student.recipes.loss import LossOptions
from mmkd.student.recipes.train import TrainRecipe
from mmkd.student.teacher.cached_targets import CachedTargets, copies_folder, shared_targets
from mmkd.student.teacher.cached_teacher import choose_mixtures
from mmkd.student.teacher.targets import Targets, fetch_targets


@dataclass(frozen=True)
class ClipBatch:
    """Clips under stored views, on the CPU."""

    inputs: dict[str, Tensor]
    """`rgb`: uint8 (B, T, S, S, 3)."""
    labels: dict[str, Tensor]
    """Head -> int64 (B,), -1 where a clip has none."""
    targets: Targets
    """The teacher's logits."""

    def loss(self, logits: Mapping[str, Tensor], *, temperature: float = 1.0, label_weight: float = 0.0) -> Tensor:
        """Return the loss of a network's logits {head: (B, classes)}, a scalar: see mmkd.student.loss.losses."""
        options = LossOptions(temperature=temperature, label_weight=label_weight).at(0)
        return total_loss(logits, self.labels, self.targets, options=options)


class TaughtSplit:
    """One split of a cache with its clips, and a teacher mixed from its experts."""

    def __init__(
        self,
        cache: Path | str,
        *,
        manifest: Path | str,
        videos: Path | str,
        split: str | None = None,
        weights: str = "uniform",
        copies: Path | str | None = None,
        memory_gib: float = 1.0,
    ) -> None:
        """Open a split, by default the one that students train on.

        `weights` are those of `mmkd-student train`; the mixed targets lie in a file below `copies`, or where the
        command keeps them. Clips stay decoded in `memory_gib` GiB. Raises as the command: InputError for another
        manifest, VerificationError for damaged data.
        """
        self.cache = CacheReader(cache)
        clip_set = ClipSet(DataRecipe(manifest=Path(manifest), videos=Path(videos)))
        check_manifest(self.cache, clip_set.manifest)
        split = split or self.cache.init.train_split
        self.clips = open_split(self.cache, clip_set, split, memory_bytes=int(memory_gib * 2**30))
        """Its readable clips; `clips.data.clip_ids` are their names, in the order of `rows`."""
        train_split = self.cache.init.train_split
        mixtures, _ = choose_mixtures(self.cache, weights, weights_temperature=1, train_split=train_split)
        folder = copies_folder(None if copies is None else Path(copies), cache)
        self.teacher: CachedTargets = shared_targets(
            self.cache, split, mixtures, missing="renormalise", rows=self.clips.rows, directory=folder
        )
        """The targets, which `mmkd.student.training.loop.fit` takes as well."""

    def network(
        self, name: str = "swin3d_t", *, weights: Path | str | None = None, seed: int = 0
    ) -> VideoClassifier:
        """Return a network, by its name in a recipe, for the cache's heads and views; raises as `build_network`."""
        policy = self.cache.init.policy
        return build_network(
            TrainRecipe(network=name, weights=None if weights is None else Path(weights), seed=seed),
            heads={head.name: len(head.classes) for head in self.cache.heads},
            modality="rgb",
            frames=policy.frames,
            size_px=policy.size_px,
        )

    def batch(self, rows: Sequence[int], views: Sequence[int]) -> ClipBatch:
        """Return clips (numbers from 0 into `clips`) under view numbers from 0, with labels and targets."""
        at, under = np.asarray(rows, np.int64), np.asarray(views, np.int64)
        items = [self.clips.data.item(row, view) for row, view in zip(at.tolist(), under.tolist(), strict=True)]
        labels = {head: torch.from_numpy(value[at]) for head, value in self.clips.data.labels.items()}
        return ClipBatch(stack(items), labels, fetch_targets(self.teacher, at, under, device=torch.device("cpu")))


def open_student(
    run: Path | str, device: torch.device | str = "cpu", trusted: Sequence[str] = ()
) -> TrainedStudent:
    """Return the student of a finished run; raises as `load_student`."""
    return load_student(Path(run), device, trusted)


def predict(student: TrainedStudent, *videos: Path | str) -> Predictions:
    """Return what a student says of videos, to the last bit as `mmkd-student predict` does."""
    return predict_videos(student, [Path(video) for video in videos], progress=False)
