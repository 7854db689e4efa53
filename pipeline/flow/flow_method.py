"""Which method computes flow, with its preset or weights; free of torch, so that a wrong choice shows at once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmkd.cache_tools.cache.fingerprints import file_sha256
from mmkd.data_manifests.errors import InputError
from mmkd.pipeline.tvl1.params import PRESETS as TVL1_PRESETS

PRESETS: dict[str, tuple[str, ...]] = {
    "tvl1": tuple(TVL1_PRESETS),
    "dis": ("medium", "fast", "ultrafast"),
    "raft": (),
}
"""Method -> its presets, the default one first."""
DIS_LEAST_SIDE = 16
"""Pixels of an image's shorter side below which OpenCV's DIS stops the process or finds no patch."""


@dataclass(frozen=True)
class FlowMethod:
    """A method and what it needs."""

    name: str = "tvl1"
    """`tvl1`, `dis` or `raft`."""
    preset: str | None = None
    """TV-L1: default, opencv, accurate, fast; DIS: ultrafast, fast, medium; None: default, medium."""
    weights: Path | None = None
    """RAFT: file of weights."""

    def __post_init__(self) -> None:
        """Raise InputError for a method, preset or weights that do not go together."""
        if self.name not in PRESETS:
            raise InputError(f"--method {self.name!r} is not one of {', '.join(PRESETS)}")
        known = PRESETS[self.name]
        if self.preset is not None and self.preset not in known:
            has = f"has the presets {', '.join(known)}" if known else "has no presets; its weights decide"
            raise InputError(f"--preset {self.preset!r}: the method {self.name} {has}")
        if (self.name == "raft") != (self.weights is not None):
            need = (
                "needs --weights, a file"
                if self.name == "raft"
                else "takes no --weights; RAFT does, by --method raft"
            )
            raise InputError(f"the method {self.name} {need}")

    @property
    def takes_colour(self) -> bool:
        """Whether RGB frames serve it better than grey ones."""
        return self.name == "raft"

    @property
    def chosen_preset(self) -> str | None:
        """The preset, or the method's default."""
        return self.preset or next(iter(PRESETS[self.name]), None)

    def identity(self) -> dict[str, Any]:
        """Return everything that could change a value, as JSON; weights by their content."""
        known: dict[str, Any] = {"method": self.name, "preset": self.chosen_preset}
        if self.weights is not None:
            known["weights_sha256"] = file_sha256(self.weights)
        return known
