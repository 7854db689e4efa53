"""The submission file of EPIC-KITCHENS-100's action recognition challenge (version 0.2 of its form).

A ZIP archive with one file, `test.json`: for each narration id the score of each of 97 verbs and 300 nouns, larger
for what is likelier, beside the three supervision levels that the challenge asks for. The scores are view-averaged
logits: the scorer takes the softmax itself, and makes actions of them (mmkd.student.evaluation.actions).
"""

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmkd.cache_tools.frames.records import Float32Array
from mmkd.data_manifests.atomic import write_atomically
from mmkd.data_manifests.counted import counted
from mmkd.data_manifests.errors import InputError
from mmkd.data_manifests.kinds import SUBMISSION_ENTRY
from mmkd.data_manifests.manifest import Head
from mmkd.student.evaluation.actions import NOUN, VERB

CLASSES = {VERB: 97, NOUN: 300}
VERSION = "0.2"
CHALLENGE = "action_recognition"
EARLIEST_ZIP_TIME = (1980, 1, 1, 0, 0, 0)
"""ZIP's first moment: the same scores give the same bytes."""


def check_epic_heads(heads: Sequence[Head]) -> None:
    """Raise InputError unless heads are EPIC-KITCHENS-100's: 97 verbs and 300 nouns."""
    found = {head.name: len(head.classes) for head in heads}
    if found != CLASSES:
        has = ", ".join(f"{name} of {counted(count, 'class')}" for name, count in found.items())
        wanted = ", ".join(f"{name} of {counted(count, 'class')}" for name, count in CLASSES.items())
        raise InputError(f"a submission to EPIC-KITCHENS-100 needs the heads {wanted}; the cache has {has}")


def submission(
    narration_ids: Sequence[str], logits: Mapping[str, Float32Array], levels: tuple[int, int, int]
) -> dict[str, Any]:
    """Return the file's content for clips (N,) with view-averaged logits (N, classes) of verb and noun.

    `levels` are the supervision levels of pretraining, training labels and training data, 0 to 5 each. A row that
    is not finite, of a clip without logits, gets equal scores: the scorer wants every clip.
    """
    scores = {head: np.where(np.isfinite(logits[head]), logits[head], 0) for head in CLASSES}
    return {
        "version": VERSION,
        "challenge": CHALLENGE,
        **dict(zip(("sls_pt", "sls_tl", "sls_td"), levels, strict=True)),
        "results": {
            clip_id: {head: _scores(own[row]) for head, own in scores.items()}
            for row, clip_id in enumerate(narration_ids)
        },
    }


def _scores(row: Float32Array) -> dict[str, float]:
    return {str(number): score for number, score in enumerate(row.tolist())}


def write_submission(path: Path, content: Mapping[str, Any]) -> None:
    """Write the archive; StorageError when the disk refuses."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(
            zipfile.ZipInfo(SUBMISSION_ENTRY, EARLIEST_ZIP_TIME), json.dumps(content), zipfile.ZIP_DEFLATED
        )
    write_atomically(path, data.getvalue())
