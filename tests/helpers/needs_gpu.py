"""Tests on a real GPU: skipped without one, except on a machine that should have one."""

import os

import pytest
import torch

VARIABLE = "MMKD_TEST_CUDA"
WANTED = os.environ.get(VARIABLE, "0") not in ("", "0")
"""Whether this machine should have a GPU: without one the tests fail, so that none is passed over unseen."""
needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available() and not WANTED,
    reason=f"no CUDA device; with {VARIABLE}=1 this fails instead",
)
