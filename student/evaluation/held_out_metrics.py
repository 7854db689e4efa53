"""How a network does on held-out clips of the training split, after every epoch or once at the end."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from mmkd.data_manifests.counted import counted
from mmkd.data_manifests.errors import InputError
from mmkd.data_manifests.manifest import Head
from mmkd.student.data.batches import ViewDataset
from mmkd.student.data.reading import Reading
from mmkd.student.evaluation.metrics import average_views, evaluate
from mmkd.student.recipes.loop import LoopRecipe, Precision
from mmkd.student.training.best import Validate
from mmkd.student.training.epoch_metrics import HeldOutMetrics
from mmkd.student.training.predict import USUAL_READING, predict

HELD_OUT_BATCH = 32


def held_out_metrics(
    network: nn.Module,
    data: ViewDataset,
    heads: Sequence[Head],
    device: torch.device,
    *,
    reading: Reading = USUAL_READING,
    precision: Precision = "auto",
    progress: bool = True,
) -> HeldOutMetrics:
    """Return head -> clips with a label, top-1 and cross-entropy on held-out clips, from view 0 of each."""
    rows, view = np.arange(data.rows), np.zeros(1, np.int64)
    logits = predict(
        network,
        data,
        rows,
        view,
        batch_size=HELD_OUT_BATCH,
        device=device,
        reading=reading,
        precision=precision,
        progress=progress,
    )
    found = {head.name: evaluate(average_views(logits[head.name]), data.labels[head.name]) for head in heads}
    return {head: {"clips": m.count, "top1": m.top1, "nll": m.nll} for head, m in found.items()}


def after_epochs(data: ViewDataset, heads: Sequence[Head], device: torch.device, recipe: LoopRecipe) -> Validate:
    """Return what tells after each epoch how a network does on `data`, over the heads that it has labels of.

    It reads and computes as the recipe says.

    Raises InputError where it has none.
    """
    known = [head for head in heads if (data.labels[head.name] >= 0).any()]
    if not known:
        raise InputError(
            f"none of {counted(data.rows, 'held-out clip')} has a label: they cannot tell which epoch is the best"
        )
    reading, precision = Reading.of(recipe, device.type), recipe.precision
    return lambda network: held_out_metrics(
        network, data, known, device, reading=reading, precision=precision, progress=False
    )
