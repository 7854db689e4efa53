"""A torchvision detector with weights from a file: the boxes of hands and objects in frames.

Frames go in as the network wants them, RGB in 0..1; it resizes and normalises by itself. It gives up networks other
than Faster R-CNN and RetinaNet, and tracks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torchvision
from torch import nn

from mmkd.cache_tools.cache.fingerprints import file_sha256
from mmkd.cache_tools.frames.records import Float32Array, UInt8Array
from mmkd.data_manifests.errors import InputError
from mmkd.pipeline.detecting.detector_params import DetectorParams
from mmkd.pipeline.detections.records import HAND, OBJECT
from mmkd.student.checkpoints.checkpoint_file import read_state
from mmkd.student.checkpoints.fit import fit_of
from mmkd.student.training.devices import reproducible


@dataclass(frozen=True)
class Family:
    """What sets the networks of one architecture apart."""

    classifier: str
    """The parameter whose rows are the classes."""
    threshold: str
    """The argument for the lowest score."""
    first_class: int
    """Number of the first class that is something."""
    rows_per_class: int = 1
    """Rows of the classifier that each class has."""


FASTER_RCNN = Family("roi_heads.box_predictor.cls_score.weight", "box_score_thresh", 1)
RETINANET = Family("head.classification_head.cls_logits.weight", "score_thresh", 0, 9)
"""Its anchors: three sizes of three shapes at each place (Lin et al., "Focal Loss", ICCV 2017, section 4)."""
EPSILON_OF_0 = ("fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn")
"""Networks whose COCO_V1 file torchvision runs with an epsilon of 0 in its batch norms."""


def family_of(network: str) -> Family:
    """Return what a network's architecture is."""
    return RETINANET if network.startswith("retinanet") else FASTER_RCNN


@dataclass(frozen=True)
class FrameFindings:
    """The boxes of one frame, best first."""

    boxes: Float32Array
    """(B, 4) x1, y1, x2, y2 as parts of the frame's sides, 0..1."""
    categories: UInt8Array
    """(B,) 1 hand, 2 object."""
    scores: Float32Array
    """(B,) 0..1, above the threshold."""


class Detector:
    """A detector on a device."""

    def __init__(self, params: DetectorParams, device: torch.device) -> None:
        """Read its weights; InputError, naming the file, for those of another network, and for classes not in
        it."""
        self.params, self.device = params, device
        self.network, classes = _load(params)
        self.network.to(device).eval()
        self.category = _categories(params, classes)

    def find(self, frames: Sequence[UInt8Array]) -> list[FrameFindings]:
        """Return the boxes of frames (H, W, 3), RGB, in which the network is sure enough."""
        images = [torch.from_numpy(frame).to(self.device).permute(2, 0, 1) / 255 for frame in frames]
        with torch.no_grad(), reproducible(self.device):
            results = self.network(images)
        return [self._kept(result, frame.shape) for result, frame in zip(results, frames, strict=True)]

    def _kept(self, result: Mapping[str, torch.Tensor], shape: tuple[int, ...]) -> FrameFindings:
        """Return what is a hand or an object with a score above the threshold."""
        categories = self.category[result["labels"].cpu().numpy()]
        scores: Float32Array = result["scores"].cpu().numpy()
        sides = np.array([shape[1], shape[0]] * 2, np.float32)
        boxes: Float32Array = (result["boxes"].cpu().numpy() / sides).clip(0, 1).astype(np.float32)
        kept = (categories > 0) & np.isfinite(boxes).all(1) & (scores > self.params.min_score)
        return FrameFindings(boxes[kept], categories[kept], scores[kept].clip(0, 1))


def _categories(params: DetectorParams, classes: int) -> UInt8Array:
    """Return (classes,) what each of the network's classes is: 0 nothing, 1 hand, 2 object."""
    named = (*params.hand, *(params.object or ()))
    first = family_of(params.network).first_class
    if wrong := [number for number in named if not first <= number < classes]:
        raise InputError(
            f"class {wrong[0]} is not one of the detector's, which {params.weights} says are {first} to "
            f"{classes - 1}{' (0 is the background)' if first else ''}"
        )
    found = np.full(classes, OBJECT if params.object is None else 0, np.uint8)
    found[:first] = 0
    found[list(params.object or ())] = OBJECT
    found[list(params.hand)] = HAND
    return found


def _load(params: DetectorParams) -> tuple[nn.Module, int]:
    path, name = params.weights, params.network
    state = {key.removeprefix("module."): value for key, value in read_state(path).items()}
    family = family_of(name)
    if family.classifier not in state or len(state[family.classifier]) % family.rows_per_class:
        raise InputError(
            f"the weights {path} are not those of torchvision's {name}: they have no {family.classifier}"
        )
    classes = len(state[family.classifier]) // family.rows_per_class
    sizes = {"min_size": params.min_size_px, "max_size": params.max_size_px, family.threshold: params.min_score}
    network: nn.Module = torchvision.models.get_model(
        name,
        weights=None,
        weights_backbone=None,
        num_classes=classes,
        **{key: value for key, value in sizes.items() if value is not None},
    )
    if problems := fit_of(state, network.state_dict()).problems:
        raise InputError(f"the weights {path} are not those of torchvision's {name}: {problems}")
    network.load_state_dict(state, strict=False)
    _set_norm_eps(network, norm_eps_of(params))
    return network, classes


def norm_eps_of(params: DetectorParams) -> float | None:
    """Return the batch norm's epsilon: torchvision runs its first published ResNet-50 files with 0."""
    if params.norm_eps is not None or params.network not in EPSILON_OF_0:
        return params.norm_eps
    published = torchvision.models.get_model_weights(params.network).COCO_V1.url
    prefix = published.rsplit("-", 1)[1].removesuffix(".pth")
    return 0.0 if file_sha256(params.weights).startswith(prefix) else None


def _set_norm_eps(network: nn.Module, eps: float | None) -> None:
    for module in network.modules():
        if eps is not None and isinstance(module, nn.BatchNorm2d):
            module.eps = eps
