"""A student as torch.export sees it: views in, a tuple of logits out, any batch; all files are made from it."""

import warnings
from typing import cast

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from mmkd.data_manifests.errors import InputError, MmkdError
from mmkd.student.evaluation.trained import TrainedStudent

INPUT = "frames"
"""Name of the input: uint8 (B, T, S, S, 3), canonical views in RGB."""
TRACED_BATCH = 2
"""Views with which a network is traced; of 0 and 1 tracers believe that they never change."""


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


def exported_program(student: TrainedStudent) -> ExportedProgram:
    """Return the graph of a student on the CPU, whose batch may have any size.

    Raises InputError where a head has the input's name, or the network does what no graph can hold.
    """
    if INPUT in student.heads:
        raise InputError(f"the student has a head named {INPUT!r}, as the input of an exported file is")
    size = student.policy.size_px
    example = torch.zeros(TRACED_BATCH, student.policy.frames, size, size, 3, dtype=torch.uint8)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter's own, about its own insides
        try:
            return torch.export.export(
                FramesToLogits(student), (example,), dynamic_shapes=({0: torch.export.Dim("batch")},)
            )
        except Exception as error:
            raise not_exportable(error, "torch.export") from error


def not_exportable(error: Exception, what: str) -> MmkdError:
    """Return one line for whatever an exporter raised: it runs the network's own code, which may raise anything."""
    if isinstance(error, MmkdError):
        return error
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = lines[0] if lines else type(error).__name__
    return InputError(
        f"this network cannot be exported: {what} says {reason!r:.300}; a network whose every step is torch's own, "
        "without a branch on values, can"
    )


def parameter_bytes(student: TrainedStudent) -> int:
    """Return the bytes of all parameters and buffers, which is about what a file of them takes."""
    network = cast(nn.Module, student.network)
    return sum(value.numel() * value.element_size() for value in (*network.parameters(), *network.buffers()))
