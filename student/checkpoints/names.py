"""Parameters by their own names: without what wrappers, compilers and recognisers put before every one of them."""

from pathlib import Path

from torch import Tensor

from mmkd.data_manifests.errors import InputError

WRAPPERS = ("module.", "model.", "network.", "backbone.")
"""What networks trained here, recognisers of MMAction, and wrappers such as DistributedDataParallel put there."""
COMPILED = "_orig_mod."
"""What torch.compile puts into a parameter's name, at the compiled module's place."""
COUNTERS = frozenset({"n_averaged", "steps"})
"""How often weights were averaged, which torch's and mmengine's averages keep among their parameters."""


def bare_state(state: dict[str, Tensor], path: Path) -> dict[str, str]:
    """Return own name -> name in the file, for all parameters, without the counters of averages.

    Raises InputError, naming the file, when two would have one name: the file holds two networks.
    """
    names: dict[str, str] = {}
    for name in state:
        own = bare_name(name)
        if own in names:
            raise InputError(
                f"the weights {path} hold two networks: {names[own]} and {name} are the same parameter; keep one"
            )
        if own not in COUNTERS:
            names[own] = name
    return names


def bare_name(name: str) -> str:
    """Return a parameter's name without wrappers."""
    name = name.replace(COMPILED, "")
    while name.startswith(WRAPPERS):
        name = name.partition(".")[2]
    return name
