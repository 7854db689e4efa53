"""The comparison table: experts and teacher from cached logits, students from their runs, side by side."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmkd.cache_tools.mixing import HeadMixtures, Missing, Mixture
from mmkd.cache_tools.reader import CacheReader
from mmkd.data_manifests.errors import InputError
from mmkd.data_manifests.records import Manifest
from mmkd.student.evaluation import SplitMetrics, evaluate_cached
from mmkd.student.run_data import check_manifest
from mmkd.student.run_files import evaluation_path, run_mixtures

SCHEMA = "mmkd-table-1"
COLUMNS = (("top1", "top-1"), ("top5", "top-5"), ("ece", "ECE"))


@dataclass(frozen=True)
class Table:
    """Metrics of several models; one table per seed, or several merged for their mean and spread."""

    rows: dict[str, list[SplitMetrics]]
    """Model -> metrics of each seed."""

    def to_json(self) -> dict[str, Any]:
        """Return the table for `load_table`."""
        return {"schema": SCHEMA, "rows": self.rows}


def compare(
    reader: CacheReader,
    manifest: Manifest,
    runs: Mapping[str, Path],
    *,
    mixtures: HeadMixtures,
    missing: Missing,
    train_split: str,
) -> Table:
    """Return one seed's table: each expert, the teacher, then the runs (name -> directory) in order."""
    check_manifest(reader, manifest)
    rows: dict[str, SplitMetrics] = {}
    for expert in reader.experts:
        alone = {head.name: Mixture({expert: 1.0}) for head in reader.heads}
        rows[f"{expert} expert"] = evaluate_cached(
            reader, alone, missing, train_split=train_split, clips=manifest.clips
        )
    rows["teacher"] = evaluate_cached(reader, mixtures, missing, train_split=train_split, clips=manifest.clips)
    for name, directory in runs.items():
        if name in rows:
            raise InputError(f"a run may not be named {name!r}: the table has a row of that name")
        rows[name] = run_metrics(directory, reader)
    return Table({name: [metrics] for name, metrics in rows.items()})


def mixtures_of_runs(runs: Mapping[str, Path]) -> HeadMixtures | None:
    """Return the teacher of the first run (name -> directory) that had one which can be evaluated, or None."""
    for directory in runs.values():
        mixtures = run_mixtures(directory)
        if mixtures and all(mixture.sample_temperature is None for mixture in mixtures.values()):
            return mixtures
    return None


def run_metrics(directory: Path, reader: CacheReader) -> SplitMetrics:
    """Return a run's evaluation with a cache; raise InputError when there is none."""
    path = evaluation_path(directory, reader.fingerprint, own=False)
    if not path.exists():
        path = evaluation_path(directory, reader.fingerprint, own=True)
    try:
        value = json.loads(path.read_bytes())
        cache, metrics = value["cache"], value["metrics"]
    except FileNotFoundError:
        raise InputError(f"{path} is missing; run `mmkd-student evaluate {directory}` first") from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error!r}); run `mmkd-student evaluate {directory}` again") from error
    if cache != reader.fingerprint:
        raise InputError(
            f"{directory} was evaluated with another cache; run `mmkd-student evaluate {directory} --cache CACHE` "
            "with this one"
        )
    result: SplitMetrics = metrics
    return result


def load_table(path: Path) -> Table:
    """Read a table that `compare` wrote."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the table {path}: {error}") from error
    if not isinstance(value, dict) or value.get("schema") != SCHEMA or not value.get("rows"):
        raise InputError(f"{path} is not a table of `mmkd-student compare --out`")
    return Table(value["rows"])


def merge_tables(tables: Sequence[Table]) -> Table:
    """Join tables of several seeds; raise InputError when their models differ."""
    names, parts = list(tables[0].rows), table_parts(tables[0])
    for table in tables[1:]:
        if list(table.rows) != names:
            raise InputError(f"the tables hold other models: {names} and {list(table.rows)}")
        if table_parts(table) != parts:
            raise InputError(f"the tables hold other splits: {parts} and {table_parts(table)}")
    return Table({name: [metrics for table in tables for metrics in table.rows[name]] for name in names})


def table_parts(table: Table) -> list[tuple[str, str]]:
    """Return the (split or split/group, head) pairs that the table has metrics of, in order."""
    first = next(iter(table.rows.values()))[0]
    return [(part, head) for part, heads in first.items() for head in heads]


def render(table: Table) -> str:
    """Return the table as Markdown: percent, with the standard deviation over seeds where there are several."""
    parts = table_parts(table)
    several_heads = len({head for _, head in parts}) > 1
    titles = [
        f"{part} {head} {title}" if several_heads else f"{part} {title}"
        for part, head in parts
        for _, title in COLUMNS
    ]
    body = [
        [
            name,
            *(cell([seed[part][head][key] for seed in seeds]) for part, head in parts for key, _ in COLUMNS),
        ]
        for name, seeds in table.rows.items()
    ]
    grid = [["model", *titles], *body]
    widths = [max(len(row[column]) for row in grid) for column in range(len(grid[0]))]
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |" for row in grid
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def cell(fractions: Sequence[float]) -> str:
    """Return percent with one decimal, and the sample standard deviation where there are several seeds."""
    mean = 100 * statistics.fmean(fractions)
    return f"{mean:.1f}" if len(fractions) == 1 else f"{mean:.1f} ± {100 * statistics.stdev(fractions):.1f}"
