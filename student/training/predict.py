"""Logits of chosen views of chosen clips, in batches of one fixed shape, so that they repeat bit for bit."""

from contextlib import closing
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from mmkd.cache_tools.frames.records import Float32Array, IntArray
from mmkd.cache_tools.process.progress import Progress
from mmkd.student.data.batches import ViewDataset
from mmkd.student.data.reading import Reading, read_batches
from mmkd.student.recipes.loop import Precision
from mmkd.student.training.devices import autocast, reproducible, to_device
from mmkd.student.training.ranks import ALONE, Ranks

USUAL_READING = Reading()


def predict(
    network: nn.Module,
    dataset: ViewDataset,
    rows: IntArray,
    views: IntArray,
    *,
    batch_size: int = 16,
    device: torch.device | str = "cpu",
    reading: Reading = USUAL_READING,
    precision: Precision = "fp32",
    progress: bool = True,
    what: str = "evaluating",
    ranks: Ranks = ALONE,
) -> dict[str, Float32Array]:
    """Return head -> float32 (rows, views, classes) logits of each row under each view number.

    The network runs in evaluation mode and is left in the mode it was in; the last batch is padded by
    repeating its last view, since another batch size would give other bits. `precision` is that of the
    network's arithmetic; `auto` is bfloat16 on CUDA, which is equal to about three digits. `reading` says who
    reads, which changes no number. Several processes (`ranks`), which all have the same network, take whole
    batches by turns; each has all logits in the end, with the bits that one process gives.
    """
    device = torch.device(device)
    reading = replace(reading, pin=device.type == "cuda")
    pairs = np.stack(np.meshgrid(rows, views, indexing="ij"), -1).reshape(-1, 2)
    padding = -len(pairs) % batch_size
    padded = np.concatenate([pairs, np.repeat(pairs[-1:], padding, 0)]).reshape(-1, batch_size, 2)
    steps = [(step[:, 0].copy(), step[:, 1].copy()) for step in padded[ranks.rank :: ranks.count]]
    own = max(0, len(steps) * batch_size - (padding if (len(padded) - 1) % ranks.count == ranks.rank else 0))
    outputs: list[dict[str, Float32Array]] = []
    was_training = network.training
    network.to(device).eval()
    try:
        with (
            torch.inference_mode(),
            reproducible(device),
            autocast(device, precision),
            Progress(what, total=own, unit="view", enabled=progress and ranks.is_first) as bar,
            closing(read_batches(dataset, steps, reading, views=own)) as batches,
        ):
            for batch in batches:
                logits = network(to_device(batch.inputs, device))
                outputs.append({head: value.float().cpu().numpy() for head, value in logits.items()})
                bar.advance(min(batch_size, own - bar.done))  # padding is not a view
    finally:
        network.train(was_training)
    outputs = ranks.interleaved(outputs)
    shape = (len(rows), len(views), -1)
    return {
        head: np.concatenate([logits[head] for logits in outputs])[: len(pairs)].reshape(shape)
        for head in outputs[0]
    }
