"""Results as text: rich on a terminal, plain when piped, Markdown for a pull request."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence

from rich.console import Console

from groupify.measure.folder import BenchResult
from groupify.measure.onnx_files import FilesBench
from groupify.reporting.formatting import milliseconds, percent, ratio, size
from groupify.reporting.read import Run
from groupify.reporting.results import ExportResult, Int8File, Report, UniformRun
from groupify.reporting.sites import print_sites, site_table
from groupify.reporting.summary import comparison_table, totals_table, verdict
from groupify.reporting.tables import Table, escape, is_narrow, print_lines

# Of a run that has just ended, below its sites; and of one that somebody looks up.
_ALL = ("params", "MACs", "weight bytes", "peak activation bytes", "ONNX file", "latency")
_FIRST = ("top-1", "latency", "ONNX file", "params", "MACs")


def print_report(report: Report, console: Console) -> None:
    """Print the table of sites, the totals, and what there is to say besides."""
    print_sites(report.sites, console)
    totals_table(report, _ALL, "ratio").print(console)
    print_lines(report_lines(report), console)


def print_summary(runs: Sequence[Run], console: Console) -> None:
    """Print the verdicts and the summary as text."""
    named = [(f"{run.name}: " if len(runs) > 1 else "", run.report) for run in runs]
    print_lines((name + verdict(report) for name, report in named), console)
    console.print()
    summary(runs).print(console)
    print_lines((f"{name}note: {note}" for name, report in named for note in report.notes), console)
    print_lines(_machines(runs), console)


def markdown(runs: Sequence[Run]) -> str:
    """Return the summary as Markdown, with the sites folded away below; for a pull request."""
    parts = [f"**{escape(run.report.model)}: {verdict(run.report)}**" for run in runs if len(runs) == 1]
    parts.append(summary(runs).markdown())
    for run in runs:
        sites = run.report.sites
        title = f"{sum(site.converted for site in sites)} of {len(sites)} convolutions converted"
        title = title if len(runs) == 1 else f"{html.escape(run.name)}: {title}"
        table = site_table(sites).markdown()
        parts.append(f"<details><summary>{title}</summary>\n\n{table}\n\n</details>")
    parts += [f"<sub>{escape(line)}</sub>" for line in _machines(runs)]
    return "\n\n".join(parts) + "\n"


def summary(runs: Sequence[Run]) -> Table:
    """Return dense against grouped, or a row for each of several runs."""
    return totals_table(runs[0].report, _FIRST, "change") if len(runs) == 1 else comparison_table(runs)


def _machines(runs: Sequence[Run]) -> list[str]:
    machines = [run.report.machine for run in runs if run.report.machine is not None]
    lines = (
        f"{one.cpu} ({one.simd}, {one.cores} cores), torch {one.torch}, onnxruntime {one.onnxruntime}"
        for one in machines
    )
    return list(dict.fromkeys(lines))


def report_lines(report: Report) -> Iterator[str]:
    """The lines below the tables: accuracy, parity, weights, files, notes."""
    accuracy = report.accuracy
    steps = (("dense", accuracy.dense), ("converted", accuracy.converted), ("recovered", accuracy.recovered))
    shown = [f"{title} {percent(value)}" for title, value in steps if value is not None]
    if shown:
        yield f"top-1 on {accuracy.images} test images: " + " → ".join(shown)
    yield f"weights: {report.weights.sentence}; {report.calibration}"
    if report.parity is not None:
        yield f"ONNX Runtime against PyTorch: largest difference {report.parity.max_abs_diff:.1e}"
    if report.uniform:
        yield uniform_line(report.uniform)
    if report.int8 is not None:
        yield int8_line(report.int8)
    if report.cpu is not None:
        yield f"planned for {report.cpu}"
    if report.machine is not None:
        yield f"machine: {report.machine}"
    if report.latency_ms is not None and not report.latency_ms.steady:
        yield (
            "note: the machine was busy, so the latencies say little, their ratio nothing; time again with "
            "'groupify bench'"
        )
    yield from (f"note: {note}" for note in report.notes)
    if report.files:
        yield "wrote " + ", ".join(report.files.values())


def uniform_line(runs: Sequence[UniformRun]) -> str:
    """Accuracy and latency of the same number of groups everywhere."""
    parts = (
        f"g={run.groups} {percent(run.top1)}"
        + ("" if run.milliseconds is None else f" in {milliseconds(run.milliseconds)}")
        for run in runs
    )
    return "uniform groups, untrained: " + ", ".join(parts)


def int8_line(int8: Int8File) -> str:
    """Size, accuracy, agreement with the float file and latency of an int8 file, as far as measured."""
    return "int8: " + ", ".join(_int8_parts(int8))


def _int8_parts(int8: Int8File) -> Iterator[str]:
    agreement = int8.agreement
    yield size(int8.file_bytes)
    if int8.top1 is not None:
        yield f"top-1 {percent(int8.top1)}"
    if agreement.top1_agreement is not None:
        yield f"same top-1 as float on {100 * agreement.top1_agreement:.1f}% of {agreement.images} images"
    relative = f"{100 * agreement.max_rel_diff:.2g}% of the output"
    yield f"largest difference {agreement.max_abs_diff:.2g} ({relative})"
    if int8.milliseconds is not None and int8.speed_up_over_float is not None:
        over_dense = "" if int8.speed_up is None else f"{ratio(int8.speed_up)} over dense and "
        yield milliseconds(int8.milliseconds)
        yield f"{over_dense}{ratio(int8.speed_up_over_float)} over the float file"


def export_lines(result: ExportResult) -> Iterator[str]:
    """What was exported, how far it is from PyTorch, and the int8 file."""
    exported = result.exported
    yield (
        f"wrote {', '.join(result.files.values())} ({exported.file_bytes} bytes, opset {exported.opset}); "
        f"ONNX Runtime against PyTorch: largest difference {result.parity.max_abs_diff:.1e}"
    )
    if result.int8 is not None:
        yield int8_line(result.int8)
    yield from (f"note: {note}" for note in result.notes)


def print_bench(result: BenchResult, console: Console) -> None:
    """Print one row per engine and setting, and what does not depend on them."""
    header: tuple[str, ...]
    header = ("engine", "threads", "batch", "dense ms", "grouped ms", "speed-up", "efficiency", "images/s")
    if is_narrow(console):
        header = header[:-1]  # images/s only says the medians once more
    rows = [
        (
            row.engine,
            str(row.threads),
            str(row.batch_size),
            _with_spread(row.median_ms.dense, row.dense_spread_ms),
            _with_spread(row.median_ms.grouped, row.grouped_spread_ms),
            ratio(row.speed_up),
            f"{row.efficiency:.2f}",
            f"{row.images_per_second.dense:.0f} → {row.images_per_second.grouped:.0f}",
        )[: len(header)]
        for row in result.rows
    ]
    Table(header, tuple(rows), words=("engine",)).print(console)
    print_lines((*_int8_bench_lines(result), *_bench_lines(result)), console)


def print_files_bench(result: FilesBench, console: Console) -> None:
    """Print one row per setting and file, and what the files are."""
    header = ("file", "threads", "batch", "ms", "speed-up", "images/s")
    rows = [
        (
            row.path,
            str(row.threads),
            str(row.batch_size),
            _with_spread(row.median_ms, row.spread_ms),
            ratio(row.speed_up),
            f"{row.images_per_second:.0f}",
        )
        for row in result.rows
    ]
    Table(header, tuple(rows), words=("file",)).print(console)
    print_lines(_files_lines(result), console)


def _files_lines(result: FilesBench) -> Iterator[str]:
    yield f"on {result.provider}; speed-up over the first file; milliseconds as median (10–90%)"
    for file in result.files:
        kind = "int8" if file.quantised else "float"
        blocked = file.blocked_convs
        convs = (
            "" if blocked is None else f", {blocked.blocked} of {blocked.total} convs in the blocked kernel"
        )
        yield f"{file.path}: {kind}, {size(file.file_bytes)}, opset {file.opset or 'none'}{convs}"
    yield f"machine: {result.machine}"
    yield from (f"note: {note}" for note in result.notes)


def _bench_lines(result: BenchResult) -> Iterator[str]:
    dense, grouped = result.blocked_convs["dense"], result.blocked_convs["grouped"]
    memory = result.peak_memory_bytes
    yield (
        f"MAC ratio {ratio(result.mac_ratio)}; efficiency = speed-up ÷ MAC ratio; "
        "milliseconds as median (10–90%)"
    )
    yield (
        f"convs in ONNX Runtime's blocked kernel: dense {dense.blocked} of {dense.total}, "
        f"grouped {grouped.blocked} of {grouped.total}"
    )
    yield f"peak memory of a fresh process: {size(memory.dense)} → {size(memory.grouped)}"
    yield f"machine: {result.machine}"
    yield from (f"note: {note}" for note in result.notes)


def _int8_bench_lines(result: BenchResult) -> Iterator[str]:
    for row in result.rows:
        if row.int8 is not None:
            yield (
                f"int8, threads {row.threads}, batch {row.batch_size}: "
                f"{_with_spread(row.int8.median_ms, row.int8.spread_ms)} ms, "
                f"{row.int8.images_per_second:.0f} images/s, {ratio(row.int8.speed_up)} over dense, "
                f"{ratio(row.int8.speed_up_over_float)} over grouped float"
            )
    if result.int8_peak_memory_bytes is not None and result.int8_blocked_convs is not None:
        blocked = result.int8_blocked_convs
        yield (
            f"int8: peak memory {size(result.int8_peak_memory_bytes)}, "
            f"{blocked.blocked} of {blocked.total} convs in the blocked kernel"
        )


def _with_spread(median: float, spread: tuple[float, float]) -> str:
    return f"{median:.2f} ({spread[0]:.2f}–{spread[1]:.2f})"
