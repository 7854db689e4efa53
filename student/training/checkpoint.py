"""Checkpoints of a training run: whole or absent, free of code, refused by a run that is not the same.

A checkpoint is a directory `checkpoint-<step>` that appears by one rename: the network as safetensors, the
optimiser's state as a torch file that is read with `weights_only=True`, averaged and best weights where a run has
them, and the position with the identity of the run, the metrics so far and the hashes of all. The last two are
kept: when the newest is damaged, a run continues from the one before. Nothing else in the folder is touched.
"""

import hashlib
import io
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from mmkd.cache_tools.cache.fingerprints import differences
from mmkd.cache_tools.cache.sealed import open_seal, seal
from mmkd.data_manifests.atomic import TEMPORARY as TEMPORARY_FILES
from mmkd.data_manifests.atomic import storage_errors, sync_directory, write_atomically
from mmkd.data_manifests.errors import FingerprintError, VerificationError
from mmkd.data_manifests.regular_file import read_regular
from mmkd.data_manifests.typed_json import STRICT, typed
from mmkd.student.checkpoints.containers import is_parameter
from mmkd.student.training.epoch_metrics import EpochMetrics

log = logging.getLogger("mmkd")

SCHEMA = "mmkd-checkpoint-1"
NETWORK_FILE = "network.safetensors"
OPTIMIZER_FILE = "optimizer.pt"
STATE_FILE = "state.json"
AVERAGE_FILE = "average.safetensors"
BEST_FILE = "best.safetensors"
FILES = (STATE_FILE, NETWORK_FILE, OPTIMIZER_FILE, AVERAGE_FILE, BEST_FILE)
KEPT = 2
"""Checkpoints that stay."""
NAME = re.compile(r"checkpoint-\d{9}")
TEMPORARY = re.compile(r"\.checkpoint-\d{9}\.tmp")
INITIAL_WEIGHTS = "initial_weights"
"""The field of a run's identity that only the network before its first step can give."""
NEEDED = {AdamW: {"step", "exp_avg", "exp_avg_sq"}, SGD: set[str]()}
"""What an optimiser must keep of each parameter; but for the number of its steps, in the parameter's shape."""


@dataclass(frozen=True)
class Position:
    """How far a run has come."""

    __pydantic_config__ = STRICT
    step: int
    """Steps done."""
    loss_sum: float = 0.0
    """Sum of loss times clips over the steps of the current epoch."""
    clips: int = 0
    """Clips seen in the current epoch."""

    def __post_init__(self) -> None:
        """Raise ValueError for numbers below 0."""
        if min(self.step, self.clips) < 0:
            raise ValueError(f"{self.step} steps and {self.clips} clips are no position")


@dataclass(frozen=True)
class State:
    """What a checkpoint says beside the network's and the optimiser's state."""

    __pydantic_config__ = STRICT
    schema: str
    """Version of this form."""
    position: Position
    """How far its run had come."""
    identity: dict[str, Any]
    """What a run that continues from it must be, field by field."""
    sha256: dict[str, str]
    """Name of each other file -> its hash."""
    metrics: list[EpochMetrics] | None = None
    """Of each finished epoch; None in a checkpoint of an earlier version, which kept them elsewhere."""
    numbers: dict[str, int | float] = field(default_factory=dict)
    """What else has to continue: the loss's scale in fp16, and how many steps were averaged."""


@dataclass(frozen=True)
class Checkpoint:
    """What was read, beside what is in the network and the optimiser already."""

    state: State
    """What it says."""
    weights: dict[str, bytes]
    """AVERAGE_FILE, BEST_FILE -> safetensors bytes, where the run has them."""


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
    metrics: Sequence[EpochMetrics] = (),
    weights: Mapping[str, bytes] | None = None,
    numbers: Mapping[str, int | float] | None = None,
) -> None:
    """Write the checkpoint of a position, then remove all but the last two; StorageError when the disk refuses.

    `weights` and `numbers` are those of `Checkpoint` and `State`.
    """
    final = checkpoint_path(run_dir, position.step)
    if not final.exists():
        buffer = io.BytesIO()
        torch.save(optimizer.state_dict(), buffer)
        files = {NETWORK_FILE: encode_network(network), OPTIMIZER_FILE: buffer.getvalue(), **(weights or {})}
        state = {
            "schema": SCHEMA,
            "position": asdict(position),
            "identity": identity,
            "metrics": [values.to_json() for values in metrics],
            "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
            **({"numbers": dict(numbers)} if numbers else {}),
        }
        files[STATE_FILE] = (json.dumps(seal(state), indent=1) + "\n").encode()
        temporary = run_dir / f".{final.name}.tmp"
        remove_checkpoint(temporary)
        for name, data in files.items():
            write_atomically(temporary / name, data)
        publish(temporary, final)
    kept = checkpoints(run_dir)[:KEPT]
    for old in own_folders(run_dir):
        if old not in kept:
            remove_checkpoint(old)


def publish(temporary: Path, final: Path) -> None:
    """Rename a finished directory into place, durably."""
    with storage_errors(final):
        temporary.rename(final)
        sync_directory(final.parent)


def own_folders(run_dir: Path) -> Iterator[Path]:
    """Yield the checkpoints of a run, whole and half-written ones, and nothing else that lies there."""
    for path in list(run_dir.iterdir()):
        if NAME.fullmatch(path.name) or TEMPORARY.fullmatch(path.name):
            yield path


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint's files, and its folder unless something else lies in it."""
    with suppress(OSError):  # an old checkpoint that stays does no harm
        for name in FILES:  # without its state it is none
            (path / name).unlink(missing_ok=True)
        for part in path.glob(TEMPORARY_FILES):
            part.unlink()
        path.rmdir()


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Return the directory of the checkpoint after `step` steps."""
    return run_dir / f"checkpoint-{step:09d}"


def checkpoints(run_dir: Path) -> list[Path]:
    """Return the checkpoints of a run, that with the most steps first."""
    if not run_dir.is_dir():
        return []
    return sorted((path for path in own_folders(run_dir) if NAME.fullmatch(path.name)), reverse=True)


def latest_checkpoint(run_dir: Path) -> Path | None:
    """Return the checkpoint with the most steps, or None."""
    return next(iter(checkpoints(run_dir)), None)


def load_latest(
    run_dir: Path, network: nn.Module, optimizer: Optimizer, *, identity: Mapping[str, Any]
) -> Checkpoint | None:
    """Load the newest checkpoint that is whole, or None where there is none; raises as `load_checkpoint`.

    A newest one that is damaged is removed with a warning once the one before it has been read.
    """
    damaged: list[tuple[Path, VerificationError]] = []
    for path in checkpoints(run_dir):
        try:
            found = load_checkpoint(path, network, optimizer, identity=identity)
        except VerificationError as error:
            damaged.append((path, error))
            continue
        for old, fault in damaged:
            log.warning("%s: continuing from the one before it, %s", str(fault).partition("; ")[0], path)
            remove_checkpoint(old)
        return found
    if damaged:
        raise damaged[0][1]
    return None


def load_checkpoint(
    path: Path, network: nn.Module, optimizer: Optimizer, *, identity: Mapping[str, Any]
) -> Checkpoint:
    """Put a checkpoint into network and optimiser, and return what else there is.

    Raises VerificationError when its bytes are not those that were written, FingerprintError, with each field
    that differs, when it belongs to another run, StorageError when it cannot be read. Of initial weights that
    `identity` does not know nothing is asked.
    """
    with storage_errors(path, verb="read"):  # a machine's fault is no damage: nothing is to be removed for it
        try:
            state = typed(State, open_seal(read_regular(path / STATE_FILE)))
            if unknown := set(state.sha256) - set(FILES):
                raise ValueError(f"{STATE_FILE} names {min(unknown)!r}")
            wanted = {NETWORK_FILE, OPTIMIZER_FILE, *state.sha256}
            files = {name: read_regular(path / name) for name in sorted(wanted)}
        except (FileNotFoundError, ValueError) as error:
            raise VerificationError(f"checkpoint {path} is damaged ({error}); remove it to start over") from error
    if checkpoint_path(path.parent, state.position.step) != path:
        raise VerificationError(f"{path / STATE_FILE} is of another checkpoint; remove {path} to start over")
    for name, data in files.items():
        if hashlib.sha256(data).hexdigest() != state.sha256.get(name):
            raise VerificationError(f"{path / name} is not what was written; remove {path} to start over")
    stored = {key: value for key, value in state.identity.items() if key != INITIAL_WEIGHTS or key in identity}
    lines = [line.replace(": cache ", ": checkpoint ", 1) for line in differences(stored, identity)]
    if lines:
        raise FingerprintError(
            f"{path} belongs to another run: {'; '.join(lines)}. Use its options, or another output folder"
        )
    restore(network, optimizer, files, path=path)
    return Checkpoint(state, {name: files[name] for name in (AVERAGE_FILE, BEST_FILE) if name in files})


def load_weights(network: nn.Module, data: bytes, path: Path) -> None:
    """Put averaged or best weights of a checkpoint into a network; VerificationError where they are not its."""
    try:
        network.load_state_dict(load(data))
    except Exception as error:  # as in `restore`
        reason = " ".join((str(error) or type(error).__name__).split())
        raise VerificationError(f"{path} does not fit the run ({reason:.200}); remove it to start over") from error


def restore(network: nn.Module, optimizer: Optimizer, files: Mapping[str, bytes], *, path: Path) -> None:
    """Put a checkpoint's files into network and optimiser; VerificationError where they are not theirs.

    The optimiser's rates and rules stay those of the recipe, whatever the file says.
    """
    rules = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    try:
        network.load_state_dict(load(files[NETWORK_FILE]))
        # To the CPU first: a checkpoint of another device is as good, and the optimiser moves what it takes.
        found = torch.load(io.BytesIO(files[OPTIMIZER_FILE]), map_location="cpu", weights_only=True)
        optimizer.load_state_dict(found)
        check_moments(optimizer)
    except (MemoryError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:  # files that fit no network, and a pickle that is not one, make torch raise anything
        reason = " ".join((str(error) or type(error).__name__).split())
        raise VerificationError(f"{path} does not fit the run ({reason:.200}); remove it to start over") from error
    for group, own in zip(optimizer.param_groups, rules, strict=True):
        group.update(own)


def check_moments(optimizer: Optimizer) -> None:
    """Raise ValueError unless the optimiser's state is of its kind, in the shapes of the parameters."""
    needed = NEEDED.get(type(optimizer))
    if needed is None:  # a user's own optimiser keeps what it likes
        return
    parameters = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    for parameter, state in optimizer.state.items():
        tensors = {name: value for name, value in state.items() if value is not None}
        shapes = {name: value.shape for name, value in tensors.items() if is_parameter(name, value)}
        wanted = {name: torch.Size([]) if name == "step" else parameter.shape for name in tensors}
        if parameter not in parameters or shapes != wanted or not needed <= shapes.keys():
            raise ValueError(f"{OPTIMIZER_FILE} is not the state of this network's optimiser")
