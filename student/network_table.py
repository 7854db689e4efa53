"""The networks by name: who builds each, and what it wants to see; one table, free of torch.

Normalisation, size and number of frames belong to a network: its published weights are worth their accuracy with
these numbers alone. Where torchvision publishes weights they are those of its `*_Weights` (a test compares them).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from typing import cast

from mmkd.data_manifests.counted import counted
from mmkd.data_manifests.errors import InputError

OWN_NETWORK = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
"""`module:factory`, which names a network outside the table."""


@dataclass(frozen=True)
class Normalisation:
    """What is subtracted from each channel's values, and what they are divided by then."""

    mean: tuple[float, ...]
    """Per channel, or one number for all; RGB in 0..1 (red, green, blue), flow in -1..1."""
    std: tuple[float, ...]
    """As `mean`; positive."""


IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Video Swin, VideoMAE, and all that was trained here before an expert's card could state its own."""
KINETICS = Normalisation((0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989))
"""torchvision's convolutional video networks."""
GREY = Normalisation((0.45, 0.45, 0.45), (0.225, 0.225, 0.225))
"""MViT, as all networks of the SlowFast code."""
DECIBELS = Normalisation((-28.1125,), (16.5627,))
"""Log-mel spectrograms, as the authors' code has it."""
AS_IT_IS = Normalisation((0.0,), (1.0,))
"""Flow, scaled and clipped to -1..1."""
DIFFERENCES = Normalisation((0.0,), (0.2,))
"""Differences of frames, which are small: five times as large."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """What is known of a network before it is built."""

    factory: str
    """`module:function` that builds its backbone, imported when it is called for."""
    normalisation: Normalisation = IMAGENET
    """Of RGB."""
    flow_normalisation: Normalisation = AS_IT_IS
    """Of flow that was scaled and clipped to -1..1."""
    size_px: int = 224
    """S, the side of the views that its weights were trained on."""
    frames: int = 16
    """T, the usual number of frames."""
    least_frames: int = 1
    """It cannot see fewer."""
    exact_frames: bool = False
    """Whether it takes `frames` frames and no other number."""
    least_size_px: int = 1
    """It cannot see smaller views."""
    exact_size: bool = False
    """Whether it takes views of `size_px` and no other side: its tables of positions are made for them."""
    drop_path: float | None = None
    """Stochastic depth of its last block, less before, linearly; None: it has none."""
    first_conv: str | None
    """The parameter that has the input's channels in its second dimension; None: the backbone's `first_conv`."""
    classifier: str | None = None
    """The module that maps features to classes, which our heads replace; None: the factory leaves it out."""
    million_parameters: float | None = None
    """With torchvision's classifier of 400 classes."""
    gmac: float | None = None
    """Billion multiplications and additions for a clip of that size."""
    kinetics_top1: float | None = None
    """Percent on Kinetics-400 of torchvision's weights, which a user may give by path; never downloaded."""


TORCHVISION = "mmkd.student.networks.torchvision_networks:torchvision_network"
SWIN3D_T = Network(
    factory=TORCHVISION,
    drop_path=0.2,  # the authors'; torchvision's is 0.1
    first_conv="patch_embed.proj.weight",
    classifier="head",
    million_parameters=28.2,
    gmac=43.9,
    kinetics_top1=77.7,
)
MVIT_V1_B = Network(
    factory=TORCHVISION,
    normalisation=GREY,
    exact_frames=True,
    exact_size=True,
    drop_path=0.2,
    first_conv="conv_proj.weight",
    classifier="head",
    million_parameters=36.6,
    gmac=70.6,
    kinetics_top1=78.5,
)
R3D_18 = Network(
    factory=TORCHVISION,
    normalisation=KINETICS,
    size_px=112,
    first_conv="stem.0.weight",
    classifier="fc",
    million_parameters=33.4,
    gmac=40.7,
    kinetics_top1=63.2,
)

NETWORKS: Mapping[str, Network] = {
    "small3d": Network(
        factory="mmkd.student.networks.small3d:small3d",
        size_px=48,
        frames=8,
        first_conv="layers.0.0.weight",
        million_parameters=0.7,
    ),
    "swin3d_t": SWIN3D_T,
    "swin3d_s": replace(SWIN3D_T, drop_path=0.1, million_parameters=49.8, gmac=82.8, kinetics_top1=79.5),
    "swin3d_b": replace(SWIN3D_T, drop_path=0.1, million_parameters=88.0, gmac=140.7, kinetics_top1=79.4),
    "mvit_v1_b": MVIT_V1_B,
    "mvit_v2_s": replace(MVIT_V1_B, million_parameters=34.5, gmac=64.2, kinetics_top1=80.8),
    "s3d": Network(
        factory=TORCHVISION,
        normalisation=KINETICS,
        least_frames=14,
        least_size_px=224,
        first_conv="features.0.0.0.weight",
        classifier="classifier",
        million_parameters=8.3,
        gmac=18.0,
        kinetics_top1=68.4,
    ),
    "r3d_18": R3D_18,
    "mc3_18": replace(R3D_18, million_parameters=11.7, gmac=43.3, kinetics_top1=64.0),
    "r2plus1d_18": replace(R3D_18, million_parameters=31.5, gmac=40.5, kinetics_top1=67.5),
    "tsm_resnet50": Network(
        factory="mmkd.student.networks.temporal_shift:tsm_resnet50",
        normalisation=Normalisation(IMAGENET.mean, IMAGENET.mean),  # so EPIC-KITCHENS' models were trained
        flow_normalisation=Normalisation((0.0,), (0.452,)),  # theirs is .5 and .226 of codes in 0..1
        frames=8,
        first_conv="conv1.weight",
        million_parameters=24.3,
        gmac=33.0,
    ),
}
"""Name in recipes -> network."""
TIMM_SHIFT = "tsm/"
"""Before the name of one of timm's 2D networks, which then sees time by shifts."""
TIMM_NAME = re.compile(r"tsm/[a-z]\w*")
TIMM_NETWORK = Network(
    factory="mmkd.student.networks.timm_shift:timm_shift",
    frames=8,
    first_conv=None,
)
"""Each of them."""


def known_network(name: str) -> Network:
    """Return a network of the table, or any tsm/MODEL; InputError names those that there are."""
    if TIMM_NAME.fullmatch(name):
        return TIMM_NETWORK
    if name not in NETWORKS:
        raise InputError(
            f"there is no network {name!r}; choose among {', '.join(NETWORKS)}, or name one of timm's as "
            "tsm/MODEL, or your own as module:factory"
        )
    return NETWORKS[name]


def is_own(name: str) -> bool:
    """Return whether a name has the form `module:factory`."""
    return OWN_NETWORK.fullmatch(name) is not None


def check_input(name: str, *, frames: int, size_px: int) -> None:
    """Raise InputError where a network of the table cannot see views of T frames and S x S pixels."""
    if is_own(name):
        return  # only its factory knows
    network = known_network(name)
    wants = None
    if network.exact_frames and frames != network.frames:
        wanted = network.frames
        wants = f"exactly {counted(wanted, 'frame')}, the views have {frames}; set views.frames={wanted}"
    elif frames < network.least_frames:
        wants = f"at least {counted(network.least_frames, 'frame')}, the views have {frames}; set views.frames"
    elif size_px < network.least_size_px:
        wants = f"views of at least {network.least_size_px} px, they have {size_px}; set views.size_px"
    elif network.exact_size and size_px != network.size_px:
        wants = f"views of {network.size_px} px, they have {size_px}; set views.size_px={network.size_px}"
    if wants is not None:
        raise InputError(f"network {name} takes {wants}, or choose another network")


def own_normalisation(name: str, modality: str) -> Normalisation:
    """Return what a network's input is normalised with; of one whose code does not say as Video Swin's.

    Raises InputError for code that cannot be imported, or states no numbers.
    """
    if modality == "rgb" and (stated := stated_in_code(name)):
        return stated
    if is_own(name):
        return before_it_was_stated(modality)
    network = known_network(name)
    own = {"rgb": network.normalisation, "flow": network.flow_normalisation}
    return own.get(modality) or before_it_was_stated(modality)


def stated_in_code(name: str) -> Normalisation | None:
    """Return the numbers that one of timm's networks, or one's own, states for RGB; None where none are stated."""
    if is_own(name):
        module, function = "own_networks", "factory_normalisation"
    elif name.startswith(TIMM_SHIFT):
        module, function = "timm_shift", "timm_normalisation"
    else:
        return None
    stated = getattr(import_module(f"mmkd.student.networks.{module}"), function)(name)
    return cast(Normalisation | None, stated)


def before_it_was_stated(modality: str) -> Normalisation:
    """Return what an expert or a run was normalised with whose files do not say."""
    return {"flow": AS_IT_IS, "audio": DECIBELS}.get(modality, IMAGENET)
