"""Results as text tables: rich on a terminal, plain when piped."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Sequence
from typing import TextIO, cast

from rich.console import Console
from rich.table import Table
from rich.text import Text

from groupify.measure.folder import BenchResult
from groupify.reporting.results import ExportResult, Int8File, Report, UniformRun
from groupify.structures import Change, Plan, SitePlan

# Piped output is for grep and diff: no line may be folded.
_PIPED_WIDTH = 400
_COMFORTABLE_WIDTH = 140


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Let the command line decide what a closed pipe means; rich would exit with 1."""
        raise BrokenPipeError


class _WithoutTrailingSpaces:
    """A text stream for rich, which fills every table row up with spaces."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write(re.sub(r" +$", "", text, flags=re.MULTILINE))

    def flush(self) -> None:
        self._stream.flush()


def stdout_console() -> Console:
    """Return a console on stdout; without colour, box lines or folding when it is not a terminal."""
    console = _Console(highlight=False)
    if console.is_terminal:
        return console
    stream = cast(TextIO, _WithoutTrailingSpaces(sys.stdout))
    return _Console(file=stream, highlight=False, width=_PIPED_WIDTH, no_color=True)


def print_report(report: Report, console: Console) -> None:
    """Print the table of sites and the summary."""
    _print_sites(report.sites, console)
    console.print(summary_table(report, console))
    for line in report_lines(report):
        console.print(Text(line), soft_wrap=True)


def print_plan(plan: Plan, console: Console) -> None:
    """Print the table of sites and their totals."""
    _print_sites(plan.sites, console)
    table = plain_table(console, "convs", "dense", "grouped", "ratio", numeric=("dense", "grouped", "ratio"))
    for title, change in (("params", plan.params), ("MACs", plan.macs)):
        table.add_row(title, count(change.dense), count(change.grouped), ratio(change.ratio))
    console.print(table)
    console.print(f"{len(plan.converted)} of {len(plan.sites)} convs are converted")
    for note in plan.notes:
        console.print(Text(note), soft_wrap=True)


def print_bench(result: BenchResult, console: Console) -> None:
    """Print one row per engine and setting, and what does not depend on them."""
    columns = ("threads", "batch", "dense ms", "grouped ms", "speed-up", "efficiency", "images/s")
    numeric = columns[:-1] if is_narrow(console) else columns  # images/s only says the medians once more
    table = plain_table(console, "engine", *numeric, numeric=numeric)
    for row in result.rows:
        cells = (
            row.engine,
            str(row.threads),
            str(row.batch_size),
            _with_spread(row.median_ms.dense, row.dense_spread_ms),
            _with_spread(row.median_ms.grouped, row.grouped_spread_ms),
            ratio(row.speed_up),
            f"{row.efficiency:.2f}",
            f"{row.images_per_second.dense:.0f} → {row.images_per_second.grouped:.0f}",
        )
        table.add_row(*cells[: 1 + len(numeric)])
    console.print(table)
    dense, grouped = result.blocked_convs
    memory = result.peak_memory_bytes
    for line in (
        *_int8_lines(result),
        f"MAC ratio {ratio(result.macs.ratio)}; efficiency = speed-up ÷ MAC ratio; "
        "milliseconds as median (10–90%)",
        f"convs in ONNX Runtime's blocked kernel: dense {dense.blocked} of {dense.total}, "
        f"grouped {grouped.blocked} of {grouped.total}",
        f"peak memory of a fresh process: {size(memory.dense)} → {size(memory.grouped)}",
        f"machine: {result.machine}",
        *(f"note: {note}" for note in result.notes),
    ):
        console.print(Text(line), soft_wrap=True)


def _int8_lines(result: BenchResult) -> list[str]:
    lines = [
        f"int8, threads {row.threads}, batch {row.batch_size}: "
        f"{_with_spread(row.int8.median_ms, row.int8.spread_ms)} ms, "
        f"{row.int8.images_per_second:.0f} images/s, {ratio(row.int8.speed_up)} over dense, "
        f"{ratio(row.int8.speed_up_over_float)} over grouped float"
        for row in result.rows
        if row.int8 is not None
    ]
    if result.int8_peak_memory_bytes is not None and result.int8_blocked_convs is not None:
        blocked = result.int8_blocked_convs
        lines.append(
            f"int8: peak memory {size(result.int8_peak_memory_bytes)}, "
            f"{blocked.blocked} of {blocked.total} convs in the blocked kernel"
        )
    return lines


def _with_spread(median: float, spread: tuple[float, float]) -> str:
    return f"{median:.2f} ({spread[0]:.2f}–{spread[1]:.2f})"


def sites_table(sites: Sequence[SitePlan], console: Console) -> Table:
    """One row per conv: name, shape, groups before → after, params, MACs, reason.

    On a narrow terminal the texts are packed, and the reasons are numbers that ``reason_lines`` explains.
    """
    narrow = is_narrow(console)
    numbers = {reason: index for index, reason in enumerate(_reasons(sites), start=1)}
    last = "why" if narrow else "reason"
    table = plain_table(
        console, "site", "shape", "groups", "params", "MACs", last, numeric=("params", "MACs")
    )
    for site in sites:
        reason = site.reason or ""
        cells = (
            site.name or "(the model)",
            shape(site),
            _groups(site),
            _arrow(site.params, site.converted),
            _arrow(site.macs, site.converted),
            str(numbers.get(reason, "")) if narrow else reason,
        )
        table.add_row(*(_packed(cell) for cell in cells) if narrow else cells)
    return table


def reason_lines(sites: Sequence[SitePlan], console: Console) -> list[str]:
    """The reasons that the numbers in a narrow table stand for; none where the table holds the texts."""
    if not is_narrow(console):
        return []
    return [f"{index}: {reason}" for index, reason in enumerate(_reasons(sites), start=1)]


def is_narrow(console: Console) -> bool:
    """Whether a table of sites with texts would be folded beyond reading."""
    return console.is_terminal and console.width < _COMFORTABLE_WIDTH


def _reasons(sites: Sequence[SitePlan]) -> list[str]:
    return list(dict.fromkeys(site.reason for site in sites if site.reason))


def _packed(text: str) -> str:
    return text.replace(" → ", "→").replace(", ", " ").replace(" / ", "/").replace(" + ", "+")


def _groups(site: SitePlan) -> str:
    groups = f"{site.groups_before} → {site.groups}" if site.converted else f"{site.groups_before}"
    if site.kind == "grouped-pointwise":
        groups += " + 1×1"
    if site.shuffle:
        groups += " + shuffle"
    return groups


def _print_sites(sites: Sequence[SitePlan], console: Console) -> None:
    console.print(sites_table(sites, console))
    for line in reason_lines(sites, console):
        console.print(Text(line))
    console.print()


def summary_table(report: Report, console: Console) -> Table:
    """Totals: dense, grouped, ratio."""
    table = plain_table(console, "", "dense", "grouped", "ratio", numeric=("dense", "grouped", "ratio"))
    dense, grouped = report.cost.dense, report.cost.grouped
    rows = [
        ("params", count(dense.params), count(grouped.params), Change(dense.params, grouped.params).ratio),
        ("MACs", count(dense.macs), count(grouped.macs), Change(dense.macs, grouped.macs).ratio),
        _bytes_row("weight bytes", Change(dense.weight_bytes, grouped.weight_bytes)),
        _bytes_row("peak activation bytes", Change(dense.activation_bytes, grouped.activation_bytes)),
    ]
    if report.onnx_bytes is not None:
        rows.append(_bytes_row("ONNX file", report.onnx_bytes))
    if report.latency is not None:
        times = report.latency.milliseconds
        threads = f"{report.latency.threads} thread{'s' if report.latency.threads > 1 else ''}"
        rows.append(
            (
                f"latency ({threads}, batch {report.latency.batch_size})",
                f"{times.dense:.2f} ms",
                f"{times.grouped:.2f} ms",
                # On a busy machine the longer run is interrupted more often: the ratio may be anything.
                report.latency.speed_up if report.latency.steady else math.nan,
            )
        )
    for title, before, after, value in rows:
        table.add_row(title, before, after, ratio(value))
    return table


def report_lines(report: Report) -> list[str]:
    """The lines below the tables: accuracy, parity, weights, files, notes."""
    lines = []
    accuracy = report.accuracy
    steps = [
        f"{title} {100 * value:.2f}%"
        for title, value in (
            ("dense", accuracy.dense),
            ("converted", accuracy.converted),
            ("recovered", accuracy.recovered),
        )
        if value is not None
    ]
    if steps:
        lines.append(f"top-1 on {accuracy.images} test images: " + " → ".join(steps))
    lines.append(f"weights: {report.weights.sentence}; {report.calibration}")
    if report.parity is not None:
        lines.append(f"ONNX Runtime against PyTorch: largest difference {report.parity.max_abs_diff:.1e}")
    if report.shuffles is not None:
        lines.append(shuffles_line(report))
    if report.uniform:
        lines.append(uniform_line(report.uniform))
    if report.int8 is not None:
        lines.append(int8_line(report.int8))
    if report.machine is not None:
        lines.append(f"machine: {report.machine}")
    if report.latency is not None and not report.latency.steady:
        lines.append(
            "note: the machine was busy, so the latencies say little, their ratio nothing; time again with "
            "'groupify bench'"
        )
    lines.extend(f"note: {note}" for note in report.notes)
    if report.files:
        lines.append("wrote " + ", ".join(report.files.values()))
    return lines


def shuffles_line(report: Report) -> str:
    """How many places got a shuffle, and what that was decided on."""
    choice = report.shuffles
    if choice is None or not choice.places:
        return "shuffle auto: no grouped conv reads another, so no shuffle could gain"
    chosen = sum(place.chosen for place in choice.places)
    errors = [fit.error for fit in report.fits]
    now = f", {sum(errors) / len(errors):.4f} as chosen" if errors else ""
    return (
        f"shuffle auto: at {chosen} of {len(choice.places)} places; mean fitted error "
        f"{choice.error_without:.4f} without, {choice.error_with:.4f} with all{now}; latency "
        f"{choice.milliseconds_without:.2f} ms without, {choice.milliseconds_with:.2f} ms with all; "
        f"1% of latency had to save {choice.error_per_percent:g}"
    )


def uniform_line(runs: Sequence[UniformRun]) -> str:
    """Accuracy and latency of the same number of groups everywhere."""
    parts = (
        f"g={run.groups} {100 * run.top1:.2f}%"
        + ("" if run.milliseconds is None else f" in {run.milliseconds:.2f} ms")
        for run in runs
    )
    return "uniform groups, untrained: " + ", ".join(parts)


def int8_line(int8: Int8File) -> str:
    """Size, accuracy, agreement with the float file and latency of an int8 file, as far as measured."""
    agreement = int8.agreement
    parts = [size(int8.file_bytes)]
    if int8.top1 is not None:
        parts.append(f"top-1 {100 * int8.top1:.2f}%")
    if agreement.top1_agreement is not None:
        parts.append(
            f"same top-1 as float on {100 * agreement.top1_agreement:.1f}% of {agreement.images} images"
        )
    parts.append(
        f"largest difference {agreement.max_abs_diff:.2g} ({100 * agreement.max_rel_diff:.2g}% of the output)"
    )
    if int8.milliseconds is not None and int8.speed_up_over_float is not None:
        over_dense = "" if int8.speed_up is None else f"{ratio(int8.speed_up)} over dense and "
        parts.append(
            f"{int8.milliseconds:.2f} ms, {over_dense}{ratio(int8.speed_up_over_float)} over the float file"
        )
    return "int8: " + ", ".join(parts)


def export_lines(result: ExportResult) -> list[str]:
    """What was exported, how far it is from PyTorch, and the int8 file."""
    exported = result.exported
    lines = [
        f"wrote {', '.join(result.files.values())} ({exported.file_bytes} bytes, opset {exported.opset}); "
        f"ONNX Runtime against PyTorch: largest difference {result.parity.max_abs_diff:.1e}"
    ]
    if result.int8 is not None:
        lines.append(int8_line(result.int8))
    return [*lines, *(f"note: {note}" for note in result.notes)]


def shape(site: SitePlan) -> str:
    """``64 → 128, 3×3 / 2, 28×28``: channels, kernel, stride, output size."""
    kernel = "×".join(map(str, site.kernel_size))
    stride = f" / {'×'.join(map(str, site.stride))}" if set(site.stride) != {1} else ""
    if len(set(site.stride)) == 1 and stride:
        stride = f" / {site.stride[0]}"
    output = f", {'×'.join(map(str, site.output_size))}" if site.output_size else ""
    return f"{site.in_channels} → {site.out_channels}, {kernel}{stride}{output}"


def count(number: float) -> str:
    """``1814073344`` → ``1.81G``."""
    for factor, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g}{suffix}"
    return f"{number:g}"


def size(number: float) -> str:
    """``46796608`` → ``44.6 MiB``."""
    for factor, suffix in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= factor:
            return f"{number / factor:.1f} {suffix}"
    return f"{number:g} B"


def ratio(value: float) -> str:
    """``3.344`` → ``3.34×``; a dash where there is none."""
    return "–" if math.isnan(value) else f"{value:.2f}×"


def _bytes_row(title: str, change: Change[int]) -> tuple[str, str, str, float]:
    return title, size(change.dense), size(change.grouped), change.ratio


def _arrow(change: Change[int], changed: bool) -> str:
    return f"{count(change.dense)} → {count(change.grouped)}" if changed else count(change.dense)


def plain_table(console: Console, *titles: str, numeric: Sequence[str] = ()) -> Table:
    """Return an empty table without box lines, its titles bold on a terminal."""
    plain = not console.is_terminal
    table = Table(
        box=None,
        pad_edge=False,
        collapse_padding=is_narrow(console),
        header_style="" if plain else "bold",
    )
    for title in titles:
        justify = "right" if title in numeric else "left"
        table.add_column(title, justify=justify, no_wrap=plain)  # type: ignore[arg-type]
    return table
