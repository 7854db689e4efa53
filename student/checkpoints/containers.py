"""Where in a checkpoint the parameters are: programs put them beside the optimiser, twice, or in a list.

| key | who writes it |
|---|---|
| none: the file is the state dict | torchvision's and timm's published files |
| `state_dict`, `model` | Lightning, mmengine; torchvision's and timm's training programs, VideoMAE, DINO |
| `model_state` | SlowFast |
| `module` | DeepSpeed |
| `classifiers[0]` | V-JEPA's probes |
| `model_ema`, `state_dict_ema`, `ema_state_dict` | averaged weights, beside plain ones in the same files |
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmkd.data_manifests.errors import InputError

PLAIN = ("state_dict", "model_state_dict", "model_state", "model", "module", "classifiers[0]", "")
"""Keys of the weights as trained, the first that is there being taken; "" is the file itself."""
AVERAGED = "ema"
"""In the key of weights that are an average over training."""
MOST_NESTED = 3
"""Dicts within dicts that are looked into."""
MOST_SHOWN = 6


@dataclass(frozen=True)
class Weights:
    """One set of parameters in a checkpoint."""

    state: dict[str, Tensor]
    """Name in the file -> parameter or buffer."""
    key: str
    """Where it was: `state_dict`, `model_ema`, `classifiers[0]`; empty where it is the file itself."""
    others: tuple[str, ...]
    """Keys of the other sets in the file."""


def choose_weights(loaded: object, wanted: str | None) -> Weights:
    """Return the set of parameters that is wanted by its key, else the plain one.

    Raises InputError, without the file's name, when there is none, or the choice is the user's.
    """
    found = dict(sets_of_parameters(loaded))
    if not found:
        raise InputError("are not a dict of tensors; save the network's state_dict()")
    named = ", ".join(repr(key) for key in list(found)[:MOST_SHOWN])
    if wanted is not None and wanted not in found:
        raise InputError(f"have nothing at {wanted!r}; they have {named}")
    key = plain_key(found) if wanted is None else wanted
    if key is None:
        raise InputError(f"are in several places; say which: {named}")
    return Weights(found[key], key, tuple(other for other in found if other != key))


def plain_key(keys: Collection[str]) -> str | None:
    """Return the key of the weights as trained, the only key where there is one; None where nothing tells."""
    known = {
        key: PLAIN.index(last) for key in keys if AVERAGED not in key and (last := key.split(".")[-1]) in PLAIN
    }
    if known:
        return min(known, key=lambda key: (known[key], len(key)))
    return next(iter(keys)) if len(keys) == 1 else None


def sets_of_parameters(value: object, key: str = "", depth: int = 0) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield (key, name -> tensor) for every dict within a checkpoint that holds parameters.

    Other values beside the parameters (a counter, arguments) are passed over; a dict that has a tensor of another
    kind among them (sparse, quantised, without values, unnamed) holds no parameters.
    """
    if isinstance(value, dict):
        items = list(dict.items(value))  # not value.items(): a file can give an OrderedDict attributes of any name
        tensors = [(name, inner) for name, inner in items if isinstance(inner, Tensor)]
        if tensors and all(is_parameter(name, inner) for name, inner in tensors):
            yield key, {name: inner.detach() for name, inner in tensors}  # detached: without a file's hooks
    elif isinstance(value, list | tuple):
        items = [(f"[{position}]", inner) for position, inner in enumerate(value)]
    else:
        return
    if depth < MOST_NESTED:
        for name, inner in items:
            if isinstance(name, str) and isinstance(inner, dict | list | tuple):
                dot = "." if key and not name.startswith("[") else ""
                yield from sets_of_parameters(inner, f"{key}{dot}{name}", depth + 1)


def is_parameter(name: object, value: object) -> bool:
    """Return whether an entry of a file is a named tensor that has its values, each by itself."""
    plain = type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided and not value.is_quantized  # type: ignore[attr-defined]  # a tensor here
    return isinstance(name, str) and plain and not value.is_meta and _is_whole(value)  # type: ignore[attr-defined,arg-type]


def _is_whole(value: Tensor) -> bool:
    """Return whether every value is stored: a tensor expanded from one number would fill the memory when copied."""
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()
