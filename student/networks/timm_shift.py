"""Any of timm's 2D networks that see time by shifting channels between frames, named tsm/MODEL: for edge devices.

The model stays timm's own, so that its published ImageNet weights load under their names; hooks fold a clip's
frames into the batch, shift the input of each residual branch (Lin et al., ICCV 2019; of inverted residuals those
with a skip connection alone, as in their MobileNetV2), and average the frames' features.
"""

from difflib import get_close_matches
from types import ModuleType
from typing import Any, cast

from torch import Tensor, nn

from mmkd.data_manifests.errors import InputError
from mmkd.student.network_table import TIMM_SHIFT, Normalisation
from mmkd.student.networks.temporal_shift import shifted

FIRST_CONVOLUTIONS = {
    "BasicBlock": "conv1",
    "Bottleneck": "conv1",
    "InvertedResidual": "conv_pw",
    "EdgeResidual": "conv_exp",
    "UniversalInvertedResidual": "pw_exp",
    "ConvNeXtBlock": "conv_dw",
}
"""timm's residual block -> the first convolution of its branch, whose input is shifted."""


class TemporalShift:
    """The hooks that turn a model of pictures into one of clips."""

    def __init__(self) -> None:
        """Begin before any clip has come."""
        self.frames = 1

    def fold(self, model: nn.Module, args: tuple[Tensor]) -> Tensor:
        """Return the frames (B * T, C, S, S) of clips (B, C, T, S, S)."""
        self.frames = args[0].shape[2]
        return args[0].transpose(1, 2).flatten(0, 1)

    def shift(self, convolution: nn.Module, args: tuple[Tensor]) -> Tensor:
        """Return a block's maps with an eighth of the channels of the next frame, and one of the last."""
        return shifted(args[0], self.frames)

    def average(self, model: nn.Module, args: tuple[Tensor], features: Tensor) -> Tensor:
        """Return the mean (B, F) of the features (B * T, F) of a clip's frames."""
        return features.reshape(-1, self.frames, features.shape[1]).mean(1)


def timm_shift(name: str, *, channels: int, frames: int, size_px: int) -> nn.Module:
    """Build timm's model behind tsm/MODEL, which maps (B, C, T, S, S) to (B, `feature_count`) features.

    Raises InputError for a model that timm does not have, or that has no block of which a shift is known.
    """
    timm, model_name = timm_model(name)
    model = timm.create_model(model_name, pretrained=False, num_classes=0, in_chans=channels)
    shift = TemporalShift()
    convolutions = [found for block in model.modules() if (found := first_convolution(block)) is not None]
    if not convolutions:
        known = ", ".join(FIRST_CONVOLUTIONS)
        raise InputError(f"network {name}: timm's {model_name} has no residual block that can be shifted ({known})")
    for convolution in convolutions:
        convolution.register_forward_pre_hook(shift.shift)
    model.register_forward_pre_hook(shift.fold)
    model.register_forward_hook(shift.average)
    model.feature_count = getattr(model, "head_hidden_size", None) or model.num_features
    model.first_conv = f"{model.pretrained_cfg['first_conv']}.weight"
    return cast(nn.Module, model)


def first_convolution(block: nn.Module) -> nn.Module | None:
    """Return the convolution before which a residual block is shifted; None for any other module."""
    if not getattr(block, "has_skip", True):
        return None
    found = getattr(block, FIRST_CONVOLUTIONS.get(type(block).__name__, ""), None)
    found = getattr(found, "conv", found)  # of a convolution with its norm
    return found if isinstance(found, nn.Conv2d) else None


def timm_normalisation(name: str) -> Normalisation:
    """Return what timm's published weights of tsm/MODEL ask for; raises as `timm_shift`."""
    timm, model_name = timm_model(name)
    numbers: dict[str, Any] = timm.get_pretrained_cfg(model_name).to_dict()
    return Normalisation(tuple(numbers["mean"]), tuple(numbers["std"]))


def timm_model(name: str) -> tuple[ModuleType, str]:
    """Return timm and the model that tsm/MODEL names; InputError where either is absent."""
    model_name = name.removeprefix(TIMM_SHIFT)
    try:
        import timm
    except ImportError as error:
        raise InputError(
            f"network {name} needs timm, which cannot be imported ({error}): pip install 'mmkd[timm]'"
        ) from error
    if not timm.is_model(model_name):
        near = ", ".join(get_close_matches(model_name, timm.list_models(), n=5, cutoff=0.7))
        raise InputError(f"network {name}: timm has no model {model_name!r}" + (f"; it has {near}" if near else ""))
    return timm, model_name
