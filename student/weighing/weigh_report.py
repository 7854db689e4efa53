"""The report of `mmkd-cache weigh`, for people."""

from collections.abc import Mapping

from mmkd.data_manifests.counted import counted
from mmkd.student.teacher.mixing import Mixture
from mmkd.student.weighing.weigh import FITTED, Row, WeighReport

NOTES = {
    "not fitted": "",
    "cross-fitted": "cross-fitted",
    "same clips": "fitted on the same clips",
    "oracle": "oracle: uses the label",
}
FEW_VIEWS = 200
"""Fewer views than this are said to be few: a tenth of a nat and two points of accuracy are noise there."""


def report_lines(report: WeighReport) -> list[str]:
    """Return the report as lines."""
    part = f"held-out part of {report.split}" if report.held_out else f"split {report.split}"
    lines = [f"fitted and scored on the {part}: {counted(report.clips, 'clip')}; every view counts by itself"]
    for head, rows in report.rows.items():
        left_out = f", {report.left_out[head]} left out (no label, or an expert is missing)"
        lines.append(f"{head}: {counted(report.views[head], 'view')}{left_out if report.left_out[head] else ''}")
        lines += table_lines(rows)
        lines += storage_lines(report, head)
    return lines + caveats(report)


def table_lines(rows: Mapping[str, Row]) -> list[str]:
    """Return a head's table."""
    width = max(map(len, rows))
    lines = [f"  {'':{width}}  top-1    NLL    ECE  weights (temperature)"]
    for name, row in rows.items():
        found, note = row.metrics, NOTES[row.how]
        shown = "" if name.endswith(" alone") else mixture_text(row.mixture)
        lines.append(
            f"  {name:{width}}  {100 * found.top1:5.1f}  {found.nll:5.3f}  {100 * found.ece:5.1f}  {shown}"
            + (f"  [{note}]" if note else "")
        )
    return [line.rstrip() for line in lines]


def mixture_text(mixture: Mixture) -> str:
    """Return e.g. `rgb 0.31 (0.82), flow 0.69 (1.40)`."""
    if mixture.sample_temperature is not None:
        return f"of each view, over {mixture.sample_temperature:g}"
    parts = []
    for expert, weight in mixture.weights.items():
        divisor = mixture.temperatures.get(expert)
        parts.append(f"{expert} {weight:.3f}" + ("" if divisor is None else f" ({divisor:.3g})"))
    return ", ".join(parts)


def storage_lines(report: WeighReport, head: str) -> list[str]:
    """Return what storage did to the experts (measured) and may have done to the teacher (bounded)."""
    bounds = {name: row.kl_bound for name, row in report.rows[head].items() if row.kl_bound is not None}
    bounded = ", ".join(f"{name} {value:.1e}" for name, value in bounds.items())
    measured = ", ".join(f"{expert} {value:.1e}" for expert, value in report.stored_kl[head].items())
    return [
        f"  storage error of the teacher at T = {report.temperature:g}, nats, at most (bound over "
        f"{counted(report.bound_views[head], 'view')}): {bounded}",
        f"  storage error of each expert, measured by the build: {measured}",
    ]


def caveats(report: WeighReport) -> list[str]:
    """Return what a reader of the figures must know."""
    lines = []
    if not report.held_out:
        lines.append(f"note: with weights fitted on {report.split}, figures of runs on {report.split} are no test")
    if min(report.views.values()) < FEW_VIEWS:
        lines.append(f"note: these are few views (fewer than {FEW_VIEWS}); do not choose by small differences")
    if any(rows[scheme].how == "same clips" for rows in report.rows.values() for scheme in FITTED):
        lines.append("note: too few clips to fit on one half and score on the other")
    return lines
