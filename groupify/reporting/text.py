"""Results as text: rich on a terminal, plain when piped, Markdown for a pull request."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from groupify.measure.folder import DENSE, GROUPED, BenchResult, BenchRow
from groupify.measure.onnx_files import FilesBench
from groupify.reporting.asked import asked_lines
from groupify.reporting.formatting import milliseconds, percent, ratio, size
from groupify.reporting.outcome import metric_lines, with_error
from groupify.reporting.read import Run
from groupify.reporting.results import ExportResult, Int8File, Report, UniformRun
from groupify.reporting.sites import print_sites, site_table
from groupify.reporting.summary import comparison_sentence, comparison_table, totals_table, verdict
from groupify.reporting.tables import Table, escape, is_narrow, print_lines
from groupify.reporting.trained import training_lines
from groupify.reporting.variants import variants_table
from groupify.structures import FLOAT32, INT8

# Of a run that has just ended, below its sites; and of one that somebody looks up. With int8, the last of the
# one and the first of the other have a table of their own.
_ALL = ("params", "MACs", "weight bytes", "peak activation bytes")
_FIRST = ("params", "MACs")
_IN_EACH_PRECISION = ("top-1", "latency", "ONNX file")


def print_report(report: Report, console: Console) -> None:
    """Print the table of sites, the totals, and what there is to say besides."""
    print_sites(report.sites, console)
    if report.int8 is None:
        totals_table(report, (*_ALL, "ONNX file", "latency"), "ratio").print(console)
    else:
        totals_table(report, _ALL, "ratio").print(console)
        variants_table(report).print(console)
    print_lines(report_lines(report), console)


def print_summary(runs: Sequence[Run], console: Console) -> None:
    """Print the verdicts and the summary as text."""
    named = [(f"{run.name}: " if len(runs) > 1 else "", run.report) for run in runs]
    if len(runs) > 1:
        print_lines([comparison_sentence(runs)], console)
    print_lines((name + verdict(report) for name, report in named), console)
    console.print()
    for table in summary(runs):
        table.print(console)
    print_lines((name + line for name, report in named for line in _said(report)), console)
    print_lines((f"{name}note: {note}" for name, report in named for note in report.notes), console)
    print_lines(_machines(runs), console)


def markdown(runs: Sequence[Run]) -> str:
    """Return the summary as Markdown, with the sites folded away below; for a pull request."""
    alone = f"{runs[0].report.model}: {verdict(runs[0].report)}"
    parts = [f"**{escape(alone if len(runs) == 1 else comparison_sentence(runs))}**"]
    parts += [table.markdown() for table in summary(runs)]
    for run in runs:
        sites = run.report.sites
        title = f"{sum(site.converted for site in sites)} of {len(sites)} convolutions converted"
        title = title if len(runs) == 1 else f"{html.escape(run.name)}: {title}"
        table = site_table(sites).markdown()
        parts.append(f"<details><summary>{title}</summary>\n\n{table}\n\n</details>")
    said = [(f"{run.name}: " if len(runs) > 1 else "") + line for run in runs for line in _said(run.report)]
    parts += [f"<sub>{escape(line)}</sub>" for line in (*said, *_machines(runs))]
    return "\n\n".join(parts) + "\n"


def summary(runs: Sequence[Run]) -> list[Table]:
    """Return dense against grouped, in each precision where there are two; or a row for each run."""
    if len(runs) > 1:
        return [comparison_table(runs)]
    report = runs[0].report
    if report.int8 is None:
        return [totals_table(report, (*_IN_EACH_PRECISION, *_FIRST), "change")]
    return [variants_table(report), totals_table(report, _FIRST, "change")]


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
        yield f"top-1 on {accuracy.images} test images: " + " → ".join(shown) + with_error(accuracy)
    yield from metric_lines(report.metric)
    yield from training_lines(report)
    yield f"weights: {report.weights.sentence}; {report.calibration}"
    yield from _said(report)
    if report.parity is not None:
        yield f"ONNX Runtime against PyTorch: largest difference {report.parity.max_abs_diff:.1e}"
    if report.uniform:
        yield uniform_line(report.uniform)
    if report.int8 is not None:
        yield int8_line(report.int8)
    if report.cpu is not None:
        yield f"planned for {report.cpu}" + (f", {report.precision}" if report.precision != FLOAT32 else "")
    if report.machine is not None:
        yield f"machine: {report.machine}"
    if report.latency_ms is not None and not report.latency_ms.steady:
        yield (
            "note: the machine was busy, so the latencies say little; their ratios are of runs side by side "
            "and lie within the bounds; time again with 'groupify bench FOLDER --update-report'"
        )
    yield from (f"note: {note}" for note in report.notes)
    if report.files:
        yield "wrote " + ", ".join(report.files.values())


def _said(report: Report) -> Iterator[str]:
    """What was asked for and what was got, and how images become inputs."""
    yield from asked_lines(report)
    if report.preprocessing is not None:
        yield f"preprocessing: {report.preprocessing}"


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
    """What was exported, how far it is from PyTorch, and the int8 or float16 file."""
    paths = (f"{path} ({Path(path).stat().st_size} bytes)" for path in result.files.values())
    yield (
        f"wrote {', '.join(paths)}, opset {result.exported.opset}; "
        f"ONNX Runtime against PyTorch: largest difference {result.parity.max_abs_diff:.1e}{_sizes(result)}"
    )
    if result.int8 is not None:
        yield int8_line(result.int8)
    if result.float16 is not None:
        agreement = result.float16
        yield (
            f"float16: largest difference {agreement.max_abs_diff:.2g} "
            f"({100 * agreement.max_rel_diff:.2g}% of the output) to float32"
        )
    yield from (f"note: {note}" for note in result.notes)


def _sizes(result: ExportResult) -> str:
    """At which sizes a file of any size was checked."""
    shapes = ["×".join(map(str, shape)) for shape in result.parity.shapes]
    return f", at {' and '.join(shapes)}" if len(shapes) > 1 else ""


def print_bench(result: BenchResult, console: Console) -> None:
    """Print one row per engine, setting, model and precision, and what does not depend on them."""
    several = len({row.precision for row in result.rows}) > 1
    header = ["engine", "threads", "batch", "model", "ms", "speed-up"]
    header += ["over the best dense"] if several else ["efficiency"]
    header += [] if is_narrow(console) else ["images/s"]  # which only says the medians once more
    rows = [
        (
            row.engine,
            str(row.threads),
            str(row.batch_size),
            row.name,
            _with_spread(row.median_ms, row.spread_ms),
            ratio(row.speed_up_over_float32),
            ratio(row.speed_up_over_best) if several else _efficiency(row, result),
            f"{row.images_per_second:.0f}",
        )[: len(header)]
        for row in result.rows
    ]
    Table(tuple(header), tuple(rows), words=("engine", "model")).print(console)
    print_lines((*_headlines(result), *_bench_lines(result)), console)


def _efficiency(row: BenchRow, result: BenchResult) -> str:
    return "" if row.model == DENSE else f"{row.speed_up / result.mac_ratio:.2f}"


def _headlines(result: BenchResult) -> Iterator[str]:
    """How the faster converted file compares with the faster dense one in each setting with int8."""
    settings: dict[str, list[BenchRow]] = {}
    for row in result.rows:
        settings.setdefault(row.setting, []).append(row)
    for setting, rows in settings.items():
        best, own = (
            min((row for row in rows if row.model == model), key=lambda row: row.median_ms)
            for model in (DENSE, GROUPED)
        )
        if INT8 in {row.precision for row in rows}:
            gain = own.speed_up_over_best
            faster = f"{gain:.2f}× faster" if gain >= 1 else f"{1 / gain:.2f}× slower"
            yield f"{own.name} is {faster} than {best.name} ({setting})"


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
    yield (
        f"speed-up over dense {FLOAT32}; MAC ratio {ratio(result.mac_ratio)}; "
        "efficiency = speed-up ÷ MAC ratio; milliseconds as median (10–90%)"
    )
    convs = (f"{name} {blocked.blocked} of {blocked.total}" for name, blocked in result.blocked_convs.items())
    yield f"convs in ONNX Runtime's blocked kernel ({FLOAT32}): {', '.join(convs)}"
    peaks = (f"{name} {size(peak)}" for name, peak in result.peak_memory_bytes.items())
    yield f"peak memory of a fresh process: {', '.join(peaks)}"
    yield f"machine: {result.machine}"
    yield from (f"note: {note}" for note in result.notes)


def _with_spread(median: float, spread: tuple[float, float]) -> str:
    return f"{median:.2f} ({spread[0]:.2f}–{spread[1]:.2f})"
