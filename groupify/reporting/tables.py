"""Reports as small tables, for a terminal or a pull request, read from their JSON documents."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from groupify.reporting.read import Run
from groupify.reporting.text import count, plain_table, ratio, size
from groupify.reporting.verdict import (
    UNCERTAIN,
    final_accuracy,
    points_lost,
    ratio_of,
    steady_speed_up,
    verdict,
)


@dataclass(frozen=True)
class Table:
    """A header and rows of as many cells; the first column is text, and so is one of reasons."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def summary(runs: Sequence[Run]) -> Table:
    """Return what a reader wants to know first: dense against grouped, or a row for each of several runs."""
    return _one(runs[0].document) if len(runs) == 1 else _several(runs)


def markdown(runs: Sequence[Run]) -> str:
    """Return the summary as Markdown, with the sites folded away below; for a pull request."""
    parts = []
    if len(runs) == 1:
        parts.append(f"**{_escape(runs[0].document['model'])}: {verdict(runs[0].document)}**")
    parts.append(_markdown_table(summary(runs)))
    for run in runs:
        sites = run.document["sites"]
        converted = [site for site in sites if site["kind"] != "dense"]
        title = f"{len(converted)} of {len(sites)} convolutions converted"
        title = title if len(runs) == 1 else f"{html.escape(run.name)}: {title}"
        table = _markdown_table(_sites(sites))
        parts.append(f"<details><summary>{title}</summary>\n\n{table}\n\n</details>")
    parts += [f"<sub>{_escape(line)}</sub>" for line in _machines(runs)]
    return "\n\n".join(parts) + "\n"


def print_summary(runs: Sequence[Run], console: Console) -> None:
    """Print the verdicts and the summary as text."""
    names = [f"{run.name}: " if len(runs) > 1 else "" for run in runs]
    for name, run in zip(names, runs, strict=True):
        console.print(Text(name + verdict(run.document)), soft_wrap=True)
    console.print()
    table = summary(runs)
    rich: RichTable = plain_table(console, *table.header, numeric=table.header[1:])
    for row in table.rows:
        rich.add_row(*map(Text, row))
    console.print(rich)
    for name, run in zip(names, runs, strict=True):
        for note in run.document["notes"]:
            console.print(Text(f"{name}note: {note}"), soft_wrap=True)
    for line in _machines(runs):
        console.print(Text(line), soft_wrap=True)


def _one(document: dict[str, Any]) -> Table:
    rows = []
    lost = points_lost(document)
    if lost is not None:
        dense, now = 100 * document["accuracy"]["dense"], 100 * (final_accuracy(document) or 0)
        rows.append(("top-1", f"{dense:.2f}%", f"{now:.2f}%", _points(-lost)))
    latency = document["latency_ms"]
    if latency is not None:
        setting = f"latency ({latency['threads']} thread{'s' if latency['threads'] > 1 else ''}, "
        setting += f"batch {latency['batch_size']})"
        times = (f"{latency['dense']:.2f} ms", f"{latency['grouped']:.2f} ms", _speed_up(document))
        rows.append((setting, *times))
    for title, key, form in (
        ("ONNX file", "onnx_bytes", size), ("params", "params", count), ("MACs", "macs", count)
    ):  # fmt: skip
        change = document[key]
        value = ratio_of(change)
        if value is not None:
            rows.append((title, form(change["dense"]), form(change["grouped"]), ratio(value)))
    return Table(("", "dense", "grouped", "change"), tuple(rows))


def _speed_up(document: dict[str, Any]) -> str:
    value = steady_speed_up(document)
    return UNCERTAIN if value is None else ratio(value)


def _several(runs: Sequence[Run]) -> Table:
    rows = []
    for run in runs:
        document, lost = run.document, points_lost(run.document)
        latency, top1 = document["latency_ms"], final_accuracy(document)
        rows.append(
            (
                run.name,
                "–" if top1 is None else f"{100 * top1:.2f}%",
                "–" if lost is None else _points(-lost),
                "–" if latency is None else f"{latency['grouped']:.2f} ms",
                "–" if latency is None else _speed_up(document),
                count(document["params"]["grouped"]),
                count(document["macs"]["grouped"]),
            )
        )
    return Table(("run", "top-1", "change", "latency", "speed-up", "params", "MACs"), tuple(rows))


def _sites(sites: Sequence[dict[str, Any]]) -> Table:
    rows = []
    for site in sites:
        groups = str(site["groups"]) + (" + 1×1" if site["kind"] == "grouped-pointwise" else "")
        groups += " + shuffle" if site["shuffle"] else ""
        values = (site["params"], site["macs"])
        changes = [f"{count(change['dense'])} → {count(change['grouped'])}" for change in values]
        if site["kind"] == "dense":
            changes = [count(change["grouped"]) for change in values]
        rows.append((site["name"], groups, *changes, site["reason"] or ""))
    return Table(("site", "groups", "params", "MACs", "reason"), tuple(rows))


def _markdown_table(table: Table) -> str:
    sides = ("---" if title in (table.header[0], "reason") else "---:" for title in table.header)
    lines = [table.header, tuple(sides), *table.rows]
    return "\n".join("| " + " | ".join(_escape(cell) for cell in line) + " |" for line in lines)


def _points(points: float) -> str:
    return f"{points:+.2f} points".replace("-", "−")


def _escape(text: str) -> str:
    """What a page of Markdown would take for its own, in a name that comes from outside."""
    return " ".join(re.sub(r"([\\|`*<>\[\]])", r"\\\1", text).split())


def _machines(runs: Sequence[Run]) -> list[str]:
    lines = []
    for run in runs:
        machine = run.document["machine"]
        if machine is not None:
            lines.append(
                f"{machine['cpu']} ({machine['simd']}, {machine['cores']} cores), torch {machine['torch']}, "
                f"onnxruntime {machine['onnxruntime']}"
            )
    return list(dict.fromkeys(lines))
