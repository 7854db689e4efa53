"""The video networks by name, their heads, and the step from stored pixels or flow to a network's input.

A network is a backbone that pools a clip to one feature vector, and one linear head per label space. The
loop and the losses see `VideoClassifier` alone: a dict of arrays in, a dict of float32 logits out. Nothing
here downloads weights: a user hands over a file, from which everything but the classifier must be used.
torchvision takes two seconds and 160 MiB to import: only its own networks do so.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from mmkd.data_manifests.errors import InputError
from mmkd.student.networks.jitter import NO_JITTER, Jitter, jitter_clips
from mmkd.student.networks.pretrained import load_backbone
from mmkd.student.recipe import TrainRecipe

CHANNELS = {"rgb": 3, "flow": 2}
"""Input channels of a network by modality; flow has the horizontal component first, positive to the right."""

RGB_MEAN = (0.485, 0.456, 0.406)
"""ImageNet mean per channel, of values in 0..1; what the authors' code uses for RGB."""
RGB_STD = (0.229, 0.224, 0.225)
"""ImageNet standard deviation per channel."""
SWIN_DROP_PATH = 0.2
"""Stochastic depth of the last block in the authors' recipe; earlier blocks less, linearly."""
SMALL3D_DROPOUT = 0.2


class Small3D(nn.Module):
    """A small 3D convolutional backbone for clips of about 8 frames of 48 x 48: the demo's network.

    Its first two layers see five frames at a stride of one, so that motion of a few pixels per frame is
    visible before time is subsampled. It gives up accuracy on real footage: use swin3d_t there.
    """

    feature_count = 128

    def __init__(self, channels: int, *, dropout: float = SMALL3D_DROPOUT) -> None:
        """Take clips of `channels` channels; `dropout` is the share of pooled features zeroed in training."""
        super().__init__()
        self.layers = nn.Sequential(
            conv_norm_relu(channels, 16, kernel=(3, 5, 5), stride=(1, 2, 2)),
            conv_norm_relu(16, 32, kernel=(3, 3, 3), stride=(2, 2, 2)),
            conv_norm_relu(32, 64, kernel=(3, 3, 3), stride=(1, 2, 2)),
            Residual(64, kernel=(3, 3, 3)),
            conv_norm_relu(64, 128, kernel=(3, 3, 3), stride=(2, 2, 2)),
            Residual(128, kernel=(1, 3, 3)),
        )
        self.dropout = nn.Dropout(dropout)
        self.to(memory_format=torch.channels_last_3d)  # a fifth faster on CPU than channels first

    def forward(self, clips: Tensor) -> Tensor:
        """Map clips (B, C, T, S, S) to features (B, 128)."""
        maps = self.layers(clips.contiguous(memory_format=torch.channels_last_3d))
        return cast(Tensor, self.dropout(maps.mean((2, 3, 4))))


class Residual(nn.Module):
    """ReLU(x + norm(conv(x))) at constant width and resolution."""

    def __init__(self, width: int, *, kernel: tuple[int, int, int]) -> None:
        """Use one convolution with an odd `kernel` (time, height, width)."""
        super().__init__()
        self.conv = nn.Conv3d(width, width, kernel, padding=half(kernel), bias=False)
        self.norm = nn.BatchNorm3d(width)

    def forward(self, maps: Tensor) -> Tensor:
        """Map (B, W, T, H, W) to the same shape."""
        return torch.relu(maps + self.norm(self.conv(maps)))


def conv_norm_relu(
    inputs: int, outputs: int, *, kernel: tuple[int, int, int], stride: tuple[int, int, int]
) -> nn.Sequential:
    """Return convolution without bias, batch norm, ReLU."""
    conv = nn.Conv3d(inputs, outputs, kernel, stride=stride, padding=half(kernel), bias=False)
    return nn.Sequential(conv, nn.BatchNorm3d(outputs), nn.ReLU(inplace=True))


def half(kernel: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return the padding that keeps the size at stride 1 for an odd kernel."""
    return kernel[0] // 2, kernel[1] // 2, kernel[2] // 2


def small3d(channels: int, drop_path: float | None) -> Small3D:
    """Build `Small3D`; it has no stochastic depth."""
    refuse_drop_path("small3d", drop_path)
    return Small3D(channels)


def swin3d_tiny(channels: int, drop_path: float | None) -> nn.Module:
    """Build Video Swin-T (patch 2 x 4 x 4, window 8 x 7 x 7) of torchvision, pooled to 768 features."""
    from torchvision.models.video.swin_transformer import SwinTransformer3d

    network = SwinTransformer3d(
        patch_size=[2, 4, 4],
        embed_dim=96,
        depths=[2, 2, 6, 2],
        num_heads=[3, 6, 12, 24],
        window_size=[8, 7, 7],
        stochastic_depth_prob=SWIN_DROP_PATH if drop_path is None else drop_path,
    )
    network.feature_count = network.head.in_features
    network.head = nn.Identity()
    network.patch_embed.proj = with_channels(network.patch_embed.proj, channels)
    return cast(nn.Module, network)


def resnet3d_18(channels: int, drop_path: float | None) -> nn.Module:
    """Build the 18-layer 3D ResNet of torchvision, pooled to 512 features; it has no stochastic depth."""
    refuse_drop_path("r3d_18", drop_path)
    from torchvision.models.video import r3d_18

    network = r3d_18(weights=None)
    network.feature_count = network.fc.in_features
    network.fc = nn.Identity()
    network.stem[0] = with_channels(network.stem[0], channels)
    return cast(nn.Module, network)


def refuse_drop_path(name: str, drop_path: float | None) -> None:
    """Raise InputError when stochastic depth is asked of a network that has none."""
    if drop_path:
        raise InputError(f"network {name!r} has no stochastic depth: leave drop_path out (it is {drop_path})")


def with_channels(conv: nn.Conv3d, channels: int) -> nn.Conv3d:
    """Return `conv`, or a fresh one like it for another number of input channels."""
    if conv.in_channels == channels:
        return conv
    kernel, stride, padding = conv.kernel_size, conv.stride, conv.padding
    return nn.Conv3d(channels, conv.out_channels, kernel, stride, padding, bias=conv.bias is not None)  # type: ignore[arg-type]  # torch types these as int tuples of any length


Backbone = Callable[[int, float | None], nn.Module]

NETWORKS: dict[str, Backbone] = {"small3d": small3d, "swin3d_t": swin3d_tiny, "r3d_18": resnet3d_18}
"""(input channels, drop path or None for the network's own) -> a backbone with `feature_count` features."""

FIRST_CONV = {
    "small3d": "layers.0.0.weight",
    "swin3d_t": "patch_embed.proj.weight",
    "r3d_18": "stem.0.weight",
}
"""The parameter that is averaged over RGB when weights are loaded for two-channel flow."""


class HeadedNetwork(nn.Module):
    """A backbone and one linear head per label space."""

    def __init__(self, backbone: nn.Module, heads: Mapping[str, int]) -> None:
        """Put heads of the given numbers of classes on the backbone's `feature_count` pooled features."""
        super().__init__()
        self.backbone = backbone
        features = cast(int, backbone.feature_count)
        self.heads = nn.ModuleDict({name: nn.Linear(features, classes) for name, classes in heads.items()})

    def forward(self, clips: Tensor) -> dict[str, Tensor]:
        """Map clips (B, C, T, S, S) to float32 logits (B, classes) per head, under autocast too."""
        features = self.backbone(clips)
        with torch.autocast(features.device.type, enabled=False):
            return {name: head(features.float()) for name, head in self.heads.items()}


def headed_network(
    name: str,
    *,
    heads: Mapping[str, int],
    channels: int,
    weights: Path | None = None,
    drop_path: float | None = None,
) -> HeadedNetwork:
    """Build a network by name; with `weights`, start its backbone from that file (see `load_backbone`)."""
    if name not in NETWORKS:
        raise InputError(f"there is no network {name!r}; choose among {', '.join(NETWORKS)}")
    if not heads:
        raise InputError("a network needs at least one head")
    backbone = NETWORKS[name](channels, drop_path)
    if weights is not None:
        load_backbone(backbone, weights, first_conv=FIRST_CONV[name])
    return HeadedNetwork(backbone, heads)


class VideoClassifier(nn.Module):
    """A network with the preparation of its input: from canonical views or flow to logits."""

    def __init__(
        self,
        network: HeadedNetwork,
        modality: str,
        *,
        flow_scale_px: float = 20.0,
        jitter: Jitter = NO_JITTER,
    ) -> None:
        """Wrap a network for a modality.

        `flow_scale_px` is the flow in pixels per step that maps to 1; larger keeps fast motion and loses
        resolution of slow motion (I3D: 20). `jitter` is applied to RGB in training mode only.
        """
        super().__init__()
        if modality not in CHANNELS:
            raise InputError(f"modality {modality!r} has no video network; it must be rgb or flow")
        if flow_scale_px <= 0:
            raise InputError(f"flow_scale_px must be positive, got {flow_scale_px}")
        self.network = network
        self.modality = modality
        self.flow_scale_px = flow_scale_px
        self.jitter = jitter
        self.register_buffer("mean", torch.tensor(RGB_MEAN).view(1, 3, 1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(RGB_STD).view(1, 3, 1, 1, 1), persistent=False)

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Map {"rgb": uint8 (B, T, S, S, 3)} or {"flow": float32 (B, T, 2, S, S)} to logits per head."""
        clips = self.prepare_rgb(inputs["rgb"]) if self.modality == "rgb" else self.prepare_flow(inputs["flow"])
        return cast(dict[str, Tensor], self.network(clips))

    def prepare_rgb(self, frames: Tensor) -> Tensor:
        """Jitter (in training) and normalise uint8 frames (B, T, S, S, 3) to (B, 3, T, S, S)."""
        clips = frames.permute(0, 4, 1, 2, 3).float() / 255
        if self.training:
            clips = jitter_clips(clips, self.jitter)
        return (clips - cast(Tensor, self.mean)) / cast(Tensor, self.std)

    def prepare_flow(self, flow_px: Tensor) -> Tensor:
        """Scale and clip flow (B, T, 2k, S, S) in pixels per step to [-1, 1] as (B, 2k, T, S, S)."""
        return (flow_px.transpose(1, 2) / self.flow_scale_px).clamp(-1, 1)


def build_network(
    recipe: TrainRecipe, *, heads: Mapping[str, int], modality: str, flow_stack: int = 1
) -> VideoClassifier:
    """Build the recipe's network for rgb or flow, with initial weights from `recipe.seed` (or its file).

    The same recipe, heads and modality give the same weights, whatever was drawn before.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        network = headed_network(
            recipe.network,
            heads=heads,
            channels=CHANNELS.get(modality, 3) * (flow_stack if modality == "flow" else 1),
            weights=recipe.weights,
            drop_path=recipe.drop_path,
        )
    jitter = Jitter(**recipe.jitter.model_dump())
    return VideoClassifier(network, modality, flow_scale_px=recipe.flow_scale_px, jitter=jitter)
