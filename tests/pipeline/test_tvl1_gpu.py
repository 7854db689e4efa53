"""The CUDA path of TV-L1 on a real GPU; the checks are those of tests/benchmarks/flow_gpu.py."""

import importlib.util

import torch

from tests.helpers.needs_gpu import needs_cuda
from tests.helpers.places import TESTS


@needs_cuda
def test_kernels_are_right_and_a_pair_has_the_same_bits_in_any_batch():
    assert torch.cuda.is_available(), "this machine should have a CUDA device"
    path = TESTS / "benchmarks" / "flow_gpu.py"
    spec = importlib.util.spec_from_file_location("flow_gpu", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    found = list(script.checks(script.load_clips(None)))
    assert len(found) > 10
    assert [f"{check.name}: {check.detail}" for check in found if not check.good] == []
