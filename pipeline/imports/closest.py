"""Which of our networks a checkpoint is closest to, for the error about one that it does not fit."""

import torch
from torch import Tensor

from mmkd.student.network_table import NETWORKS
from mmkd.student.networks.networks import build_backbone


def closest_network(state: dict[str, Tensor], channels: int) -> tuple[str, int, int]:
    """Return (network, how many of its parameters are in a file by name and size, how many it has)."""
    shapes = {name: value.shape for name, value in state.items()}
    found: list[tuple[float, str, int, int]] = []
    for name in NETWORKS:
        with torch.device("meta"):  # sizes alone: no memory, no draws
            own = build_backbone(name, channels=channels).state_dict()
        agreeing = sum(shapes.get(key) == value.shape for key, value in own.items())
        found.append((agreeing / len(own), name, agreeing, len(own)))
    _, name, agreeing, count = max(found)
    return name, agreeing, count


def closest_line(state: dict[str, Tensor], network: str, channels: int) -> str:
    """Return the end of an error: the closest network, or that none is close."""
    name, agreeing, count = closest_network(state, channels)
    if agreeing * 2 < count:
        return "no network here is close to it"
    told = "that is the closest one" if name == network else f"the closest is {name}: name it with --network"
    return f"{told} ({agreeing} of its {count} parameters agree)"
