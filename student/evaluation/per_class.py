"""How a model does on each class: one row of a CSV file for each split or group, head and class that has clips."""

import csv
import io
from collections.abc import Mapping, Sequence

import numpy as np

from mmkd.data_manifests.kinds import PER_CLASS_COLUMNS
from mmkd.data_manifests.manifest import Manifest
from mmkd.student.evaluation.evaluate import SplitScores


def per_class_csv(scores: Sequence[SplitScores], manifest: Manifest) -> str:
    """Return the table of all splits: clips that count, and the percentage of them right at 1 and at 5."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(PER_CLASS_COLUMNS)
    for split in scores:
        labels = {clip.clip_id: clip.labels for clip in manifest.split(split.split)}
        for head in manifest.heads:
            for number, ranks in _ranks(split, head.name, labels).items():
                right = [f"{100 * np.mean(np.array(ranks) < k):.2f}" for k in (1, 5)]
                writer.writerow([split.split, head.name, number, head.classes[number], len(ranks), *right])
    return text.getvalue()


def _ranks(split: SplitScores, head: str, labels: Mapping[str, Mapping[str, int | None]]) -> dict[int, list[int]]:
    """Return class -> the rank of each of its clips that counts, by class number."""
    found = split.heads[head]
    ranks: dict[int, list[int]] = {}
    for row, rank in zip(np.flatnonzero(found.counted), found.scores.rank.tolist(), strict=True):
        label = labels.get(split.clip_ids[row], {}).get(head)
        if label is not None:
            ranks.setdefault(label, []).append(rank)
    return dict(sorted(ranks.items()))
