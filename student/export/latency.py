"""The table of what each form of a student costs on this machine: eager, ONNX in 32 and 8 bits, bf16 on a GPU."""

import copy
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from mmkd.cache_tools.frames.records import UInt8Array
from mmkd.cache_tools.process.progress import Progress
from mmkd.student.evaluation.trained import TrainedStudent
from mmkd.student.export.check import onnx_runner
from mmkd.student.export.cost import BATCHES, Timing, gmac, growth, machine, million_parameters, timed
from mmkd.student.export.options import INT8_FILE, ONNX_FILE
from mmkd.student.export.program import parameter_bytes

ONNX_FORMS = {ONNX_FILE: "ONNX fp32", INT8_FILE: "ONNX int8"}


def measured(student: TrainedStudent, files: Mapping[str, bytes]) -> dict[str, Any]:
    """Return GMAC, parameters, sizes of files, times and memory of a student on the CPU and of its files."""
    size = student.policy.size_px
    shape = (student.policy.frames, size, size, 3)
    cuda = torch.cuda.is_available()
    names = [name for name in ONNX_FORMS if name in files]
    rows: list[Timing] = []
    with Progress("measuring", total=len(BATCHES) * (1 + len(names) + cuda), unit="row") as progress:
        with growth() as peak:
            held = parameter_bytes(student) / 2**20  # they are in memory already, as the file's are not

            def with_weights() -> float | None:
                grown = peak()
                return None if grown is None else grown + held

            rows += timed(
                "eager fp32", student.logits, shape=shape, peak_mib=with_weights, advance=progress.advance
            )
        for name in names:
            with growth() as peak:
                run = onnx_runner(files[name], student)
                rows += timed(ONNX_FORMS[name], run, shape=shape, peak_mib=peak, advance=progress.advance)
                del run
        if cuda:
            rows += cuda_timings(student, shape, progress)
    return {
        "gmac": gmac(student.network, torch.zeros(1, *shape, dtype=torch.uint8)),
        "million_parameters": million_parameters(student.network),
        "file_mib": {name: len(data) / 2**20 for name, data in files.items()},
        "machine": machine(),
        "rows": [asdict(row) for row in rows],
    }


def cuda_timings(student: TrainedStudent, shape: tuple[int, ...], progress: Progress) -> list[Timing]:
    """Time the student on the GPU in bf16, copying the views there and the logits back included."""
    device = torch.device("cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    network = copy.deepcopy(student.network).to(device).eval()

    def run(frames: UInt8Array) -> list[torch.Tensor]:
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
            outputs = network({"rgb": torch.from_numpy(frames).to(device)})
            return [logits.float().cpu() for logits in outputs.values()]  # waits for the GPU

    def peak() -> float:
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    return timed("CUDA bf16", run, shape=shape, peak_mib=peak, advance=progress.advance)
