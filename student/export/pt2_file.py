"""A student as one file of torch.export (`.pt2`): for programs that have torch, and none of mmkd's code.

It holds the graph, the weights and, among its extra files, class names and views. It is for the device on which it
was made, a CPU, and for torch of its time: torch promises no form of these files that outlives a version.
"""

import io
import json
import warnings
from typing import Any

import torch
from torch.export import ExportedProgram

from mmkd.data_manifests.errors import VerificationError
from mmkd.student.evaluation.trained import TrainedStudent
from mmkd.student.export.check import Runner

EXTRA = "mmkd.json"
"""Name of the extra file under which everything stands, as JSON."""


def pt2_bytes(program: ExportedProgram, description: dict[str, Any]) -> bytes:
    """Return a program as a `.pt2` file, with `description` as its extra file `EXTRA`."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the serialiser's own, about its own insides
        torch.export.save(program, file, extra_files={EXTRA: json.dumps(description)})
    return file.getvalue()


def pt2_runner(file: bytes, student: TrainedStudent) -> Runner:
    """Return what runs a `.pt2` file that this process made; VerificationError where its class names are others."""
    extra = {EXTRA: ""}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.export.load(io.BytesIO(file), extra_files=extra).module()
    if json.loads(extra[EXTRA])["classes"] != student.heads:
        raise VerificationError("the torch.export file has other class names than the student; nothing was written")
    heads = list(student.heads)

    def run(frames: Any) -> dict[str, Any]:
        with torch.inference_mode():
            outputs = module(torch.from_numpy(frames))
        return {head: logits.numpy() for head, logits in zip(heads, outputs, strict=True)}

    return run
