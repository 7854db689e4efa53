"""Curves of one or several trainings as a picture: loss, held-out top-1, learning rate and clips per second.

Lines are named where they end, in their own colour; the colours are those of Okabe and Ito (2008), which stay apart
for people who see red and green alike, without the two that are too light for a name. What is drawn is what
`mmkd-student show --csv` writes.
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmkd.data_manifests.atomic import write_atomically
from mmkd.data_manifests.errors import InputError
from mmkd.data_manifests.kinds import CURVES, CURVES_MARK, refuse_another
from mmkd.student.looking.history import History

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MISSING = "a picture needs the package matplotlib: pip install 'mmkd[plots]'; --csv needs nothing more"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9")
DASHES = ("solid", (0, (5, 1.5)), (0, (1, 1)))
"""Of the first six lines, of the next six, and of those after."""
INK, FAINT = "#333333", "#DDDDDD"
SIZE_INCHES, DOTS_PER_INCH = (11.0, 7.0), 150
ROW_HEIGHTS = (3, 2)
FEW_EPOCHS = 12
"""Up to so many every epoch has a dot."""
LINE_INCHES = 0.16
"""From one name in the margin to the next."""
NAME_CHARACTERS = 30
"""A longer name loses its beginning in the picture."""
LOG_FROM = 30.0
"""The loss has a logarithmic axis where its largest value is so many times the smallest."""


@dataclass(frozen=True)
class Curve:
    """One line of one panel."""

    label: str
    """What stands at its end."""
    style: int
    """Number of its colour and dashes: a training has the same in all panels."""
    epochs: Sequence[int]
    """Counted from 1."""
    values: Sequence[float]
    """One for each."""
    best: bool = False
    """Whether its largest value is marked."""


@dataclass(frozen=True)
class Panel:
    """One set of axes."""

    title: str
    """What is shown, with its unit."""
    curves: Sequence[Curve]
    """Its lines."""
    from_zero: bool = False
    """Whether the axis begins at 0."""
    log: bool = False
    """Whether it is logarithmic."""


def write_curves(path: Path, histories: Sequence[History]) -> None:
    """Draw the histories into a PNG file; raises as `check_picture`, InputError where no epoch is finished."""
    check_picture(path)
    if not any(history.metrics for history in histories):
        raise InputError("no epoch is finished yet, so there is nothing to draw")
    write_atomically(path, png(draw(histories)))


def check_picture(path: Path) -> None:
    """Raise InputError without matplotlib, for a name that is not a PNG's, and over another program's file."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise InputError(MISSING) from error
    if path.suffix.lower() != ".png":
        raise InputError(f"{path}: the picture is a PNG file; name it *.png")
    refuse_another(path, CURVES)


def png(figure: "Figure") -> bytes:
    """Return a figure as the bytes of a PNG file, which depend on what is drawn alone."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH, metadata={"Software": CURVES_MARK})
    return buffer.getvalue()


def panels(histories: Sequence[History]) -> list[Panel]:
    """Return what is drawn: three panels, and held-out top-1 where some training has it."""
    named = len(histories) > 1
    rates = [values.learning_rate for history in histories for values in history.metrics]
    exponent = math.floor(math.log10(max(rates))) if max(rates, default=0) > 0 else 0
    unit = "" if -2 <= exponent <= 2 else f", in units of $10^{{{exponent}}}$"
    scale = 1.0 if not unit else 10.0**exponent
    losses = [v for history in histories for values in history.metrics if (v := values.loss) == v]
    log = bool(losses) and min(losses) > 0 and max(losses) > LOG_FROM * min(losses)

    def curves(field: str, divisor: float = 1.0) -> list[Curve]:
        return [
            Curve(
                history.name if named else "",
                owner,
                [values.epoch + 1 for values in history.metrics],
                [getattr(values, field) / divisor for values in history.metrics],
            )
            for owner, history in enumerate(histories)
            if history.metrics
        ]

    found = [Panel("Training loss, mean over an epoch's clips", curves("loss"), log=log)]
    if held_out := held_out_curves(histories):
        found.append(Panel("Top-1 on held-out clips, % (ring and number: the best epoch)", held_out))
    found.append(Panel(f"Learning rate at an epoch's end{unit}", curves("learning_rate", scale), from_zero=True))
    found.append(Panel("Clips per second", curves("clips_per_second"), from_zero=True))
    return found


def held_out_curves(histories: Sequence[History]) -> list[Curve]:
    """Return the held-out top-1 in percent of each training and head."""
    heads = {head for history in histories for head in history.heads()}
    found: list[Curve] = []
    for owner, history in enumerate(histories):
        for head in history.heads():
            epochs, values = zip(*history.held_out_top1(head), strict=True)
            names = [history.name] * (len(histories) > 1) + [head] * (len(heads) > 1)
            number = owner if len(histories) > 1 else len(found)
            percents = [100 * value for value in values]
            label = f"{' '.join(names)} {max(percents):.1f}" if names else ""
            found.append(Curve(label, number, epochs, percents, best=True))
    return found


def draw(histories: Sequence[History]) -> "Figure":
    """Return the picture."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    found = panels(histories)
    figure = Figure(figsize=SIZE_INCHES, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    places = "ab;cd" if len(found) == 4 else "aa;bc"
    axes = list(figure.subplot_mosaic(places, height_ratios=list(ROW_HEIGHTS)).values())
    last = max(epoch for panel in found for curve in panel.curves for epoch in curve.epochs)
    for panel, own in zip(found, axes, strict=True):
        row = 0 if own not in axes[-2:] else 1
        _dress(own, panel, last)
        for curve in panel.curves:
            _draw_curve(own, curve)
        if panel.from_zero:
            own.set_ylim(bottom=0)
        _name_ends(own, panel, 0.8 * SIZE_INCHES[1] * ROW_HEIGHTS[row] / sum(ROW_HEIGHTS))
    for own in axes[-2:]:
        own.set_xlabel("epoch", color=INK)
    if len(histories) == 1:
        title = f"{histories[0].name}: {histories[0].kind}, {histories[0].state}"
        figure.suptitle(title, color=INK, x=0.01, ha="left", parse_math=False)
    return figure


def style(number: int) -> dict[str, Any]:
    """Return colour and dashes of the n-th training."""
    dashes = DASHES[min(number // len(COLOURS), len(DASHES) - 1)]
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": dashes}


def _dress(axes: "Axes", panel: Panel, last: int) -> None:
    """Leave of the axes what is needed to read a value."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_title(panel.title, loc="left", color=INK, fontsize=11)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(INK)
    axes.grid(axis="y", color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=INK, length=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.set_xlim(0.5 if last < 2 else 1, max(last, 1.5))
    if panel.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _draw_curve(axes: "Axes", curve: Curve) -> None:
    marker = "o" if len(curve.epochs) <= FEW_EPOCHS else ""
    axes.plot(
        curve.epochs, curve.values, linewidth=1.8, marker=marker, markersize=4, clip_on=False, **style(curve.style)
    )
    if curve.best:
        best = max(range(len(curve.values)), key=lambda place: curve.values[place])
        at = curve.epochs[best], curve.values[best]
        colour = str(style(curve.style)["color"])
        axes.plot(*at, "o", color=colour, markersize=7, markerfacecolor="white", markeredgewidth=1.8, clip_on=False)
        if not curve.label:
            axes.annotate(f"{at[1]:.1f}", at, (0, 7), textcoords="offset points", ha="center", color=colour)


def _name_ends(axes: "Axes", panel: Panel, size_inches: float) -> None:
    """Write each line's name in the margin, at the height of its end; names of lines that meet are stacked."""
    curves = [curve for curve in panel.curves if curve.label]
    if not curves:
        return
    gap = min(LINE_INCHES / size_inches, 1 / len(curves))
    axes.set_ylim(axes.get_ylim())  # the lines' places in it are final
    last = axes.get_xlim()[1]
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = [float(to_axes.transform((curve.epochs[-1], curve.values[-1]))[1]) for curve in curves]
    for curve, end, height in zip(curves, ends, spread(ends, gap), strict=True):
        colour = str(style(curve.style)["color"])
        if curve.epochs[-1] < last:  # it ends before the margin
            axes.plot(curve.epochs[-1], curve.values[-1], "o", color=colour, markersize=5, clip_on=False)
            far = axes.get_xaxis_transform()
            axes.plot((curve.epochs[-1], last), (end, height), ":", color=colour, linewidth=0.9, transform=far)
        name = curve.label if len(curve.label) <= NAME_CHARACTERS else f"…{curve.label[1 - NAME_CHARACTERS :]}"
        axes.annotate(
            name,
            (1, height),
            (7, 0),
            xycoords="axes fraction",
            textcoords="offset points",
            va="center",
            color=colour,
            parse_math=False,
            fontsize=min(9.5, 9.5 * gap * size_inches / LINE_INCHES),
        )


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Return the heights (0..1) moved as little as keeps them `gap` apart, in their order and within 0..1.

    Neighbours that are too close become a block around their mean; blocks that meet become one (the pooling of
    adjacent violators, which solves the least-squares problem). There must be room: (n - 1) * gap <= 1.
    """
    order = sorted(range(len(heights)), key=lambda place: heights[place])
    # Without the gaps, names may share a height, and must only keep their order.
    blocks: list[tuple[float, int]] = []
    for rank, place in enumerate(order):
        total, count = heights[place] - rank * gap, 1
        while blocks and blocks[-1][0] / blocks[-1][1] > total / count:
            before, own = blocks.pop()
            total, count = total + before, count + own
        blocks.append((total, count))
    room = 1 - (len(heights) - 1) * gap
    level = [min(max(total / count, 0.0), max(room, 0.0)) for total, count in blocks for _ in range(count)]
    found = [0.0] * len(heights)
    for rank, place in enumerate(order):
        found[place] = level[rank] + rank * gap
    return found
