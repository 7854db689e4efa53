"""Parameters of TV-L1, for every path that computes it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Mode = Literal["opencv-cuda", "opencv"]
MODES: tuple[Mode, ...] = ("opencv-cuda", "opencv")
BUDGET_BYTES_DEVICE = 4 * 2**30
"""Memory beyond images and result that is taken on a GPU unless the caller says otherwise."""


@dataclass(frozen=True, kw_only=True)
class TVL1Params:
    """Parameters of TV-L1, named as in the field; `default`, `opencv`, `accurate` and `fast` are presets."""

    tau: float = 0.25
    """τ, step of the dual update (Sánchez et al., eq. 11); larger converges faster, above 0.25 not surely."""
    lambda_: float = 0.15
    """λ, weight of the data term (eq. 2) for images in 0..255; larger follows the images, less smooth."""
    theta: float = 0.3
    """θ, tightness between u and v (eq. 4); larger moves faster per iteration and couples less exactly."""
    scales: int = 5
    """Levels of the pyramid at most; more follow larger motion. A level with a side below 16 is not used."""
    zoom: float = 0.8
    """Size of a level relative to the finer one, in (0, 1); larger takes smaller, more accurate steps."""
    warps: int = 5
    """Linearisations per level; more follow larger motion within a level."""
    iterations: int = 300
    """Iterations per warp at most; OpenCV's CPU class counts 10 outer x 30 inner."""
    epsilon: float = 0.01
    """ε, stop once the mean squared update is at most ε² px²; larger stops sooner, 0 never stops early."""
    median: int = 0
    """Side of the median filter of the flow, 3 or 5; 0 for none, as on CUDA."""
    median_every: int = 30
    """Iterations between medians, the first one before the first iteration (OpenCV's inner iterations)."""
    mode: Mode = "opencv-cuda"
    """Whose sampling, borders and stopping rule: `opencv-cuda` or `opencv` (its CPU class)."""

    def __post_init__(self) -> None:
        """Refuse what cannot be computed, naming the field."""
        for name in ("tau", "lambda_", "theta"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"TVL1Params.{name} must be a positive number, not {value!r}")
        if not (math.isfinite(self.epsilon) and self.epsilon >= 0):
            raise ValueError(f"TVL1Params.epsilon must be 0 or a positive number, not {self.epsilon!r}")
        if not 0 < self.zoom < 1:
            raise ValueError(f"TVL1Params.zoom must lie between 0 and 1, not {self.zoom!r}")
        for name in ("scales", "warps", "iterations", "median_every"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"TVL1Params.{name} must be a whole number of at least 1, not {value!r}")
        if self.median not in (0, 3, 5):
            raise ValueError(f"TVL1Params.median must be 0 (none), 3 or 5, not {self.median!r}")
        if self.mode not in MODES:
            raise ValueError(f"TVL1Params.mode must be one of {', '.join(MODES)}, not {self.mode!r}")

    @classmethod
    def default(cls) -> "TVL1Params":
        """Return the parameters of OpenCV's CUDA class, which most published flow was made with."""
        return cls()

    @classmethod
    def opencv(cls) -> "TVL1Params":
        """Return the parameters of OpenCV's CPU class `DualTVL1OpticalFlow`."""
        return cls(mode="opencv", median=5)

    @classmethod
    def accurate(cls) -> "TVL1Params":
        """Return `opencv` with 10 scales, which follows motion of 20 pixels and more."""
        return cls(mode="opencv", median=5, scales=10)

    @classmethod
    def fast(cls) -> "TVL1Params":
        """Return a rough preset for tiny clips, demonstrations and tests; no published flow is like it."""
        return cls(mode="opencv", scales=3, zoom=0.5, warps=2, iterations=8, epsilon=0)


PresetName = Literal["default", "opencv", "accurate", "fast"]
PRESETS: Mapping[str, TVL1Params] = {
    "default": TVL1Params.default(),
    "opencv": TVL1Params.opencv(),
    "accurate": TVL1Params.accurate(),
    "fast": TVL1Params.fast(),
}
"""Name -> parameters, the default first."""
