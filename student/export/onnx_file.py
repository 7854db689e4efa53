"""A student as one ONNX file: uint8 views in, float32 logits by head out, class names among its metadata."""

import json
import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn

from mmkd.data_manifests.errors import InputError
from mmkd.student.evaluation.trained import TrainedStudent

INPUT = "frames"
"""Name of the input: uint8 (B, T, S, S, 3), canonical views in RGB."""
METADATA = "mmkd"
"""Key of the file's metadata under which everything stands, as JSON."""
MISSING = "needs the packages onnx, onnxruntime and onnxscript: pip install 'mmkd[export]'"


class FramesToLogits(nn.Module):
    """A student from one tensor to a tuple of tensors, in the order of its heads: what exporters take."""

    def __init__(self, student: TrainedStudent) -> None:
        """Wrap the network of `student`, which stays in evaluation mode."""
        super().__init__()
        self.network = student.network
        self.order = tuple(student.heads)
        self.eval()

    def forward(self, frames: Tensor) -> tuple[Tensor, ...]:
        """Map uint8 (B, T, S, S, 3) to float32 (B, classes) of each head."""
        logits = self.network({"rgb": frames})
        return tuple(logits[head] for head in self.order)


def onnx_bytes(student: TrainedStudent, description: dict[str, Any]) -> bytes:
    """Return a student, which must lie on the CPU, as an ONNX file whose batch may have any size.

    `description` becomes the metadata `METADATA`. Raises InputError where a package is missing, a head has the
    input's name, or the network cannot be exported.
    """
    try:
        import onnx
        import onnxruntime  # noqa: F401 - the check needs it: say so before any work
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(f"`mmkd-student export` {MISSING}") from error
    if INPUT in student.heads:
        raise InputError(f"the student has a head named {INPUT!r}, as the input of an exported file is")
    size = student.policy.size_px
    example = torch.zeros(2, student.policy.frames, size, size, 3, dtype=torch.uint8)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's own, about its own insides
            program = torch.onnx.export(
                FramesToLogits(student),
                (example,),
                dynamo=True,
                verbose=False,
                input_names=[INPUT],
                output_names=list(student.heads),
                dynamic_shapes=({0: torch.export.Dim("batch")},),
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise InputError(
            f"this network cannot be exported to ONNX: {str(error).strip().splitlines()[0]}"
        ) from error
    model = cast(Any, program).model_proto
    onnx.helper.set_model_props(model, {METADATA: json.dumps(description)})
    onnx.checker.check_model(model)
    return cast(bytes, model.SerializeToString())
