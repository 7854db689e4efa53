"""The video networks by name, their heads, and the step from stored pixels or flow to a network's input.

A network is a backbone that pools a clip to one feature vector, and one linear head per label space. The
loop and the losses see `VideoClassifier` alone: a dict of arrays in, a dict of float32 logits out. Nothing
here downloads weights: a user hands over a file, from which everything but the classifier must be used. Which
networks there are is a table, mmkd.student.network_table.
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from mmkd.data_manifests.errors import InputError
from mmkd.student.augment.augment import NO_AUGMENT, augment_of
from mmkd.student.network_table import Normalisation, before_it_was_stated, check_input, is_own, known_network
from mmkd.student.networks.own_networks import DictNetwork, build_own, check_logits
from mmkd.student.networks.pretrained import load_backbone
from mmkd.student.networks.seen import Downscale, differences
from mmkd.student.recipes.train import TrainRecipe

USUAL_FRAMES, USUAL_SIZE_PX = 16, 224
"""What a network of one's own is built for where no view says so."""
CHANNELS = {"rgb": 3, "flow": 2, "audio": 3}
"""Input channels of a network by modality; flow has the horizontal component first, positive to the right."""


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
    frames: int | None = None,
    size_px: int | None = None,
    weights: Path | None = None,
    drop_path: float | None = None,
) -> HeadedNetwork:
    """Build a network of the table for clips (B, channels, frames, size_px, size_px), by default its usual ones.

    With `weights`, its backbone starts from that file (see `load_backbone`). Raises InputError for clips that it
    cannot see.
    """
    entry = known_network(name)
    if not heads:
        raise InputError("a network needs at least one head")
    if drop_path and entry.drop_path is None:
        raise InputError(f"network {name!r} has no stochastic depth: leave drop_path out (it is {drop_path})")
    backbone = build_backbone(name, channels=channels, frames=frames, size_px=size_px)
    if entry.drop_path is not None:
        set_drop_path(backbone, entry.drop_path if drop_path is None else drop_path)
    if weights is not None:
        load_backbone(backbone, weights, first_conv=entry.first_conv or cast(str, backbone.first_conv))
    return HeadedNetwork(backbone, heads)


def build_backbone(name: str, *, channels: int, frames: int | None = None, size_px: int | None = None) -> nn.Module:
    """Build the backbone of a network of the table; raises as `headed_network`."""
    entry = known_network(name)
    frames, size_px = frames or entry.frames, size_px or entry.size_px
    check_input(name, frames=frames, size_px=size_px)
    module, _, function = entry.factory.partition(":")
    factory = getattr(import_module(module), function)
    return cast(nn.Module, factory(name, channels=channels, frames=frames, size_px=size_px))


def own_network(
    recipe: TrainRecipe, *, heads: Mapping[str, int], channels: int, frames: int | None, size_px: int | None
) -> nn.Module:
    """Build a network that is not in the table, tried once on a clip of zeros."""
    name, frames, size_px = recipe.network, frames or USUAL_FRAMES, size_px or USUAL_SIZE_PX
    if recipe.drop_path:
        raise InputError(f"network {name}: drop_path is for networks of the table; give it in network_options")
    built = build_own(
        name,
        heads=heads,
        channels=channels,
        frames=frames,
        size_px=size_px,
        options=recipe.network_options,
        weights=recipe.weights,
    )
    network = HeadedNetwork(built, heads) if hasattr(built, "feature_count") else DictNetwork(built)
    check_logits(name, network, torch.zeros(1, channels, frames, size_px, size_px), heads)
    return network


def set_drop_path(network: nn.Module, rate: float) -> None:
    """Give the last block stochastic depth `rate`, and those before it less, linearly, the first none."""
    from torchvision.ops import StochasticDepth

    blocks = [module for module in network.modules() if isinstance(module, StochasticDepth)]
    for number, block in enumerate(blocks):
        block.p = rate * number / (len(blocks) - 1)


class VideoClassifier(nn.Module):
    """A network with the preparation of its input: from canonical views or flow to logits."""

    def __init__(
        self,
        network: nn.Module,
        modality: str,
        *,
        normalisation: Normalisation | None = None,
        flow_scale_px: float = 20.0,
        augment: Callable[[Tensor, Tensor], Tensor] = NO_AUGMENT,
        size_px: int = USUAL_SIZE_PX,
        every: int = 1,
        downscale: nn.Module | None = None,
        of_differences: bool = False,
    ) -> None:
        """Wrap a network for a modality.

        `normalisation` is by default ImageNet's for RGB, and none for flow. `flow_scale_px` is the flow in pixels
        per step that maps to 1; larger keeps fast motion and loses resolution of slow motion (I3D: 20). In training
        mode `augment` maps RGB clips (B, 3, T, S, S) in 0..1, and the mean, to changed ones. Of RGB it can leave
        out frames (`every` k-th stays), `downscale` the others, and take differences of frames in their place.
        """
        super().__init__()
        if modality not in CHANNELS:
            raise InputError(f"modality {modality!r} has no video network; it must be rgb, flow or audio")
        if flow_scale_px <= 0:
            raise InputError(f"flow_scale_px must be positive, got {flow_scale_px}")
        self.network = network
        self.modality = modality
        self.flow_scale_px = flow_scale_px
        self.augment = augment
        self.size_px = size_px
        self.every, self.downscale, self.of_differences = every, downscale, of_differences
        self.set_normalisation(normalisation or before_it_was_stated(modality))

    def set_normalisation(self, normalisation: Normalisation) -> None:
        """Take other numbers; InputError unless there is one for each channel, or one for all."""
        self.normalisation = normalisation
        for name, values in (("mean", normalisation.mean), ("std", normalisation.std)):
            if len(values) not in (1, CHANNELS[self.modality]):
                raise InputError(
                    f"normalisation.{name} has {len(values)} numbers; {self.modality} has "
                    f"{CHANNELS[self.modality]} channels: give one for each, or one for all"
                )
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1, 1), persistent=False)

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Map {"rgb": uint8 (B, T, S, S, 3)} or {"flow": float32 (B, T, 2, S, S)} to logits per head."""
        prepare = {"rgb": self.prepare_rgb, "flow": self.prepare_flow, "audio": self.prepare_audio}[self.modality]
        return cast(dict[str, Tensor], self.network(prepare(inputs[self.modality])))

    def prepare_rgb(self, frames: Tensor) -> Tensor:
        """Augment (in training) and normalise frames (B, T, S, S, 3) in 0..255 to (B, 3, T, S, S).

        They are uint8, or float where views were mixed. What the recipe's `input` and `stem` say comes before and
        after that.
        """
        clips = frames[:, :: self.every].permute(0, 4, 1, 2, 3).float() / 255
        if self.downscale is not None:
            clips = self.downscale(clips)
        if self.training:
            clips = self.augment(clips, cast(Tensor, self.mean))
        clips = self.normalised(clips)
        return differences(clips) if self.of_differences else clips

    def prepare_flow(self, flow_px: Tensor) -> Tensor:
        """Scale and clip flow (B, T, 2k, S, S) in pixels per step to [-1, 1], and normalise it, as (B, 2k, T, S,
        S)."""
        return self.normalised((flow_px.transpose(1, 2) / self.flow_scale_px).clamp(-1, 1))

    def prepare_audio(self, decibels: Tensor) -> Tensor:
        """Normalise spectrograms (B, T, mels, columns) and stretch them to pictures (B, 3, T, S, S) of equal
        channels.

        Rows and columns are repeated or left out, as the authors' code does.
        """
        size = (self.size_px, self.size_px)
        pictures = nn.functional.interpolate(decibels, size=size)
        return self.normalised(pictures[:, None].expand(-1, CHANNELS["audio"], -1, -1, -1))

    def normalised(self, clips: Tensor) -> Tensor:
        """Subtract the mean from clips (B, C, T, S, S), and divide them by the standard deviation."""
        return (clips - cast(Tensor, self.mean)) / cast(Tensor, self.std)


def build_network(
    recipe: TrainRecipe,
    *,
    heads: Mapping[str, int],
    modality: str,
    frames: int | None = None,
    size_px: int | None = None,
    flow_stack: int = 1,
    normalisation: Normalisation | None = None,
) -> VideoClassifier:
    """Build the recipe's network for rgb or flow, with initial weights from `recipe.seed` (or its file).

    It sees views of `frames` frames of `size_px` x `size_px` (by default the network's usual ones), normalised as
    the recipe or else the network says; one that is trained already hands over the `normalisation` that it was
    trained with. The same recipe, heads and modality give the same weights, whatever was drawn before.
    """
    channels = CHANNELS.get(modality, 3) * (flow_stack if modality == "flow" else 1)
    shape: dict[str, Any] = {"channels": channels, "frames": frames, "size_px": size_px}
    downscale = None
    if recipe.input is not None:
        of_view = frames or usual(recipe.network)[0], size_px or usual(recipe.network)[1]
        shape["frames"], shape["size_px"] = recipe.seen_shape(*of_view)
        downscale = Downscale(of_view[1], shape["size_px"]) if recipe.input.size_px else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        if is_own(recipe.network):
            network = own_network(recipe, heads=heads, **shape)
        else:
            drop_path, weights = recipe.drop_path, recipe.weights
            network = headed_network(recipe.network, heads=heads, **shape, weights=weights, drop_path=drop_path)
    augment: Callable[[Tensor, Tensor], Tensor] = augment_of(recipe)
    if recipe.compile:  # groups of clips that are drawn have other shapes at each step: none is worth compiling
        augment = torch.compiler.disable(augment)  # type: ignore[no-untyped-call]  # torch leaves it unannotated
    return VideoClassifier(
        network,
        modality,
        normalisation=normalisation or recipe.normalised(modality),
        flow_scale_px=recipe.flow_scale_px,
        augment=augment,
        size_px=size_px or usual(recipe.network)[1],
        every=1 if recipe.input is None else recipe.input.every,
        downscale=downscale,
        of_differences=recipe.stem == "differences",
    )


def usual(name: str) -> tuple[int, int]:
    """Return T and S that a network is built for where no view says so."""
    if is_own(name):
        return USUAL_FRAMES, USUAL_SIZE_PX
    entry = known_network(name)
    return entry.frames, entry.size_px
