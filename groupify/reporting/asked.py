"""What a run was asked for and what it got, with the error of what was measured."""

from __future__ import annotations

from collections.abc import Iterator

from groupify.planning.budget import BYTES, DROP, LATENCY, MACS, PARAMS, Budget, Limit
from groupify.reporting.formatting import count, lost, milliseconds, plural, ratio_within, size
from groupify.reporting.results import Range, Report
from groupify.reporting.variants import GROUPED, variants
from groupify.structures import INT8


def asked_lines(report: Report) -> Iterator[str]:
    """Yield a line for each limit of the budget: ``asked drop=0.5: lost 0.31 ± 0.22 points …``."""
    if report.budget is not None:
        for limit in Budget.parse(report.budget).limits:
            yield f"asked {_said(limit)}: {_got(limit, report)}"


def _said(limit: Limit) -> str:
    """The limit as people say it: a latency as how many times less."""
    if limit.quantity != LATENCY or not limit.relative:
        return limit.text
    base = ":float32" if limit.of_float32 else ""
    return f"{limit.quantity}={1 / limit.value:.4g}x{base}"


def _got(limit: Limit, report: Report) -> str:
    if limit.quantity == DROP:
        return _drop(report)
    if limit.quantity == LATENCY:
        return _latency(limit, report)
    changes = {MACS: (report.macs, count), PARAMS: (report.params, count), BYTES: (report.weight_bytes, size)}
    if limit.quantity == BYTES and report.precision == INT8:
        return "the weights are counted in int8, the files' sizes are in the report"
    change, form = changes[limit.quantity]
    share = f"{100 * change.grouped / change.dense:.1f}%, " if limit.relative and change.dense else ""
    return f"got {share}{form(change.grouped)} of {form(change.dense)}"


def _drop(report: Report) -> str:
    if report.metric is not None and report.chosen is not None and report.metric.recovered is None:
        return f"not measured by {report.metric.name} after the training"
    if report.metric is not None:
        return f"lost {report.metric.drop:.4g} by {report.metric.name}, of unknown error"
    int8 = report.int8 if report.precision == INT8 else None
    accuracy = report.accuracy
    changed = accuracy.changed if int8 is None else int8.changed
    if changed is not None:
        return f"{lost(changed)} on {changed.images} test images"
    after = accuracy.converted if accuracy.recovered is None else accuracy.recovered
    top1 = after if int8 is None else int8.top1
    if accuracy.dense is None or top1 is None:
        return "not measured on test images"
    drop = 100 * (accuracy.dense - top1)
    return f"lost {drop:.2f} points on {accuracy.images} test images, of unknown error"


def _latency(limit: Limit, report: Report) -> str:
    speed, within = _speed(limit, report)
    timed = report.latency_ms
    own = [one for one in variants(report) if (one.model, one.precision) == (GROUPED, report.precision)]
    if timed is None or not own or own[0].milliseconds is None:
        return "not timed"
    setting = f"{plural(timed.threads, 'thread')}, batch {timed.batch_size}"
    if not limit.relative or speed is None:
        return f"got {milliseconds(own[0].milliseconds)} ({setting})"
    return f"got {ratio_within(speed, within)} ({setting})"


def _speed(limit: Limit, report: Report) -> tuple[float | None, Range | None]:
    """The speed-up that the limit is about: over the dense model in the plan's precision, or in float32."""
    int8, latency = report.int8, report.latency_ms
    if report.precision == INT8:
        if int8 is None:
            return None, None
        if limit.of_float32:
            return int8.speed_up, int8.speed_up_range
        return int8.speed_up_over_dense_int8, int8.speed_up_over_dense_int8_range
    return (None, None) if latency is None else (latency.speed_up, latency.speed_up_range)
