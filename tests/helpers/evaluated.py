"""What the command `evaluate` computed: the videos that it saw, and the logits that it had of them."""

from pathlib import Path

import numpy as np
import pytest

from mmkd.data_manifests.manifest_file import load_manifest
from mmkd.student.evaluation import run_evaluation
from mmkd.student.training.predict import predict
from tests.helpers.in_process import call_ok


def evaluated_logits(patch: pytest.MonkeyPatch, *command: object) -> tuple[list[Path], np.ndarray]:
    """Run `evaluate` in a folder with manifest.jsonl and videos; return the videos of its last split, and the
    logits (clips, V, classes) of `action`."""
    seen: dict[str, object] = {}

    def noted(network, data, *arguments, **options):
        seen["logits"] = predict(network, data, *arguments, **options)
        seen["ids"] = data.clip_ids
        return seen["logits"]

    patch.setattr(run_evaluation, "predict", noted)
    call_ok(*command)
    videos = {clip.clip_id: clip.video for clip in load_manifest(Path("manifest.jsonl")).clips}
    return [Path("videos") / videos[clip_id] for clip_id in seen["ids"]], seen["logits"]["action"]
