"""Arrays to a device, and computation there that repeats bit for bit."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from mmkd.data_manifests.errors import InputError
from mmkd.student.batches import AnyArray


def choose_device(name: str) -> torch.device:
    """Return the device of that name; `auto` is CUDA if there is one. InputError when it cannot be used."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def to_device(arrays: Mapping[str, AnyArray], device: torch.device) -> dict[str, Tensor]:
    """Return arrays as tensors on a device."""
    return {name: torch.from_numpy(value).to(device) for name, value in arrays.items()}


@contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """Use deterministic convolutions without TF32, and leave torch's random state as it was."""
    devices = [device] if device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=devices),
        torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
    ):
        yield
