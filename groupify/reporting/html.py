"""Reports as pages: one file each, with nothing to fetch."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from groupify.reporting.charts import Point, chart
from groupify.reporting.pixels import png_uri
from groupify.reporting.read import Run
from groupify.reporting.text import count, ratio, size
from groupify.reporting.verdict import (
    UNCERTAIN,
    final_accuracy,
    points_lost,
    ratio_of,
    steady_speed_up,
    verdict,
)

_LABELLED = 8  # more names in one chart would hide each other; hovering shows them


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


def report_page(run: Run, others: Sequence[Run] = ()) -> str:
    """Return the page of one report; ``others`` are drawn beside it in the accuracy–latency plane."""
    document = run.document
    sites = _site_rows(document)
    return _environment().get_template("report.html.j2").render(
        run=run,
        document=document,
        title=f"{document['model']} · {run.name}",
        verdict=verdict(document),
        tiles=_tiles(document),
        plane=_plane(run, others),
        curves=_curves(document),
        accuracies=_accuracies(document),
        sites=sites,
        timed=any(row["latency"] is not None for row in sites),
        fitted=any(row["error"] is not None for row in sites),
        skipped=_skipped(document),
        pictures=[_picture(picture) for picture in document["pictures"]],
    )  # fmt: skip


def comparison_page(runs: Sequence[Run]) -> str:
    """Return the page that compares several reports."""
    rows = [_run_row(run) for run in runs]
    best = max(runs, key=lambda run: steady_speed_up(run.document) or 0)
    return _environment().get_template("comparison.html.j2").render(
        title=f"{len(runs)} runs compared",
        verdict=f"{len(runs)} runs: the fastest, {best.name}, is {verdict(best.document)}",
        rows=rows,
        plane=_plane(None, runs),
        machines=sorted({_machine(run.document) for run in runs}),
    )  # fmt: skip


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("groupify.reporting", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=percent, size=size, count=count)
    return environment


def percent(value: float | None) -> str:
    """A fraction in percent; a dash where there is none."""
    return "–" if value is None else f"{100 * value:.2f}%"


def _tiles(document: dict[str, Any]) -> list[Tile]:
    tiles = []
    latency, accuracy = document["latency_ms"], document["accuracy"]
    if latency is not None:
        speed_up = steady_speed_up(document)
        tiles.append(
            Tile(
                "latency",
                UNCERTAIN if speed_up is None else ratio(speed_up),
                f"{latency['dense']:.2f} → {latency['grouped']:.2f} ms",
            )
        )
    for title, key, form in (
        ("ONNX file", "onnx_bytes", size), ("params", "params", count), ("MACs", "macs", count)
    ):  # fmt: skip
        value = ratio_of(document[key])
        if value is not None:
            change = document[key]
            tiles.append(Tile(title, ratio(value), f"{form(change['dense'])} → {form(change['grouped'])}"))
    lost = points_lost(document)
    if lost is not None:
        points = "±0.0" if abs(lost) < 0.05 else f"{-lost:+.1f}".replace("-", "−")
        detail = f"{percent(accuracy['dense'])} → {percent(final_accuracy(document))}"
        tiles.append(Tile("top-1, points", points, detail))
    return tiles


def _accuracies(document: dict[str, Any]) -> list[tuple[str, str, float]]:
    """Title, value and place on a scale of 0 to 100 of each measured accuracy."""
    found = [
        (title, document["accuracy"][title])
        for title in ("dense", "converted", "recovered")
        if document["accuracy"][title] is not None
    ]
    if not found:
        return []
    low, high = min(value for _, value in found), max(value for _, value in found)
    span = max(high - low, 0.005)
    return [(title, percent(value), round(8 + 84 * (value - low) / span, 1)) for title, value in found]


def _plane(run: Run | None, others: Sequence[Run]) -> tuple[str, str] | None:
    """Accuracy against latency, name and SVG; None where nothing has both."""
    points, line = [], []
    if run is not None and run.document["latency_ms"] is not None:
        latency, accuracy = run.document["latency_ms"], run.document["accuracy"]
        trained = accuracy["recovered"] is not None and accuracy["recovered"] != accuracy["converted"]
        for look, milliseconds in (
            ("dense", latency["dense"]), ("converted", latency["grouped"]), ("recovered", latency["grouped"])
        ):  # fmt: skip
            if accuracy[look] is not None and (trained or look != "recovered"):
                title = _title(look, milliseconds, accuracy[look])
                points.append(Point(milliseconds, 100 * accuracy[look], look, title, look))
        line = list(points)
        int8 = run.document.get("int8")
        if int8 and int8["milliseconds"] and int8["top1"] is not None:
            title = _title("int8", int8["milliseconds"], int8["top1"])
            points.append(Point(int8["milliseconds"], 100 * int8["top1"], "recovered", title, "int8"))
        for uniform in run.document.get("uniform", ()):
            if uniform["milliseconds"] is not None:
                name = f"uniform g={uniform['groups']}"
                title = _title(f"{name}, untrained", uniform["milliseconds"], uniform["top1"])
                points.append(Point(uniform["milliseconds"], 100 * uniform["top1"], "uniform", title, name))
    measured = [
        (other, final_accuracy(other.document))
        for other in others
        if other.document["latency_ms"] is not None and final_accuracy(other.document) is not None
    ]
    for other, top1 in measured:
        milliseconds = other.document["latency_ms"]["grouped"]
        label = other.name if len(measured) <= _LABELLED else ""
        look = "other" if run is not None else "recovered"
        points.append(
            Point(milliseconds, 100 * (top1 or 0), look, _title(other.name, milliseconds, top1), label)
        )
    if run is None and measured:
        document = measured[0][0].document
        milliseconds, top1 = document["latency_ms"]["dense"], document["accuracy"]["dense"]
        if top1 is not None:
            title = _title("dense", milliseconds, top1)
            points.append(Point(milliseconds, 100 * top1, "dense", title, "dense"))
    if not points:
        return None
    name = "Accuracy against latency"
    return name, chart(
        name, points, x_title="latency, ms", y_title="top-1, %", from_zero=True, lines=[("trace", line)]
    )


def _title(name: str, milliseconds: float, top1: float | None) -> str:
    return f"{name}: {milliseconds:.2f} ms, {percent(top1)}"


def _curves(document: dict[str, Any]) -> list[tuple[str, str]]:
    """Validation accuracy and training loss over the fine-tune, name and SVG; none without training."""
    history = document["history"]
    if len(history) < 2:
        return []
    kinds = (
        ("Validation accuracy", "validation_top1", "top-1, %", 100.0),
        ("Training loss", "loss", "loss", 1.0),
    )
    charts = []
    for name, key, title, factor in kinds:
        points = [
            Point(
                row["epoch"], factor * row[key], "small", f"epoch {row['epoch']:.2f}: {factor * row[key]:.3g}"
            )
            for row in history
            if row[key] is not None
        ]
        if points:
            lines = [("curve", points)]
            drawn = chart(name, points, x_title="epoch", y_title=title, from_zero=True, lines=lines)
            charts.append((name, drawn))
    return charts


def _site_rows(document: dict[str, Any]) -> list[dict[str, Any]]:
    errors = {fit["name"]: fit["error"] for fit in document["fits"]}
    times = document["site_milliseconds"]
    sites = document["sites"]
    most = {key: max((site[key]["dense"] for site in sites), default=0) or 1 for key in ("params", "macs")}
    dense_total = sum(change["dense"] or 0 for change in times.values()) or 1.0
    slowest = max(
        (max(change["dense"] or 0, change["grouped"] or 0) for change in times.values()), default=0
    ) or 1.0  # fmt: skip
    worst = max((error for error in errors.values() if error is not None), default=0) or 1.0
    rows = []
    for site in sites:
        time, error = times.get(site["name"]), errors.get(site["name"])
        rows.append(
            {
                "site": site,
                "converted": site["groups"] != site["groups_before"] or site["kind"] != "dense",
                "params": _change_bar(site["params"], most["params"], count),
                "macs": _change_bar(site["macs"], most["macs"], count),
                "latency": None
                if time is None or time["grouped"] is None
                else Bar(
                    time["grouped"],
                    f"{time['grouped']:.3f}",
                    f"dense {_milliseconds(time['dense'])}, {100 * (time['dense'] or 0) / dense_total:.0f}% "
                    f"of all convs; now {time['grouped']:.3f} ms",
                    100 * (time["dense"] or 0) / slowest,
                    100 * time["grouped"] / slowest,
                ),
                "error": None
                if error is None
                else Bar(
                    error,
                    f"{error:.3f}",
                    f"{100 * error:.1f}% of the variance is lost",
                    0,
                    100 * error / worst,
                ),
            }
        )
    return rows


def _milliseconds(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3f} ms"


def _change_bar(change: dict[str, Any], most: float, form: Any) -> Bar:
    dense, grouped = change["dense"], change["grouped"]
    value = ratio_of(change)
    title = f"{form(dense)} → {form(grouped)}" + ("" if value is None else f", {ratio(value)} fewer")
    return Bar(grouped, form(grouped), title, 100 * dense / most, 100 * grouped / most)


def _skipped(document: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """Names of the convs left dense, by reason."""
    reasons: dict[str, list[str]] = {}
    for site in document["sites"]:
        if site["kind"] == "dense":
            reasons.setdefault(site["reason"] or "not asked for", []).append(site["name"])
    return list(reasons.items())


def _picture(picture: dict[str, Any]) -> dict[str, Any]:
    uris = {
        name: png_uri(base64.b64decode(picture[name]), picture["columns"]) for name in ("before", "after")
    }
    return {**picture, **uris}


def _run_row(run: Run) -> dict[str, Any]:
    document = run.document
    latency = document["latency_ms"]
    return {
        "run": run,
        "model": document["model"],
        "groups": ", ".join(
            map(str, sorted({site["groups"] for site in document["sites"] if site["groups"] > 1}))
        ),
        "speed_up": steady_speed_up(document),
        "milliseconds": None if latency is None else latency["grouped"],
        "params": document["params"]["grouped"],
        "macs": document["macs"]["grouped"],
        "bytes": document["onnx_bytes"]["grouped"],
        "top1": final_accuracy(document),
        "lost": points_lost(document),
        "verdict": verdict(document),
    }


def _machine(document: dict[str, Any]) -> str:
    machine = document["machine"]
    return (
        "unknown machine"
        if machine is None
        else f"{machine['cpu']} ({machine['simd']}), onnxruntime {machine['onnxruntime']}"
    )
