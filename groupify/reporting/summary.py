"""What a reader of a report wants to know first: one sentence, the totals, and a row to compare runs by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from groupify.reporting.formatting import (
    UNCERTAIN,
    count,
    milliseconds,
    percent,
    plural,
    points,
    ratio,
    ratio_within,
    size,
)
from groupify.reporting.read import Run
from groupify.reporting.results import Report
from groupify.reporting.tables import Table
from groupify.reporting.variants import (
    DENSE,
    GROUPED,
    Headline,
    Variant,
    headline,
    is_known,
    speed_up_text,
    variants,
)

# Less than this, in points, is no difference that a reader should see.
_EQUAL_POINTS = 0.05
# Bounds of a speed-up, the greater over the least, that the sentence must not hide.
_WIDE = 1.2


@dataclass(frozen=True)
class Total:
    """One number of the whole model, ready to print: dense, grouped, and how the two compare."""

    title: str
    dense: str
    grouped: str
    change: str


def verdict(report: Report) -> str:
    """Return ``"3.2× faster, 3.5× smaller, 0.6 points less accurate"``, as far as it was measured.

    Where there is an int8 file, it is ``"2.1× faster than dense int8"``: than the faster dense model.
    """
    found = headline(report)
    parts = [_speed(found, report), _size(found, report), _accuracy(found, report)]
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
            title,
            milliseconds(latency.dense),
            milliseconds(latency.grouped),
            speed_up_text(latency.speed_up, latency.speed_up_range, report),
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
    """Return a row for each of several runs, one for each precision; with int8, the dense models in front."""
    header = ("run", "top-1", "change", "latency", "speed-up", "params", "MACs")
    several = any(run.report.int8 is not None for run in runs)
    rows = []
    if several:
        first = next(run.report for run in runs if run.report.int8 is not None)
        dense = [one for one in variants(first) if one.model == DENSE]
        rows += [_comparison_row(one.name, one, first, first.params.dense, first.macs.dense) for one in dense]
    for run in runs:
        report = run.report
        for one in (one for one in variants(report) if one.model == GROUPED):
            name = f"{run.name}, {one.precision}" if several else run.name
            rows.append(_comparison_row(name, one, report, report.params.grouped, report.macs.grouped))
    return Table(header, tuple(rows), words=("run",))


def _comparison_row(name: str, one: Variant, report: Report, params: int, macs: int) -> tuple[str, ...]:
    before = report.accuracy.dense
    change = "–" if before is None or one.top1 is None else f"{points(100 * (one.top1 - before))} points"
    return (
        name,
        percent(one.top1),
        change,
        milliseconds(one.milliseconds),
        speed_up_text(one.speed_up, one.within, report),
        count(params),
        count(macs),
    )


def final_accuracy(report: Report) -> float | None:
    """Top-1 of the written model, a fraction; None where it was not measured."""
    recovered = report.accuracy.recovered
    return report.accuracy.converted if recovered is None else recovered


def points_lost(report: Report) -> float | None:
    """Top-1 of the dense model minus that of the written one, in points."""
    before, after = report.accuracy.dense, final_accuracy(report)
    return None if before is None or after is None else 100 * (before - after)


@dataclass(frozen=True)
class Fastest:
    """Of several runs the fastest, over dense float32, and those that may be as fast.

    Attributes:
        run: of these the most accurate, and of those the smallest.
        equal: all that cannot be told from the fastest, in the order given; one or more.
    """

    run: Run
    equal: tuple[Run, ...]


def fastest(runs: Sequence[Run]) -> Fastest | None:
    """Return the fastest of several runs; None where none was timed so that it says something."""
    timed = [(run, own) for run in runs if (own := _best_variant(run.report)) is not None]
    if not timed:
        return None
    first = max(own.speed_up or 0.0 for _, own in timed)
    least = min(_bounds(own)[0] for _, own in timed if own.speed_up == first)
    equal = [(run, own) for run, own in timed if _bounds(own)[1] >= least]
    most = max((own.top1 or 0.0) for _, own in equal)
    accurate = [one for one in equal if 100 * (most - (one[1].top1 or 0.0)) < _EQUAL_POINTS]
    smallest, _ = min(accurate, key=lambda one: one[0].report.params.grouped)
    return Fastest(smallest, tuple(run for run, _ in equal))


def comparison_sentence(runs: Sequence[Run]) -> str:
    """Return which of several runs is the fastest, or which are, and which of those loses least."""
    start, found = f"{len(runs)} runs", fastest(runs)
    if found is None:
        return f"{start}: which is the fastest was not measured"
    told = verdict(found.run.report)
    if len(found.equal) == 1:
        return f"{start}: the fastest, {found.run.name}, is {told}"
    names = [run.name for run in found.equal]
    listed = f"{', '.join(names[:-1])} and {names[-1]}"
    best = f"of these {found.run.name} loses least: {told}"
    return f"{start}: {listed} are equally fast as far as measured; {best}"


def _best_variant(report: Report) -> Variant | None:
    """The fastest converted model; None where none was timed so that it says something."""
    own = [one for one in variants(report) if one.model == GROUPED and one.speed_up]
    own = [one for one in own if is_known(one.within, report)]
    return max(own, key=lambda one: one.speed_up or 0.0, default=None)


def _bounds(one: Variant) -> tuple[float, float]:
    """Between what a speed-up lies; about, where nothing says it."""
    speed_up = one.speed_up or 0.0
    return one.within or (0.99 * speed_up, 1.01 * speed_up)


def _speed(found: Headline, report: Report) -> str:
    speed_up, dense, own = found.speed_up, found.dense, found.grouped
    if not speed_up:
        return "" if report.latency_ms is None else f"speed {UNCERTAIN}"
    start = "" if own.precision == dense.precision else f"in {own.precision} "
    end = "" if report.int8 is None else f" than {dense.name}"
    if 0.995 <= speed_up < 1.005:
        return f"{start}as fast{end.replace(' than', ' as')}"
    low, high = found.within or (speed_up, speed_up)
    if low < 1 < high and found.within is not None:
        return f"{start}about as fast{end.replace(' than', ' as')}, {ratio_within(speed_up, found.within)}"
    if high > _WIDE * low and low >= 1:
        return f"{start}{low:.1f} to {high:.1f}× faster{end}"
    return start + (f"{speed_up:.1f}× faster" if speed_up > 1 else f"{1 / speed_up:.1f}× slower") + end


def _size(found: Headline, report: Report) -> str:
    shrunk = found.shrunk or report.weight_bytes.ratio
    if not shrunk > 0 or 0.995 <= shrunk < 1.005:
        return ""
    return f"{shrunk:.1f}× smaller" if shrunk > 1 else f"{1 / shrunk:.1f}× larger"


def _accuracy(found: Headline, report: Report) -> str:
    lost = found.lost
    if lost is None or not report.weights.pretrained:
        return "accuracy not measured"
    if abs(lost) < _EQUAL_POINTS:
        return "just as accurate"
    amount = f"{abs(lost):.1f} point" + ("" if f"{abs(lost):.1f}" == "1.0" else "s")
    return f"{amount} {'less' if lost > 0 else 'more'} accurate"
