"""How flow files are named and numbered, as denseflow, EPIC's furnari-flow and mmaction2 do; free of torch."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Axis = Literal["x", "y"]


@dataclass(frozen=True)
class FlowName:
    """What the name of a flow file says."""

    axis: Axis
    """`x` horizontal, `y` vertical."""
    number: int
    """Number of the pair, from 0 in denseflow (its first frame), from 1 elsewhere."""
    step: int = 1
    """Frames from a pair's first frame to its second; only denseflow's names tell, negative is backwards."""


def denseflow_name(name: FlowName) -> str:
    """Return e.g. `flow_x_00000.jpg`, for step 2 `flow_x_p2_00000.jpg`, for step -1 `flow_x_m1_00001.jpg`.

    `writeFlowImages` of denseflow's common.cpp.
    """
    sign = f"p{name.step}_" if name.step > 1 else f"m{-name.step}_" if name.step < 0 else ""
    return f"flow_{name.axis}_{sign}{name.number:05d}.jpg"


def epic_name(name: FlowName) -> str:
    """Return e.g. `u/frame_0000000001.jpg`."""
    return f"{'u' if name.axis == 'x' else 'v'}/frame_{name.number:010d}.jpg"


def mmaction_name(name: FlowName) -> str:
    """Return e.g. `x_00001.jpg`."""
    return f"{name.axis}_{name.number:05d}.jpg"


def parse_denseflow_name(text: str) -> FlowName | None:
    """Invert `denseflow_name`; None for any other text."""
    found = re.fullmatch(r"flow_([xy])_(?:([pm])(\d+)_)?(\d{5,})\.jpg", text, re.ASCII)
    if found is None:
        return None
    axis, sign, step, number = found.groups()
    name = FlowName(_axis(axis), int(number), int(step or 1) * (-1 if sign == "m" else 1))
    return name if denseflow_name(name) == text else None


def parse_epic_name(text: str) -> FlowName | None:
    """Invert `epic_name`; None for any other text."""
    found = re.fullmatch(r"([uv])/frame_(\d{10,})\.jpg", text, re.ASCII)
    if found is None:
        return None
    name = FlowName("x" if found[1] == "u" else "y", int(found[2]))
    return name if epic_name(name) == text else None


def parse_mmaction_name(text: str) -> FlowName | None:
    """Invert `mmaction_name`; None for any other text."""
    found = re.fullmatch(r"([xy])_(\d{5,})\.jpg", text, re.ASCII)
    if found is None:
        return None
    name = FlowName(_axis(found[1]), int(found[2]))
    return name if mmaction_name(name) == text else None


def _axis(letter: str) -> Axis:
    return "x" if letter == "x" else "y"


NAMES: dict[str, tuple[Callable[[FlowName], str], Callable[[str], FlowName | None]]] = {
    "denseflow": (denseflow_name, parse_denseflow_name),
    "epic": (epic_name, parse_epic_name),
    "mmaction": (mmaction_name, parse_mmaction_name),
}
"""Layouts of JPEG folders: layout -> (name, parse)."""
LAYOUTS = (*NAMES, "i3d", "hdf5")
"""All layouts that `mmkd-cache flow` writes."""


def pair_number(layout: str, pair: int, step: int) -> int:
    """Return the number in the file name of a sequence's `pair` (from 0): denseflow counts its first frame."""
    return pair + max(0, -step) if layout == "denseflow" else pair + 1


def pair_of_number(layout: str, number: int, step: int) -> int:
    """Invert `pair_number`."""
    return number - max(0, -step) if layout == "denseflow" else number - 1
