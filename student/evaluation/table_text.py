"""The comparison table as Markdown for a terminal: in blocks that fit its width, with counts of clips."""

import math
import statistics
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mmkd.data_manifests.counted import counted
from mmkd.student.evaluation.differences import LEVEL, RESAMPLES, SEED, Difference, differences
from mmkd.student.evaluation.evaluate import SplitMetrics
from mmkd.student.evaluation.table import Table

COLUMNS = (("top1", "top-1"), ("top5", "top-5"), ("ece", "ECE"))
FURTHER = (("mean_class", "class mean"), ("both_top5", "verb and noun in top-5"))
"""What one model's lines show beside the table's columns, where it is there."""
NONE = "-"
Part = tuple[str, str]
"""(Split or split/group, head): what one model has one set of metrics of."""
Seeds = Sequence[Mapping[str, Any]]
"""One model's metrics of one part, of each seed."""


def render(table: Table, width: int | None = None) -> str:
    """Return the table: percent, with the standard deviation over seeds where there are several.

    Where it is wider than `width` it comes in several blocks. Below stands which rows are over different clips.
    """
    parts = table.parts()
    texts = [_lines(table, parts, (True, _differ(parts)[1]))]
    if width is not None and _width(texts[0]) > width:
        blocks = split_columns(table, parts, width)
        heads = _differ(parts)[1]
        texts = [[*_caption(block, heads), *_lines(table, block, _differ(block))] for block in blocks]
    seeds = (seed for seeds in table.rows.values() for seed in seeds)
    notes = [
        line
        for note in (*averaged_lines(seeds), *different_clips(table))
        for line in textwrap.wrap(note, width or 10_000)
    ]
    return "\n\n".join("\n".join(lines) for lines in (*texts, notes, *difference_blocks(table, width)) if lines)


def split_columns(table: Table, parts: Sequence[Part], width: int) -> list[list[Part]]:
    """Return the parts in blocks, each as many as fit the width (one at least)."""
    blocks: list[list[Part]] = []
    for part in parts:
        longer = [*blocks[-1], part] if blocks else [part]
        # What a block has in common stands above it, and one thing at least must be common.
        if blocks and not all(_differ(longer)) and _width(_lines(table, longer, _differ(longer))) <= width:
            blocks[-1] = longer
        else:
            blocks.append([part])
    return blocks


def _differ(block: Sequence[Part]) -> tuple[bool, bool]:
    """Return whether the parts of a block are of several splits or groups, and of several heads."""
    return len({part for part, _ in block}) > 1, len({head for _, head in block}) > 1


def _caption(block: Sequence[Part], heads: bool) -> list[str]:
    """Return lines that say what a block's parts share: split or group, and head where the table has several."""
    parts, own_heads = _differ(block)
    names = [(block[0][0], not parts), (block[0][1], not own_heads and heads)]
    text = ", ".join(name for name, common in names if common)
    return [f"**{text}**", ""] if text else []


def _lines(table: Table, block: Sequence[Part], named: tuple[bool, bool]) -> list[str]:
    """Return one block, in whose titles stand the split or group, and the head, where they are `named`."""
    grid = [["model"], *([name.replace("|", "\\|")] for name in table.rows)]  # Markdown would begin another cell
    for part in block:
        words = [name for name, wanted in zip(part, named, strict=True) if wanted]
        grid[0] += [" ".join([*words, title]) for title in ("clips", *(title for _, title in COLUMNS))]
        for row, seeds in zip(grid[1:], table.rows.values(), strict=True):
            own = [seed.get(part[0], {}).get(part[1], {}) for seed in seeds]
            row += [count_cell(own), *(cell([seed.get(key) for seed in own]) for key, _ in COLUMNS)]
    return _aligned(grid)


def difference_blocks(table: Table, width: int | None = None) -> list[list[str]]:
    """Return a block for each model that is set beside a baseline: points of top-1, spread over seeds, interval."""
    blocks: dict[str, list[Difference]] = {}
    for value in differences(table.pairs):
        blocks.setdefault(f"**{value.model} beside {value.baseline}**", []).append(value)
    if not blocks:
        return []
    heads = len({value.head for values in blocks.values() for value in values}) > 1
    found = []
    for caption, values in blocks.items():
        grid = [["of", "clips", "top-1 more by", f"{100 * LEVEL:.0f} %"]]
        for value in values:
            of = f"{value.part} {value.head}" if heads else value.part
            grid.append([of, _span(sorted(set(value.counts))), points(value), interval(value)])
        found.append([caption, "", *_aligned(grid)])
    note = (
        f"{100 * LEVEL:.0f} %: of {RESAMPLES:,} resamples of the clips that both have (paired bootstrap, "
        f"percentile interval, seed {SEED}); it tells what other clips would change, a ± what other seeds would"
    )
    return [*found, textwrap.wrap(note, width or 10_000)]


def points(value: Difference) -> str:
    """Return a difference in points of percent, and its sample standard deviation over several seeds."""
    if value.top1 is None:
        return NONE
    return f"{100 * value.top1:+.1f}" + ("" if value.spread is None else f" ± {100 * value.spread:.1f}")


def interval(value: Difference) -> str:
    """Return the ends of a difference's interval in points."""
    if value.low is None or value.high is None:
        return NONE
    return f"{100 * value.low:+.1f} to {100 * value.high:+.1f}"


def _aligned(grid: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in grid) for column in range(len(grid[0]))]
    lines = [
        "| " + " | ".join(text.ljust(size) for text, size in zip(row, widths, strict=True)) + " |" for row in grid
    ]
    lines.insert(1, "|" + "|".join("-" * (size + 2) for size in widths) + "|")
    return lines


def _width(lines: Sequence[str]) -> int:
    return max(map(len, lines))


def cell(fractions: Sequence[float | None]) -> str:
    """Return percent with one decimal, and the sample standard deviation where there are several seeds."""
    values = [100 * value for value in fractions if value is not None and not math.isnan(value)]
    if not values or len(values) < len(fractions):
        return NONE
    mean = statistics.fmean(values)
    return f"{mean:.1f}" if len(values) == 1 else f"{mean:.1f} ± {statistics.stdev(values):.1f}"


def count_cell(seeds: Seeds) -> str:
    """Return how many clips the metrics are over, and of how many labelled ones where that is not all."""
    counts = sorted({seed["count"] for seed in seeds if "count" in seed})
    if not counts:
        return NONE
    totals = sorted({seed["count"] + seed.get("left_out", 0) for seed in seeds if "count" in seed})
    text = _span(counts)
    return text if totals == counts else f"{text} of {_span(totals)}"


def _span(numbers: Sequence[int]) -> str:
    return f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"


def metric_lines(metrics: SplitMetrics) -> list[str]:
    """Return one line for each split or group, and head, and over which views a clip's logits are averaged."""
    lines = []
    for part, heads in metrics.items():
        for head, value in heads.items():
            if not value["count"] and not value["left_out"]:
                lines.append(f"{part} {head}: none of its clips has a label")
                continue
            shown = [f"{title} {cell([value.get(key)])}" for key, title in (*COLUMNS, *FURTHER) if key in value]
            left_out = f", {value['left_out']} left out" if value["left_out"] else ""
            lines.append(f"{part} {head}: {', '.join(shown)} ({counted(value['count'], 'clip')}{left_out})")
    return lines + averaged_lines([metrics])


def averaged_lines(seeds: Iterable[SplitMetrics]) -> list[str]:
    """Return one line for each way in which clips' logits are averaged over views."""
    ways: dict[tuple[int, int], list[str]] = {}
    for metrics in seeds:
        for part, heads in metrics.items():
            for value in heads.values():
                if value.get("positions"):
                    parts = ways.setdefault((value["positions"], value["crops"]), [])
                    parts += [name] if (name := part.partition("/")[0]) not in parts else []
    return [
        f"{', '.join(parts)}: each clip by the mean logits of {counted(positions * crops, 'view')} "
        f"({counted(positions, 'position')} in time, {counted(crops, 'crop')})"
        for (positions, crops), parts in ways.items()
    ]


def different_clips(table: Table) -> list[str]:
    """Return a note for each split of which rows are over different clips, with the rows of each set."""
    notes: dict[str, list[str]] = {}
    for part, head in table.parts():
        if "/" in part:
            continue  # a group's clips differ where its split's do
        sets: dict[Any, list[str]] = {}
        for name, seeds in table.rows.items():
            own = [seed.get(part, {}).get(head, {}) for seed in seeds]
            if key := tuple(sorted({(one["count"], str(one.get("clips", ""))) for one in own if "count" in one})):
                sets.setdefault(key, []).append(name)
        if len(sets) > 1:
            texts = [f"{_span(sorted({count for count, _ in key}))}: {', '.join(sets[key])}" for key in sets]
            notes.setdefault(f"rows are over different clips ({'; '.join(texts)})", []).append(part)
    return [
        f"{', '.join(dict.fromkeys(parts))}: {note}; --common compares over the clips that all rows have"
        for note, parts in notes.items()
    ]
