"""What a reader of a report wants to know first: one sentence, the totals, and a row to compare runs by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from groupify.reporting.formatting import UNCERTAIN, count, milliseconds, percent, plural, points, ratio, size
from groupify.reporting.read import Run
from groupify.reporting.results import Report
from groupify.reporting.tables import Table

# Less than this, in points, is no difference that a reader should see.
_EQUAL_POINTS = 0.05


@dataclass(frozen=True)
class Total:
    """One number of the whole model, ready to print: dense, grouped, and how the two compare."""

    title: str
    dense: str
    grouped: str
    change: str


def verdict(report: Report) -> str:
    """Return ``"3.2× faster, 3.5× smaller, 0.6 points less accurate"``, as far as it was measured."""
    parts = [_speed(report), _size(report), _accuracy(report)]
    return ", ".join(part for part in parts if part)


def totals(report: Report) -> dict[str, Total]:
    """Return what was measured of the dense and of the grouped model."""
    found: dict[str, Total] = {}
    lost, latency = points_lost(report), report.latency_ms
    if lost is not None:
        found["top-1"] = Total(
            "top-1",
            percent(report.accuracy.dense),
            percent(final_accuracy(report)),
            f"{points(-lost)} points",
        )
    if latency is not None:
        title = f"latency ({plural(latency.threads, 'thread')}, batch {latency.batch_size})"
        found["latency"] = Total(
            title, milliseconds(latency.dense), milliseconds(latency.grouped), speed_up_or_doubt(report)
        )
    for title, change, form in (
        ("ONNX file", report.onnx_bytes, size),
        ("params", report.params, count),
        ("MACs", report.macs, count),
        ("weight bytes", report.weight_bytes, size),
        ("peak activation bytes", report.activation_bytes, size),
    ):
        if change is not None:
            found[title] = Total(title, form(change.dense), form(change.grouped), ratio(change.ratio))
    return found


def totals_table(report: Report, names: Sequence[str], last: str) -> Table:
    """Return some of the totals, as far as they were measured, in the order given.

    Args:
        report: of one run.
        names: which of the totals.
        last: title of the last column.
    """
    found = totals(report)
    rows = [found[name] for name in names if name in found]
    cells = tuple((row.title, row.dense, row.grouped, row.change) for row in rows)
    return Table(("", "dense", "grouped", last), cells, words=("",))


def comparison_table(runs: Sequence[Run]) -> Table:
    """Return a row for each of several runs."""
    header = ("run", "top-1", "change", "latency", "speed-up", "params", "MACs")
    rows = []
    for run in runs:
        lost, latency = points_lost(run.report), run.report.latency_ms
        rows.append(
            (
                run.name,
                percent(final_accuracy(run.report)),
                "–" if lost is None else f"{points(-lost)} points",
                milliseconds(latency.grouped if latency else None),
                speed_up_or_doubt(run.report),
                count(run.report.params.grouped),
                count(run.report.macs.grouped),
            )
        )
    return Table(header, tuple(rows), words=("run",))


def final_accuracy(report: Report) -> float | None:
    """Top-1 of the written model, a fraction; None where it was not measured."""
    recovered = report.accuracy.recovered
    return report.accuracy.converted if recovered is None else recovered


def points_lost(report: Report) -> float | None:
    """Top-1 of the dense model minus that of the written one, in points."""
    before, after = report.accuracy.dense, final_accuracy(report)
    return None if before is None or after is None else 100 * (before - after)


def steady_speed_up(report: Report) -> float | None:
    """The measured speed-up; None where nothing was timed, or on a busy machine.

    There the longer run is interrupted more often, so that the ratio may be anything.
    """
    return report.latency_ms.speed_up if report.latency_ms is not None and report.latency_ms.steady else None


def speed_up_or_doubt(report: Report) -> str:
    """``3.10×``, "uncertain" on a busy machine, and a dash where nothing was timed."""
    speed_up = steady_speed_up(report)
    if speed_up is not None:
        return ratio(speed_up)
    return "–" if report.latency_ms is None else UNCERTAIN


def _speed(report: Report) -> str:
    speed_up = steady_speed_up(report)
    if speed_up is None:
        return "" if report.latency_ms is None else f"speed {UNCERTAIN}"
    if 0.995 <= speed_up < 1.005:
        return "as fast"
    return f"{speed_up:.1f}× faster" if speed_up > 1 else f"{1 / speed_up:.1f}× slower"


def _size(report: Report) -> str:
    change = report.onnx_bytes or report.weight_bytes
    if not change.dense or not change.grouped or 0.995 <= change.ratio < 1.005:
        return ""
    return f"{change.ratio:.1f}× smaller" if change.ratio > 1 else f"{1 / change.ratio:.1f}× larger"


def _accuracy(report: Report) -> str:
    lost = points_lost(report)
    if lost is None or not report.weights.pretrained:
        return "accuracy not measured"
    if abs(lost) < _EQUAL_POINTS:
        return "just as accurate"
    amount = f"{abs(lost):.1f} point" + ("" if f"{abs(lost):.1f}" == "1.0" else "s")
    return f"{amount} {'less' if lost > 0 else 'more'} accurate"
