"""A checkpoint file as somebody shared it, read so that nothing in it runs: safetensors, or what torch.save wrote.

torch reads with `weights_only=True`, and what else the file names (arguments, histories) becomes inert. It gives up
files from before torch 1.6 that hold more than tensors, and whole networks in place of their parameters.
"""

import re
import shlex
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mmkd.data_manifests.errors import InputError
from mmkd.data_manifests.regular_file import open_regular
from mmkd.student.checkpoints.archive_bounds import check_archive
from mmkd.student.checkpoints.containers import Weights, choose_weights
from mmkd.student.checkpoints.inert import Inert, InertDict, is_dangerous

TAKE_OUT = (
    'import torch; d = torch.load({path!r}, "cpu", weights_only=False); '
    'd = d if isinstance(d, dict) else d.state_dict(); d = d.get("state_dict", d.get("model", d)); '
    "torch.save({{k: v for k, v in d.items() if torch.is_tensor(v)}}, {out!r})"
)
"""A program that keeps the tensors of a checkpoint which holds a whole network."""


def read_state(path: Path) -> dict[str, Tensor]:
    """Read the plain parameters of a file, by name; InputError names the file."""
    return read_checkpoint(path).state


def read_checkpoint(path: Path, key: str | None = None) -> Weights:
    """Read a set of parameters: the one at `key` (see `Weights`), else the plain one.

    Raises InputError, naming the file, for anything but a file with such parameters.
    """
    loaded = load_inert(path)
    try:
        return choose_weights(loaded, key)
    except InputError as error:
        if isinstance(loaded, Inert):
            raise InputError(f"cannot read the weights {path}: {whole_network(path)}") from error
        raise InputError(f"the weights {path} {error}") from error


def load_inert(path: Path) -> Any:
    """Return what a file holds, with `Inert` for all that is no tensor, container, number or text."""
    try:
        with open_regular(path) as file:
            return load_file(path) if path.suffix == ".safetensors" else load_torch(file)
    except (MemoryError, InputError):
        raise
    except OSError as error:
        raise InputError(f"cannot read the weights {path}: {error.strerror or error}") from error
    except Exception as error:  # a file that is not what it seems makes torch and pickle raise anything
        text = str(error) or type(error).__name__
        raise InputError(f"cannot read the weights {path}: {reason(path, text)}") from error


def load_torch(file: BufferedReader) -> Any:
    """Read what torch.save wrote; raises whatever torch raises, and ValueError for a file that attacks."""
    check_archive(file)
    names = unknown_names(file)
    if dangerous := sorted(filter(is_dangerous, names)):
        raise ValueError(refusal(dangerous[0]))
    for stand_in in (Inert, InertDict):
        file.seek(0)
        try:
            with torch.serialization.safe_globals([(stand_in, name) for name in names]):
                return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            if stand_in is InertDict or "SETITEM" not in str(error):
                raise
    raise AssertionError("the second stand-in is the last")


def unknown_names(file: BufferedReader) -> list[str]:
    """Return the full names of the classes and functions in a file that torch does not read by itself."""
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except ValueError:  # not a zip file: torch.load says what it is, or reads the form of before 1.6
        return []


def reason(path: Path, text: str) -> str:
    """Return in one line why torch did not read a file: of its several lines the one that says it."""
    unsupported = re.search(r"[Uu]nsupported (?:global: GLOBAL|GLOBAL|class) (\S+)", text)
    if unsupported is not None:
        name = unsupported[1] if "." in unsupported[1] else f"builtins.{unsupported[1]}"  # torch leaves that out
        return refusal(name) if is_dangerous(name) else f"it holds more than tensors ({name}); {take_out(path)}"
    _, found, detail = text.partition("WeightsUnpickler error: ")
    text = (detail if found else text).strip().splitlines()[0]
    return text.partition(" In PyTorch 2.6")[0]  # what follows is advice to run the file


def refusal(name: str) -> str:
    """Return why a file that names such a function is not read."""
    return f"it calls {name}, which no checkpoint needs: do not trust where it comes from"


def whole_network(path: Path) -> str:
    """Return what to do about a file that holds an object in place of a dict."""
    return f"it holds more than tensors: a whole network, which only its own code can open; {take_out(path)}"


def take_out(path: Path) -> str:
    """Return the command that takes the weights out of a file which cannot be read safely."""
    out = path.with_name(f"{path.stem}-weights.pth")
    command = shlex.join(["python", "-c", TAKE_OUT.format(path=str(path), out=str(out))])
    return (
        "reading that runs its code. If you trust where it comes from, take the weights out and name "
        f"{out} instead: {command}"
    )
