"""Accuracy against latency, and accuracy step by step: the pictures of what was won and lost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from groupify.reporting.charts import Point, chart, round_ticks
from groupify.reporting.formatting import milliseconds, percent
from groupify.reporting.read import Run
from groupify.reporting.results import Report
from groupify.reporting.variants import DENSE, GROUPED, variants
from groupify.structures import FLOAT32, INT8, PRECISIONS

_LABELLED = 8  # more names in one chart would hide each other; hovering shows them
_SHORTEST = 0.5  # points of accuracy on the axis of the steps, where these are all alike
# What lies further from the points that must be seen would squash them, and is marked at the edge instead.
_FURTHEST = 2.0  # times the span of their accuracies
_NEAR = 3.0  # points of accuracy, where that span is small
_SLOWEST = 2.5  # times the latency of the slowest


@dataclass(frozen=True)
class Steps:
    """Accuracies on one axis; places are percent of its length.

    Attributes:
        marks: title, text and place of the dense, the converted and the trained model.
        ticks: text and place.
    """

    marks: tuple[tuple[str, str, float], ...]
    ticks: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Plane:
    """The chart of accuracy against latency.

    Attributes:
        chart: its name and its SVG.
        off_scale: what was moved to the edge, with its numbers.
    """

    chart: tuple[str, str]
    off_scale: tuple[str, ...]


def accuracy_steps(report: Report) -> Steps | None:
    """Return the accuracies of a report on an axis with round ticks; None where none was measured."""
    found = [(title, 100 * value) for title, value in _measured(report)]
    if not found:
        return None
    ticks = round_ticks(*_at_least([value for _, value in found], _SHORTEST))
    first, last = ticks[0], ticks[-1]

    def place(value: float) -> float:
        return round(100 * (value - first) / (last - first), 1)

    return Steps(
        tuple((title, percent(value / 100), place(value)) for title, value in found),
        tuple((f"{tick:.6g}%", place(tick)) for tick in ticks),
    )


def report_plane(report: Report, others: Sequence[Run] = ()) -> Plane | None:
    """Return the plane of a report: itself, dense int8, uniform groups and other runs of the same model."""
    own = [*_steps(report), *_in_int8(report)]
    if all(point.label != _name(DENSE, INT8) for point in own):
        own += _dense_of_first(others, (INT8,))
    around = [*_uniform(report), *_points_of_runs(others, "other")]
    return _plane([*own, *around], own, _steps(report))


def comparison_plane(runs: Sequence[Run]) -> Plane | None:
    """Return the plane of several runs and of the dense models."""
    converted, dense = _points_of_runs(runs, "recovered"), list(_dense_of_first(runs, PRECISIONS))
    return _plane([*converted, *dense], [*dense, *_better_half(converted)])


def off_scale(points: Sequence[Point], seen: Sequence[Point]) -> list[Point]:
    """Move points that lie far from those that must be seen to the edge, and mark them there.

    Args:
        points: x in milliseconds, y in percent.
        seen: those that must be seen, at least one.
    """
    low, high = min(one.y for one in seen), max(one.y for one in seen)
    reach = max(_FURTHEST * (high - low), _NEAR)
    lowest, highest, slowest = low - reach, high + reach, _SLOWEST * max(one.x for one in seen)

    def moved(point: Point) -> Point:
        if point.y < lowest:
            edge, value = "below", percent(point.y / 100)
        elif point.y > highest:
            edge, value = "above", percent(point.y / 100)
        elif point.x > slowest:
            edge, value = "right", milliseconds(point.x)
        else:
            return point
        x, y = min(point.x, slowest), min(max(point.y, lowest), highest)
        return replace(point, x=x, y=y, edge=edge, label=point.label and f"{value} {point.label}")

    return [moved(point) for point in points]


def _plane(points: Sequence[Point], seen: Sequence[Point], line: Sequence[Point] = ()) -> Plane | None:
    if not points:
        return None
    marks = off_scale(points, seen or _better_half(points))
    name = "Accuracy against latency"
    drawn = chart(
        name, marks, x_title="latency, ms", y_title="top-1, %", from_zero=True, lines=[("trace", line)]
    )
    return Plane((name, drawn), tuple(mark.title for mark in marks if mark.edge))


def _better_half(points: Sequence[Point]) -> list[Point]:
    return sorted(points, key=lambda one: -one.y)[: (len(points) + 1) // 2]


def _at_least(values: Sequence[float], span: float) -> tuple[float, float]:
    """The range of some percentages, widened to a least span within 0 and 100."""
    low, high = min(values), max(values)
    missing = max(span - (high - low), 0.0) / 2
    low, high = low - missing, high + missing
    shift = min(100 - high, 0.0) + max(-low, 0.0)
    return low + shift, high + shift


def _measured(report: Report) -> list[tuple[str, float]]:
    """The accuracies of the dense, the converted and the trained model, as far as there are such."""
    accuracy = report.accuracy
    steps = ((DENSE, accuracy.dense), ("converted", accuracy.converted), ("recovered", accuracy.recovered))
    return [(title, value) for title, value in steps if value is not None]


def _mark(look: str, name: str, time: float, top1: float, label: str) -> Point:
    return Point(time, 100 * top1, look, f"{name}: {milliseconds(time)}, {percent(top1)}", label)


def _name(model: str, precision: str) -> str:
    return f"{model} {precision}"


def _steps(report: Report) -> list[Point]:
    """From the dense model to the converted and the trained one."""
    if report.latency_ms is None:
        return []
    times, accuracy = report.latency_ms, report.accuracy
    trained = accuracy.recovered != accuracy.converted
    return [
        _mark(look, look, times.dense if look == DENSE else times.grouped, top1, look)
        for look, top1 in _measured(report)
        if trained or look != "recovered"
    ]


def _in_int8(report: Report) -> Iterator[Point]:
    """Both models of a report in int8, as far as they were measured."""
    names = (("recovered", INT8, report.int8), (DENSE, _name(DENSE, INT8), report.dense_int8))
    for look, name, file in names:
        if file is not None and file.milliseconds and file.top1 is not None:
            yield _mark(look, name, file.milliseconds, file.top1, name)


def _uniform(report: Report) -> Iterator[Point]:
    """The same number of groups everywhere."""
    for uniform in report.uniform:
        if uniform.milliseconds is not None:
            name = f"uniform g={uniform.groups}"
            yield _mark("uniform", f"{name}, untrained", uniform.milliseconds, uniform.top1, name)


def _points_of_runs(runs: Sequence[Run], look: str) -> list[Point]:
    measured = [
        (
            f"{run.name}, {one.precision}" if run.report.int8 is not None else run.name,
            one.milliseconds,
            one.top1,
        )
        for run in runs
        for one in variants(run.report)
        if one.model == GROUPED and one.milliseconds is not None and one.top1 is not None
    ]
    named = len(measured) <= _LABELLED
    return [_mark(look, name, time, top1, name if named else "") for name, time, top1 in measured]


def _dense_of_first(runs: Sequence[Run], precisions: Sequence[str]) -> Iterator[Point]:
    """The dense model in each precision, of the first run that has measured it all there."""
    for precision in precisions:
        for run in runs:
            found = {one.model: one for one in variants(run.report) if one.precision == precision}
            dense, grouped = found.get(DENSE), found.get(GROUPED)
            if dense is None or grouped is None or grouped.milliseconds is None or grouped.top1 is None:
                continue
            if dense.milliseconds is not None and dense.top1 is not None:
                name = DENSE if precision == FLOAT32 else dense.name
                yield _mark(DENSE, name, dense.milliseconds, dense.top1, name)
            break
