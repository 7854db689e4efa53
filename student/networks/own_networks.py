"""Networks of one's own: any `module:factory` that is installed, held to a contract before anything is trained.

    factory(*, channels, frames, size_px, heads, **options) -> nn.Module

The module maps clips (B, channels, T, S, S) either to a dict of logits {head: (B, classes)}, or, with an attribute
`feature_count`, to features (B, feature_count), on which linear heads are put. Its RGB input is normalised with the
factory's own numbers (its attributes `mean` and `std`), ImageNet's where it has none, or those of
`train.normalisation`. Its code cannot be fingerprinted: what a cache keeps is its name, its options and its
weights. So a recipe that names it is consent, and a file of somebody else that does is not.
"""

from collections.abc import Collection, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmkd.data_manifests.errors import InputError
from mmkd.student.checkpoints.checkpoint_file import read_state
from mmkd.student.checkpoints.fit import fit_of
from mmkd.student.key_maps.key_maps import map_weights
from mmkd.student.network_table import Normalisation, is_own

CLASSIFIER = "classifier"
"""The classifier of a network that gives logits itself, as transformers calls it."""


class DictNetwork(nn.Module):
    """A network that gives logits of each head itself, behind the interface of `HeadedNetwork`."""

    def __init__(self, network: nn.Module) -> None:
        """Wrap a network that maps clips to a dict of logits."""
        super().__init__()
        self.network = network

    def forward(self, clips: Tensor) -> dict[str, Tensor]:
        """Map clips (B, C, T, S, S) to float32 logits (B, classes) per head."""
        return {head: value.float() for head, value in self.network(clips).items()}


def build_own(
    name: str,
    *,
    heads: Mapping[str, int],
    channels: int,
    frames: int,
    size_px: int,
    options: Mapping[str, Any],
    weights: Path | None,
) -> nn.Module:
    """Call a factory and load its weights; InputError for what is not there, or fails, and for weights that do not
    fit.

    The factory's module keeps its own parameters' names in a weights file, or has them from the names of another
    project that `key_maps` knows; the classifier of such a file is left aside.
    """
    factory = find_factory(name)
    try:
        network = factory(channels=channels, frames=frames, size_px=size_px, heads=dict(heads), **options)
    except Exception as error:  # somebody's code: whatever it raises is told in one line
        raise InputError(f"network {name} cannot be built: {type(error).__name__}: {one_line(error)}") from error
    if not isinstance(network, nn.Module):
        raise InputError(f"network {name} gave {type(network).__name__} where a torch.nn.Module is expected")
    if weights is not None:
        state, wanted = read_state(weights), network.state_dict()
        if problems := fit_of(state, wanted).problems:
            mapped = map_weights(state, weights)
            rest = {key: value for key, value in wanted.items() if not key.startswith(f"{CLASSIFIER}.")}
            if mapped.map.marks and not fit_of(mapped.backbone, rest).problems:
                state, problems = mapped.backbone, ""
        if problems:
            raise InputError(f"the weights {weights} are not those of {name}: {problems}")
        network.load_state_dict(state, strict=False)
    return network


def find_factory(name: str, what: str = "network") -> Any:
    """Return the factory of `what` that `module:factory` names; InputError where there is none."""
    module_name, _, function = name.partition(":")
    try:
        module = import_module(module_name)
    except Exception as error:  # somebody's code: a syntax error, or anything that it raises
        told = f"{type(error).__name__}: {one_line(error)}"
        raise InputError(f"{what} {name}: module {module_name!r} cannot be imported: {told}") from error
    factory = getattr(module, function, None)
    if not callable(factory):
        raise InputError(f"{what} {name}: module {module_name!r} has no function {function!r}")
    return factory


def factory_normalisation(name: str) -> Normalisation | None:
    """Return the numbers that a factory states for RGB in 0..1; None where it has no `mean` and `std`.

    Raises InputError where it has one of the two, or what are no numbers.
    """
    factory = find_factory(name)
    stated: list[Any] = [getattr(factory, part, None) for part in ("mean", "std")]
    if stated == [None, None]:
        return None
    try:
        mean, std = (tuple(float(value) for value in part) for part in stated)
    except (TypeError, ValueError):
        mean, std = (), ()
    if not mean or not std or min(std) <= 0:
        raise InputError(
            f"network {name}: its factory's mean and std must be sequences of numbers, std above 0; they are "
            f"{stated[0]!r} and {stated[1]!r}"
        )
    return Normalisation(mean, std)


def check_logits(name: str, network: nn.Module, clips: Tensor, heads: Mapping[str, int]) -> None:
    """Run a network once on clips (1, C, T, S, S); InputError unless it gives logits of each head."""
    was_training = network.training
    try:
        with torch.no_grad():  # not inference mode: what a network keeps of its first pass is trained with later
            logits = network.eval()(clips)
    except Exception as error:  # somebody's code
        shape = tuple(clips.shape)
        raise InputError(
            f"network {name} fails on clips {shape}: {type(error).__name__}: {one_line(error)}"
        ) from error
    finally:
        network.train(was_training)
    found = {head: tuple(value.shape) for head, value in logits.items()} if isinstance(logits, dict) else logits
    wanted = {head: (1, classes) for head, classes in heads.items()}
    if found != wanted:
        raise InputError(f"network {name} gives logits of shapes {found}; the heads need {wanted}")


def require_trust(name: str, trusted: Collection[str], what: str) -> None:
    """Raise InputError where a file names code of somebody's that the user did not allow."""
    if is_own(name) and name not in trusted:
        raise InputError(
            f"{what} is a network whose code is not mmkd's, {name}: allow it with --trust-network {name}, if you "
            "know it"
        )


def one_line(error: Exception) -> str:
    """Return an exception's text in one line."""
    return " ".join(str(error).split())[:300]
