"""The blocks of a network, in order: what layer-wise decay counts, and what is recomputed to save memory."""

from torch import nn

LISTS = (nn.Sequential, nn.ModuleList)


def blocks(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return name and module of each block: the members of lists that are more than one layer, outermost first.

    So a transformer gives its layers, a ResNet its residual blocks, and a row of convolution, norm and activation
    within a list counts as one block. Torchvision's, timm's and our own networks are all built that way.
    """
    found: list[tuple[str, nn.Module]] = []
    _collect(network, "", False, found)
    return found


def _collect(module: nn.Module, prefix: str, listed: bool, found: list[tuple[str, nn.Module]]) -> None:
    for name, child in module.named_children():
        path, inner = f"{prefix}{name}", list(child.children())
        is_list = isinstance(child, LISTS)
        if listed and inner and not (is_list and any(list(layer.children()) for layer in inner)):
            found.append((path, child))
        else:
            _collect(child, f"{path}.", is_list, found)
