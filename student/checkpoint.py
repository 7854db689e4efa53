"""Checkpoints of a training run: whole or absent, free of code, refused by a run that is not the same.

A checkpoint is a directory `checkpoint-<step>` that appears by one rename: the network as safetensors, the
optimiser's state as a torch file that is read with `weights_only=True`, and the position with the identity of
the run and the hashes of both. Older ones are removed after a newer one is there.
"""

import hashlib
import io
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import nn
from torch.optim import Optimizer

from mmkd.cache_tools.fingerprints import differences
from mmkd.cache_tools.sealed import open_seal, seal
from mmkd.data_manifests.atomic import sync_directory, write_atomically
from mmkd.data_manifests.errors import FingerprintError, StorageError, VerificationError

SCHEMA = "mmkd-checkpoint-1"
NETWORK_FILE = "network.safetensors"
OPTIMIZER_FILE = "optimizer.pt"
STATE_FILE = "state.json"


@dataclass(frozen=True)
class Position:
    """How far a run has come."""

    step: int
    """Steps done."""
    loss_sum: float = 0.0
    """Sum of loss times clips over the steps of the current epoch."""
    clips: int = 0
    """Clips seen in the current epoch."""


def encode_network(network: nn.Module) -> bytes:
    """Return the network's parameters and buffers as safetensors bytes."""
    return save({name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()})


def save_checkpoint(
    run_dir: Path,
    network: nn.Module,
    optimizer: Optimizer,
    *,
    position: Position,
    identity: Mapping[str, Any],
) -> None:
    """Write the checkpoint of a position, then remove older ones; StorageError when the disk refuses."""
    final = checkpoint_path(run_dir, position.step)
    if not final.exists():
        buffer = io.BytesIO()
        torch.save(optimizer.state_dict(), buffer)
        files = {NETWORK_FILE: encode_network(network), OPTIMIZER_FILE: buffer.getvalue()}
        state = {
            "schema": SCHEMA,
            "position": asdict(position),
            "identity": identity,
            "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
        }
        files[STATE_FILE] = (json.dumps(seal(state), indent=1) + "\n").encode()
        temporary = run_dir / f".{final.name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        for name, data in files.items():
            write_atomically(temporary / name, data)
        publish(temporary, final)
    for old in run_dir.glob("*checkpoint-*"):
        if old != final:
            shutil.rmtree(old, ignore_errors=True)


def publish(temporary: Path, final: Path) -> None:
    """Rename a finished directory into place, durably."""
    try:
        temporary.rename(final)
        sync_directory(final.parent)
    except OSError as error:
        raise StorageError(f"cannot write {final}: {error.strerror}") from error


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Return the directory of the checkpoint after `step` steps."""
    return run_dir / f"checkpoint-{step:09d}"


def latest_checkpoint(run_dir: Path) -> Path | None:
    """Return the checkpoint with the most steps, or None."""
    return max(run_dir.glob("checkpoint-*"), default=None)


def load_checkpoint(
    path: Path, network: nn.Module, optimizer: Optimizer, *, identity: Mapping[str, Any]
) -> Position:
    """Put a checkpoint into network and optimiser, and return its position.

    Raises VerificationError when its bytes are not those that were written, FingerprintError, with each field
    that differs, when it belongs to another run.
    """
    try:
        state = open_seal((path / STATE_FILE).read_bytes())
        position, stored, hashes = Position(**state["position"]), state["identity"], state["sha256"]
        files = {name: (path / name).read_bytes() for name in (NETWORK_FILE, OPTIMIZER_FILE)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise VerificationError(f"checkpoint {path} is damaged ({error}); remove it to start over") from error
    for name, data in files.items():
        if hashlib.sha256(data).hexdigest() != hashes.get(name):
            raise VerificationError(f"{path / name} is not what was written; remove {path} to start over")
    lines = [line.replace(": cache ", ": checkpoint ", 1) for line in differences(stored, identity)]
    if lines:
        raise FingerprintError(
            f"{path} belongs to another run: {'; '.join(lines)}. Use its options, or another output folder"
        )
    network.load_state_dict(load(files[NETWORK_FILE]))
    optimizer.load_state_dict(torch.load(io.BytesIO(files[OPTIMIZER_FILE]), weights_only=True))
    return position
