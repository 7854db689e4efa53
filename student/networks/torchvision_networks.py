"""torchvision's video networks as backbones: any number of input channels, features in place of classes.

Parameters keep torchvision's names, so that its published weights load. torchvision takes two seconds and 160 MiB
to import, which happens here alone, when such a network is built.
"""

from typing import cast

from torch import nn

from mmkd.student.network_table import NETWORKS


def torchvision_network(name: str, *, channels: int, frames: int, size_px: int) -> nn.Module:
    """Build a network of the table, which maps (B, C, T, S, S) to (B, `feature_count`) features."""
    from torchvision.models import video

    entry = NETWORKS[name]
    network = cast(nn.Module, getattr(video, name)(weights=None))
    take_classifier(network, cast(str, entry.classifier))
    set_channels(network, cast(str, entry.first_conv).removesuffix(".weight"), channels)
    return network


def take_classifier(network: nn.Module, name: str) -> None:
    """Replace the last layer of the classifier by the identity, and note its inputs as `feature_count`.

    What comes before it, such as dropout, stays. S3D's last layer is a convolution of 1 x 1 x 1 before a mean over
    positions; a linear layer after the mean gives the same.
    """
    classifier = getattr(network, name)
    inside = isinstance(classifier, nn.Sequential)
    last = classifier[-1] if inside else classifier
    features = last.in_channels if isinstance(last, nn.Conv3d) else cast(nn.Linear, last).in_features
    network.feature_count = cast(nn.Module, features)  # torch types every attribute so
    if inside:
        classifier[-1] = nn.Identity()
    else:
        setattr(network, name, nn.Identity())


def set_channels(network: nn.Module, path: str, channels: int) -> None:
    """Put a fresh convolution for another number of input channels in the place of the first one."""
    conv = cast(nn.Conv3d, network.get_submodule(path))
    if conv.in_channels == channels:
        return
    kernel, stride, padding = conv.kernel_size, conv.stride, conv.padding
    fresh = nn.Conv3d(channels, conv.out_channels, kernel, stride, padding, bias=conv.bias is not None)  # type: ignore[arg-type]  # torch types these as int tuples of any length
    above, _, name = path.rpartition(".")
    setattr(network.get_submodule(above), name, fresh)
