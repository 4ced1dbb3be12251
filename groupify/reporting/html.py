"""Reports as pages: one file each, with nothing to fetch."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from PIL import Image

from groupify.conversion.pictures import BlockPicture
from groupify.reporting.asked import asked_lines
from groupify.reporting.charts import Point, chart
from groupify.reporting.formatting import (
    UNCERTAIN,
    count,
    extras,
    milliseconds,
    percent,
    plural,
    points,
    ratio,
    ratio_within,
    size,
)
from groupify.reporting.outcome import metric_lines
from groupify.reporting.plane import accuracy_steps, comparison_plane, report_plane
from groupify.reporting.read import Run
from groupify.reporting.results import Report
from groupify.reporting.summary import comparison_sentence, totals, verdict
from groupify.reporting.trained import training_lines
from groupify.reporting.variants import (
    DENSE,
    GROUPED,
    Variant,
    headline,
    is_known,
    speed_up_text,
    variants,
    variants_table,
)
from groupify.structures import Change, SitePlan

_BLUE = (37, 99, 235)  # stands out on white and on black


@dataclass(frozen=True)
class Tile:
    """One number at the top: what, how much, from what to what."""

    title: str
    value: str
    detail: str


@dataclass(frozen=True)
class Bar:
    """One cell of a table: a bar for the dense value, one for the grouped, and what hovering shows."""

    sort: float
    text: str
    title: str
    dense: float  # percent of the longest bar
    grouped: float


@dataclass(frozen=True)
class SiteRow:
    """One conv in the table; what was not measured has no bar."""

    site: SitePlan
    params: Bar
    macs: Bar
    latency: Bar | None
    error: Bar | None


def report_page(run: Run, others: Sequence[Run] = ()) -> str:
    """Return the page of one report; ``others`` are drawn beside it in the accuracy–latency plane."""
    report = run.report
    sites = _site_rows(report)
    return _environment().get_template("report.html.j2").render(
        run=run,
        report=report,
        title=f"{report.model} · {run.name}",
        verdict=verdict(report),
        asked=list(asked_lines(report)),
        trained=[*metric_lines(report.metric), *training_lines(report)],
        tiles=_tiles(report),
        precisions=None if report.int8 is None else variants_table(report),
        plane=report_plane(report, others),
        curves=_curves(report),
        steps=accuracy_steps(report),
        sites=sites,
        timed=any(row.latency is not None for row in sites),
        fitted=any(row.error is not None for row in sites),
        skipped=_skipped(report),
        pictures=[(picture, *map(_data_uri, _images(picture))) for picture in report.pictures],
    )  # fmt: skip


def comparison_page(runs: Sequence[Run]) -> str:
    """Return the page that compares several reports."""
    return _environment().get_template("comparison.html.j2").render(
        title=f"{len(runs)} runs compared",
        verdict=comparison_sentence(runs),
        rows=_run_rows(runs),
        runs=len(runs),
        plane=comparison_plane(runs),
        machines=sorted({_machine(run.report) for run in runs}),
    )  # fmt: skip


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("groupify.reporting", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=percent, size=size, count=count, milliseconds=milliseconds, extras=extras
    )
    environment.globals.update(plural=plural, isnan=math.isnan)
    return environment


def _tiles(report: Report) -> list[Tile]:
    found, first = totals(report), headline(report)
    dense, grouped = first.dense, first.grouped
    tiles = []
    if report.latency_ms is not None:
        value = UNCERTAIN if first.speed_up is None else ratio_within(first.speed_up, first.within)
        tiles.append(Tile("latency", value, _from_to(milliseconds, dense.milliseconds, grouped.milliseconds)))
    if first.shrunk is not None:
        detail = _from_to(size, dense.file_bytes, grouped.file_bytes)
        tiles.append(Tile("ONNX file", ratio(first.shrunk), detail))
    for name in ("params", "MACs"):
        tiles.append(Tile(name, found[name].change, f"{found[name].dense} → {found[name].grouped}"))
    if first.lost is not None:
        value = "±0.0" if abs(first.lost) < 0.05 else points(-first.lost, 1)
        tiles.append(Tile("top-1, points", value, _from_to(percent, dense.top1, grouped.top1)))
    return tiles


def _from_to(form: Callable[[Any], str], dense: float | None, grouped: float | None) -> str:
    return f"{form(dense)} → {form(grouped)}"


# Training ----------------------------------------------------------------------------------------


def _curves(report: Report) -> list[tuple[str, str]]:
    """Losses and accuracy over the fine-tune, name and SVG; none without training."""
    history = report.history
    if len(history) < 2:
        return []
    top1 = [(row.epoch, row.validation_top1) for row in history]
    accuracies = [(epoch, 100 * value) for epoch, value in top1 if value is not None]
    losses = [(row.epoch, row.loss) for row in history if row.loss is not None]
    validated = [(row.epoch, row.validation_loss) for row in history]
    curves = (
        ("Validation loss", "loss", validated),
        ("Validation accuracy", "top-1, %", accuracies),
        ("Training loss", "loss", losses),
    )
    return [(name, _curve(name, title, values)) for name, title, values in curves if values]


def _curve(name: str, title: str, values: Sequence[tuple[float, float]]) -> str:
    marks = [Point(epoch, value, "small", f"epoch {epoch:.2f}: {value:.3g}") for epoch, value in values]
    lines = [("curve", marks)]
    return chart(name, marks, x_title="epoch", y_title=title, from_zero=True, lines=lines)


# Convolution by convolution -----------------------------------------------------------------------


def _site_rows(report: Report) -> list[SiteRow]:
    sites, times = report.sites, report.site_milliseconds
    errors = {fit.name: fit.error for fit in report.fits if not math.isnan(fit.error)}
    params = _bars([site.params for site in sites], count)
    macs = _bars([site.macs for site in sites], count)
    return [
        SiteRow(site, *bars, _time_bar(site.name, times), _error_bar(site.name, errors))
        for site, bars in zip(sites, zip(params, macs, strict=True), strict=True)
    ]


def _bars(changes: Sequence[Change[int]], form: Callable[[float], str]) -> list[Bar]:
    most = max((change.dense for change in changes), default=0) or 1
    return [
        Bar(
            change.grouped,
            form(change.grouped),
            f"{form(change.dense)} → {form(change.grouped)}"
            + (f", {ratio(change.ratio)} fewer" if change.dense and change.grouped else ""),
            100 * change.dense / most,
            100 * change.grouped / most,
        )
        for change in changes
    ]


def _time_bar(name: str, times: Mapping[str, Change[float]]) -> Bar | None:
    time = times.get(name)
    if time is None or math.isnan(time.grouped):
        return None
    known = [value for change in times.values() for value in (change.dense, change.grouped) if value > 0]
    total = sum(change.dense for change in times.values() if change.dense > 0) or 1.0
    slowest = max(known, default=1.0)
    dense = 0.0 if math.isnan(time.dense) else time.dense
    before = "not measured" if math.isnan(time.dense) else f"{dense:.3f} ms"
    title = f"dense {before}, {100 * dense / total:.0f}% of all convs; now {time.grouped:.3f} ms"
    return Bar(
        time.grouped, f"{time.grouped:.3f}", title, 100 * dense / slowest, 100 * time.grouped / slowest
    )


def _error_bar(name: str, errors: Mapping[str, float]) -> Bar | None:
    if name not in errors:
        return None
    error, worst = errors[name], max(errors.values()) or 1.0
    title = f"{100 * error:.3g}% of the variance of its outputs is missed on the calibration images"
    return Bar(error, f"{100 * error:.3g}%", title, 0, 100 * error / worst)


def _skipped(report: Report) -> list[tuple[str, list[str]]]:
    """Names of the convs left dense, by reason."""
    reasons: dict[str, list[str]] = {}
    for site in report.sites:
        if not site.converted:
            reasons.setdefault(site.reason or "not asked for", []).append(site.name)
    return list(reasons.items())


def _images(picture: BlockPicture) -> list[Image.Image]:
    """How strong each connection is, before and after, as the opacity of a blue."""
    images = []
    for values in (picture.before, picture.after):
        image = Image.new("RGBA", (picture.columns, picture.rows), _BLUE)
        image.putalpha(Image.frombytes("L", image.size, values))
        images.append(image)
    return images


def _data_uri(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _run_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row for each converted model in each precision; with int8, the dense models of the first run too."""
    rows = []
    several = [run for run in runs if run.report.int8 is not None]
    for run in several[:1]:
        rows += [_run_row(run, one, one.name) for one in variants(run.report) if one.model == DENSE]
    for run in runs:
        for one in variants(run.report):
            if one.model == GROUPED:
                rows.append(_run_row(run, one, f"{run.name}, {one.precision}" if several else run.name))
    return rows


def _run_row(run: Run, one: Variant, name: str) -> dict[str, Any]:
    report = run.report
    dense = report.accuracy.dense
    groups = sorted({site.groups for site in report.sites if site.groups > 1})
    return {
        "name": name,
        "model": report.model,
        "groups": "" if one.model == DENSE else ", ".join(map(str, groups)),
        "speed_up": one.speed_up if is_known(one.within, report) else None,
        "speed_up_text": speed_up_text(one.speed_up, one.within, report),
        "milliseconds": one.milliseconds,
        "bytes": one.file_bytes,
        "top1": one.top1,
        "lost": None if dense is None or one.top1 is None else 100 * (dense - one.top1),
        "params": report.params.dense if one.model == DENSE else report.params.grouped,
        "macs": report.macs.dense if one.model == DENSE else report.macs.grouped,
        "verdict": verdict(report),
    }


def _machine(report: Report) -> str:
    machine = report.machine
    if machine is None:
        return "unknown machine"
    return f"{machine.cpu} ({machine.simd}), onnxruntime {machine.onnxruntime}"
