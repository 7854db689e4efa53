"""Which detector `mmkd-cache detect` runs and what it keeps; importing this needs no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmkd.cache_tools.cache.fingerprints import file_sha256

DETECTORS = (
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_resnet50_fpn_v2",
    "fasterrcnn_mobilenet_v3_large_fpn",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "retinanet_resnet50_fpn",
    "retinanet_resnet50_fpn_v2",
)
"""Names of torchvision's networks. RetinaNet has no background: its classes count from 0."""


@dataclass(frozen=True)
class DetectorParams:
    """What could change a box, and the batch, which changes it by rounding alone."""

    network: str
    """One of `DETECTORS`."""
    weights: Path
    """Its parameters; their number of classes is the network's."""
    hand: tuple[int, ...]
    """Classes of the network that are hands, from 1; RetinaNet's from 0."""
    object: tuple[int, ...] | None = None
    """Classes that are objects; None: all others."""
    min_score: float = 0.05
    """Boxes of at most this score are dropped; torchvision's own default."""
    frames_per_second: float | None = None
    """Frames that are looked at; None: all."""
    min_size_px: int | None = None
    """Short side to which frames are resized; None: the network's own."""
    max_size_px: int | None = None
    """Bound on the long side; None: the network's own."""
    norm_eps: float | None = None
    """Epsilon of batch norms; None: 0 for torchvision's published COCO_V1 ResNet-50 files, else 1e-5."""
    batch: int = 8
    """Frames in one call."""

    def identity(self) -> dict[str, Any]:
        """Return what could change a box by more than rounding, for tables and refusals."""
        facts = {
            "form": "detected",
            "network": self.network,
            "weights_sha256": file_sha256(self.weights),
            "hand": list(self.hand),
            "object": None if self.object is None else list(self.object),
        }
        names = ("min_score", "frames_per_second", "min_size_px", "max_size_px", "norm_eps")
        return facts | {name: getattr(self, name) for name in names}
