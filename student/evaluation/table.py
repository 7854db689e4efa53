"""The comparison table: experts and teacher from cached logits, students from their runs, side by side."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from mmkd.cache_tools.cache.reader import CacheReader
from mmkd.cache_tools.views.drawing import ViewPolicy
from mmkd.data_manifests.errors import InputError
from mmkd.data_manifests.manifest import Clip, Manifest
from mmkd.data_manifests.regular_file import read_regular
from mmkd.data_manifests.typed_json import typed
from mmkd.student.data.split_data import check_manifest
from mmkd.student.data.splits import SplitNames, manifest_fingerprint
from mmkd.student.evaluation.differences import Pair, differences, pairs_of
from mmkd.student.evaluation.evaluate import (
    SplitMetrics,
    SplitScores,
    evaluation_splits,
    refuse_nothing,
    score_cached,
)
from mmkd.student.evaluation.evaluation_file import check_metrics, defined, read_evaluation, read_scores
from mmkd.student.evaluation.run_files import evaluation_path, read_run, run_mixtures
from mmkd.student.evaluation.trained import student_input
from mmkd.student.recipes.student import Missing
from mmkd.student.teacher.mixing import HeadMixtures, Mixture

log = logging.getLogger("mmkd")
SCHEMA = "mmkd-table-1"


@dataclass(frozen=True)
class Table:
    """Metrics of several models; one table per seed, or several merged for their mean and spread."""

    rows: dict[str, list[SplitMetrics]]
    """Model -> metrics of each seed."""
    pairs: list[Pair] = field(default_factory=list)
    """Of each seed, the runs beside the baseline, clip by clip; none without a baseline."""

    def to_json(self, *, single_clips: bool = True) -> dict[str, Any]:
        """Return the table; `load_table` needs the single clips of its pairs where it has such."""
        found: dict[str, Any] = {"schema": SCHEMA, "rows": self.rows}
        if self.pairs:
            found["differences"] = [asdict(value) for value in differences(self.pairs)]
        if self.pairs and single_clips:
            found["pairs"] = [asdict(pair) for pair in self.pairs]
        return found

    def parts(self) -> list[tuple[str, str]]:
        """Return the (split or split/group, head) pairs that some model has metrics of, in order."""
        seeds = [seed for seeds in self.rows.values() for seed in seeds]
        return list(dict.fromkeys((part, head) for seed in seeds for part, heads in seed.items() for head in heads))


@dataclass(frozen=True)
class TableRow:
    """One model before its metrics are taken."""

    scores: Mapping[str, SplitScores] | None
    """Split -> how it did on each clip; None for a run whose evaluation kept only metrics."""
    stored: SplitMetrics
    """Those metrics."""

    def metrics(self, splits: Mapping[str, Sequence[Clip]], among: Mapping[str, Any] | None) -> SplitMetrics:
        """Return its metrics over the clips of the splits, or those of them in `among` (split -> head -> ids)."""
        if self.scores is None:
            return {part: heads for part, heads in self.stored.items() if part.partition("/")[0] in splits}
        found: SplitMetrics = {}
        for split, clips in splits.items():
            if split in self.scores:
                found |= self.scores[split].metrics(clips, None if among is None else among[split])
        return found


def compare_runs(
    reader: CacheReader,
    manifest: Manifest,
    runs: Mapping[str, Path],
    *,
    mixtures: HeadMixtures,
    missing: Missing,
    train_split: str | None = None,
    common: bool = False,
    baseline: str | None = None,
) -> Table:
    """Return one seed's table: each expert, the teacher, then the runs (name -> directory) in order.

    It is over the manifest's clips of the evaluation splits, without `train_split`; with `common`, over those of
    them that every row has. Each run is set beside the row `baseline`, where one is named.
    """
    check_manifest(reader, manifest)
    splits = compared_splits(SplitNames.cached(reader), manifest, train_split)
    teachers = {
        f"{expert} expert": {head.name: Mixture({expert: 1.0}) for head in reader.heads}
        for expert in reader.experts
    } | {"teacher": mixtures}
    rows = {
        name: TableRow({split: score_cached(reader, split, mixture, missing) for split in splits}, {})
        for name, mixture in teachers.items()
    }
    for name, directory in runs.items():
        if name in rows:
            raise InputError(f"a run may not be named {name!r}: the table has a row of that name")
        rows[name] = run_row(directory, reader.fingerprint, "cache")
    return table_of(rows, list(runs), splits, common=common, baseline=baseline)


def compare_alone(
    manifest: Manifest,
    runs: Mapping[str, Path],
    *,
    train_split: str | None = None,
    common: bool = False,
    baseline: str | None = None,
) -> Table:
    """Return one seed's table of runs that were evaluated on the manifest alone, each as its student sees clips.

    It is over the manifest's labelled splits, without `train_split` and those that the runs learned from.
    Raises InputError for a run that was not evaluated on this very manifest.
    """
    if not runs:
        raise InputError("without --cache the table has runs alone: give --run NAME=DIR")
    rows, learned_from = {}, set()
    for name, directory in runs.items():
        record = read_run(directory)
        learned_from.add(str(record.recipe.get("train_split", "train")))
        policy = ViewPolicy.model_validate(student_input(directory, record).views)
        rows[name] = run_row(directory, manifest_fingerprint(manifest, policy), "manifest")
    learned = sorted(learned_from | ({train_split} if train_split else set()))
    found = compared_splits(SplitNames.labelled(manifest, learned[0]), manifest, learned[0])
    splits = {name: clips for name, clips in found.items() if name not in learned}
    if not splits:
        raise InputError(f"no split is left to compare on: {', '.join(learned)} are left out")
    return table_of(rows, list(runs), splits, common=common, baseline=baseline)


def compared_splits(there: SplitNames, manifest: Manifest, train_split: str | None) -> dict[str, Sequence[Clip]]:
    """Return the evaluation splits with the manifest's clips; InputError where there is none."""
    names = evaluation_splits(there, manifest, train_split)
    refuse_nothing(there, manifest, names, train_split)
    return {name: manifest.split(name) for name in names}


def table_of(
    rows: Mapping[str, TableRow],
    runs: Sequence[str],
    splits: Mapping[str, Sequence[Clip]],
    *,
    common: bool,
    baseline: str | None,
) -> Table:
    """Return the table of all rows, in which each run is set beside the row `baseline`."""
    among = common_clips(rows, list(splits)) if common else None
    pairs = [] if baseline is None else list(run_pairs(rows, runs, baseline, splits, among))
    return Table({name: [row.metrics(splits, among)] for name, row in rows.items()}, pairs)


def run_pairs(
    rows: Mapping[str, TableRow],
    runs: Sequence[str],
    baseline: str,
    splits: Mapping[str, Sequence[Clip]],
    among: Mapping[str, Any] | None,
) -> Iterator[Pair]:
    """Yield each run beside the row `baseline`, split by split; InputError where there is no such row.

    Without single clips there is no pair: that is said.
    """
    if baseline not in rows:
        raise InputError(f"--baseline {baseline!r} is no row of the table; it has {', '.join(rows)}")
    for name in dict.fromkeys((baseline, *runs)):
        if rows[name].scores is None:
            log.warning(
                "%s: its evaluation does not keep single clips, so its differences from %s are left out; run "
                "`mmkd-student evaluate` on it again",
                name,
                baseline if name != baseline else "others",
            )
    others = rows[baseline].scores or {}
    for name in runs:
        own = rows[name].scores or {}
        for split, clips in splits.items():
            if name != baseline and split in own and split in others:
                both = (own[split], others[split])
                yield from pairs_of(name, baseline, both, clips, None if among is None else among[split])


def usual_baseline(runs: Mapping[str, Path]) -> str | None:
    """Return the name of the first run (name -> directory) that learned from labels alone; None where none did."""
    return next((name for name, directory in runs.items() if read_run(directory).labels_only), None)


def common_clips(rows: Mapping[str, TableRow], splits: Sequence[str]) -> dict[str, dict[str, set[str]]]:
    """Return split -> head -> ids of the clips that count in every row; InputError where a run does not tell."""
    for name, row in rows.items():
        if row.scores is None or not row.scores.keys() >= set(splits):
            raise InputError(
                f"--common needs the single clips of {', '.join(splits)}, which the evaluation of {name!r} lacks; "
                "run `mmkd-student evaluate` on it again"
            )
    found: dict[str, dict[str, set[str]]] = {}
    for split in splits:
        scored = [row.scores[split] for row in rows.values() if row.scores is not None]
        heads = [head for head in scored[0].heads if all(head in own.heads for own in scored)]
        found[split] = {head: set.intersection(*(own.counted_ids(head) for own in scored)) for head in heads}
    return found


def mixtures_of_runs(runs: Mapping[str, Path], reader: CacheReader) -> tuple[HeadMixtures | None, str | None]:
    """Return the teacher of the first run (name -> directory) whose teacher the cache can give, or None.

    The second value says which expert of a run's teacher the cache lacks, if that is why there is none.
    """
    absent: set[str] = set()
    for directory in runs.values():
        mixtures = run_mixtures(directory)
        if mixtures and all(mixture.sample_temperature is None for mixture in mixtures.values()):
            lacking = {name for mixture in mixtures.values() for name in mixture.weights} - set(reader.experts)
            if not lacking:
                return mixtures, None
            absent |= lacking
    if not absent:
        return None, None
    return None, f"the runs learned from {', '.join(sorted(absent))}, which this cache lacks"


def run_row(directory: Path, fingerprint: str, kind: Literal["cache", "manifest"]) -> TableRow:
    """Return a run's evaluation with a cache, or with a manifest alone; raise InputError when there is none."""
    path = evaluation_path(directory, fingerprint, own=False)
    if not path.exists():
        path = evaluation_path(directory, fingerprint, own=True)
    again = f"`mmkd-student evaluate {directory} --{kind} {kind.upper()}`"
    evaluation = read_evaluation(path, again)
    if evaluation.cache != fingerprint:
        other = "another cache" if kind == "cache" else "a cache or another manifest"
        raise InputError(f"{directory} was evaluated with {other}; run {again} with this one")
    return TableRow(read_scores(path, evaluation, again), evaluation.metrics)


def load_table(path: Path) -> Table:
    """Read a table that `compare` wrote."""
    try:
        value = defined(read_regular(path))
    except OSError as error:
        raise InputError(f"cannot read the table {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"cannot read the table {path}: {error}") from error
    if not isinstance(value, dict) or value.get("schema") != SCHEMA or not value.get("rows"):
        raise InputError(f"{path} is not a table of `mmkd-student compare --out`")
    try:
        pairs = typed(list[Pair], value.get("pairs", []))
        table = Table(typed(dict[str, list[SplitMetrics]], value["rows"]), pairs)
        differences(pairs)  # whose bits it needs
        if not all(table.rows.values()):
            raise ValueError("rows: one has no metrics")
        for metrics in (seed for seeds in table.rows.values() for seed in seeds):
            check_metrics(metrics)
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); make it again with `mmkd-student compare --out`") from error
    return table


def merge_tables(tables: Sequence[Table]) -> Table:
    """Join tables of several seeds; raise InputError when their models differ."""
    names, parts = list(tables[0].rows), tables[0].parts()
    for table in tables[1:]:
        if list(table.rows) != names:
            raise InputError(f"the tables hold other models: {names} and {list(table.rows)}")
        if table.parts() != parts:
            raise InputError(f"the tables hold other splits: {parts} and {table.parts()}")
    rows = {name: [metrics for table in tables for metrics in table.rows[name]] for name in names}
    return Table(rows, merge_pairs(tables))


def merge_pairs(tables: Sequence[Table]) -> list[Pair]:
    """Return the pairs of all seeds, without those that some seed lacks, which is said."""
    baselines = sorted({pair.baseline for table in tables for pair in table.pairs})
    if len(baselines) > 1:
        raise InputError(f"the tables have other baselines: {', '.join(baselines)}; give each the same --baseline")
    keys = [{pair.key() for pair in table.pairs} for table in tables]
    everywhere = set.intersection(*keys)
    if lacking := set.union(*keys) - everywhere:
        log.warning(
            "differences from %s that not every table has are left out: %s",
            baselines[0],
            ", ".join(sorted({f"{model} on {part} {head}" for model, _, part, head in lacking})),
        )
    return [pair for table in tables for pair in table.pairs if pair.key() in everywhere]
