"""A student as one ONNX file: uint8 views in, float32 logits by head out, class names among its metadata."""

import json
import warnings
from typing import Any, cast

import torch
from torch.export import ExportedProgram

from mmkd.data_manifests.errors import InputError
from mmkd.student.evaluation.trained import TrainedStudent
from mmkd.student.export.program import INPUT, not_exportable, parameter_bytes

METADATA = "mmkd"
"""Key of the file's metadata under which everything stands, as JSON."""
MISSING = "needs the packages onnx, onnxruntime and onnxscript: pip install 'mmkd[export]'"
MOST_BYTES = 2**31 - 2**20
"""What one ONNX file can hold, less a MiB for its graph: it is a protocol buffer, whose sizes are signed 32-bit."""


def require_onnx() -> None:
    """Raise InputError, with what to install, where a package is missing; to be asked before any work."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(f"`mmkd-student export` {MISSING}") from error


def refuse_large(student: TrainedStudent) -> None:
    """Raise InputError for a student whose parameters no ONNX file can hold."""
    size = parameter_bytes(student)
    if size > MOST_BYTES:
        raise InputError(
            f"the student has {size / 2**30:.2f} GiB of parameters, and an ONNX file holds less than 2 GiB"
        )


def onnx_bytes(student: TrainedStudent, program: ExportedProgram, description: dict[str, Any]) -> bytes:
    """Return the program of a student as an ONNX file whose batch may have any size.

    `description` becomes the metadata `METADATA`. Raises InputError where a package is missing, the parameters are
    too large for a file, or ONNX has no operator for something in the network.
    """
    require_onnx()
    refuse_large(student)
    import onnx

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own, about its own insides
        try:
            found = torch.onnx.export(
                program, dynamo=True, verbose=False, input_names=[INPUT], output_names=list(student.heads)
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise not_exportable(error, "torch.onnx") from error
    model = cast(Any, found).model_proto
    name_batch(model.graph)
    onnx.helper.set_model_props(model, {METADATA: json.dumps(description)})
    onnx.checker.check_model(model)
    return cast(bytes, model.SerializeToString())


def name_batch(graph: Any) -> None:
    """Call the first dimension `batch` wherever it stands: the exporter gives it a made-up name."""
    made_up = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param == made_up:
                dimension.dim_param = "batch"
