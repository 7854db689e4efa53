"""Histories in words and as CSV: what `mmkd-student show` prints and writes beside its picture."""

import csv
import io
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmkd.data_manifests.counted import counted
from mmkd.data_manifests.kinds import CURVE_COLUMNS
from mmkd.student.evaluation.evaluate import SplitMetrics
from mmkd.student.evaluation.table_text import averaged_lines, metric_lines
from mmkd.student.looking.history import History
from mmkd.student.training.epoch_metrics import EpochMetrics
from mmkd.student.training.step_log import Interval

INDENT = "  "


def history_lines(histories: Sequence[History], width: int) -> list[str]:
    """Return what each training did: a line for itself, and one below for each accuracy; all within `width`."""
    lines = []
    for history in histories:
        lines += textwrap.wrap(f"{history.name}: {own_line(history)}", width, subsequent_indent=INDENT)
        for line in (*held_out_lines(history), *evaluation_lines(history)):
            lines += textwrap.wrap(line, width, initial_indent=INDENT, subsequent_indent=2 * INDENT)
    return lines


def own_line(history: History) -> str:
    """Return what it is, how far it came, and its last loss and speed."""
    done, asked = len(history.metrics), history.epochs
    epochs = counted(done, "epoch") if asked is None else f"{done} of {counted(asked, 'epoch')}"
    parts = [history.kind, history.state, epochs]
    last: Interval | EpochMetrics | None = history.since
    if history.since is not None:
        parts += [f"step {history.since.last_step}"]
    elif history.metrics:
        last = history.metrics[-1]
    if last is not None:
        parts += [f"loss {last.loss:.4f}", f"{last.clips_per_second:.3g} clips/s"]
    return ", ".join(parts)


def held_out_lines(history: History) -> Iterator[str]:
    """Yield a line for each head that its epochs, or at the end an expert, were validated on."""
    for head in history.heads():
        if best := history.best(head):
            last = history.held_out_top1(head)[-1][1]
            yield f"held-out {head}: best top-1 {percent(best[1])} after epoch {best[0]}, last {percent(last)}"
    for head, values in (history.held_out or {}).items():
        if "top1" in values:
            clips = counted(int(values.get("clips", 0)), "clip")
            yield f"held-out {head}: top-1 {percent(values['top1'])} at the end ({clips})"


def evaluation_lines(history: History) -> Iterator[str]:
    """Yield the accuracies of each evaluation, over which views they are, and the agreement with the teacher."""
    for own in history.evaluations:
        if len(history.evaluations) > 1:
            kind, _, number = own.found.cache.rpartition(":")
            yield f"{own.file}, with {kind or 'cache'} {number[:12]}:"
        yield from metrics_lines(own.found.metrics)


def metrics_lines(metrics: SplitMetrics) -> Iterator[str]:
    """Yield a line for each split or group and head, and the views behind them."""
    for part, heads in metrics.items():
        for head, value in heads.items():
            (line,) = metric_lines({part: {head: value}})[:1]
            yield line + agreement(value)
    yield from averaged_lines([metrics])


def agreement(value: Mapping[str, Any]) -> str:
    """Return how often the student says what its teacher says, where that is known."""
    share = value.get("teacher_agreement")
    return "" if share is None else f"; says what the teacher says on {percent(share)}"


def percent(fraction: float) -> str:
    """Return a fraction in percent."""
    return f"{100 * fraction:.1f} %"


def history_csv(histories: Sequence[History]) -> str:
    """Return a row for each epoch of each training; what is not known is empty.

    Epochs are counted from 1; held-out top-1 is a fraction, cross-entropy in nats.
    """
    heads = list(dict.fromkeys(head for history in histories for head in history.heads()))
    held_out = [(head, key) for head in heads for key in ("clips", "top1", "nll")]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*CURVE_COLUMNS, *(f"held_out_{head}_{key}" for head, key in held_out)])
    for history in histories:
        for values in history.metrics:
            found = values.held_out or {}
            own = [values.epoch + 1, values.steps, values.loss, values.learning_rate, values.clips_per_second]
            writer.writerow([history.name, *own, *(found.get(head, {}).get(key) for head, key in held_out)])
    return text.getvalue()
