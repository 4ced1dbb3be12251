"""A report with the latencies of another run: what ``groupify bench FOLDER --update-report`` writes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from groupify.errors import ArtefactError, SpecError
from groupify.files import write_aside
from groupify.measure.folder import DENSE, GROUPED, ONNX, BenchResult, BenchRow
from groupify.pipeline.run import PAGE_FILE
from groupify.pipeline.timing import SLOW_NOTES, STEADY, pay_notes
from groupify.reporting.html import report_page
from groupify.reporting.read import REPORT_FILE, Run, earlier_runs, read_report
from groupify.reporting.results import Int8File, LatencyChange, Report
from groupify.structures import FLOAT32, INT8


def update_report(folder: Path | str, result: BenchResult) -> Report:
    """Write the latencies of a benchmark into ``report.json`` and ``report.html`` of its folder.

    Those of the first setting are taken. What the benchmark does not time, single convolutions and uniform
    groups, is left out, since it would be of another run.

    Args:
        folder: an output folder with a report.
        result: of ``bench_folder`` for that folder.

    Returns:
        The report as written.

    Raises:
        SpecError: the report has an int8 file, and the benchmark has not.
        ArtefactError: there is no report, or it cannot be written.
    """
    folder = Path(folder)
    report = refreshed(read_report(folder).report, result)
    page = report_page(Run(folder.resolve().name, report), earlier_runs(folder, report))
    try:
        write_aside(folder / REPORT_FILE, report.dumps())
        write_aside(folder / PAGE_FILE, page)
    except OSError as error:
        raise ArtefactError(
            f"cannot write the report of {str(folder)!r}: {error.strerror or error}"
        ) from error
    return report


def refreshed(report: Report, result: BenchResult) -> Report:
    """Return a report with the latencies of a benchmark.

    Raises:
        SpecError: the report has an int8 file, and the benchmark has not.
    """
    onnx = [row for row in result.rows if row.engine == ONNX]
    rows = {row.name: row for row in onnx if row.setting == onnx[0].setting}
    needed = [f"{DENSE} {FLOAT32}", f"{GROUPED} {FLOAT32}"]
    if report.int8 is not None:
        needed += [f"{DENSE} {INT8}", f"{GROUPED} {INT8}"]
    missing = [name for name in needed if name not in rows]
    if missing:
        raise SpecError(
            f"the report compares {', '.join(needed)}, and {missing[0]} was not timed: leave out "
            "--precision, or give --precision both"
        )
    latency = _latency(rows, needed)
    int8 = _int8(report.int8, GROUPED, rows)
    old = [note for note in report.notes if not note.startswith(SLOW_NOTES)]
    return replace(
        report,
        latency_ms=latency,
        int8=int8,
        dense_int8=_int8(report.dense_int8, DENSE, rows),
        machine=result.machine,
        uniform=tuple(replace(run, milliseconds=None) for run in report.uniform),
        site_milliseconds={},
        notes=(*old, *pay_notes(latency, int8)),
    )


def _latency(rows: dict[str, BenchRow], names: list[str]) -> LatencyChange:
    dense, own = rows[f"{DENSE} {FLOAT32}"], rows[f"{GROUPED} {FLOAT32}"]
    return LatencyChange(
        dense.median_ms,
        own.median_ms,
        own.speed_up,
        own.threads,
        own.batch_size,
        steady=all(rows[name].spread_ms[1] < STEADY * rows[name].spread_ms[0] for name in names),
        speed_up_range=own.speed_up_range,
    )


def _int8(file: Int8File | None, model: str, rows: dict[str, BenchRow]) -> Int8File | None:
    if file is None:
        return None
    row, own_float32 = rows[f"{model} {INT8}"], rows[f"{model} {FLOAT32}"]
    return replace(
        file,
        milliseconds=row.median_ms,
        speed_up=row.speed_up_over_float32,
        speed_up_over_float=row.speed_up_over_float32 / own_float32.speed_up_over_float32,
        speed_up_over_dense_int8=row.speed_up,
        speed_up_range=row.speed_up_over_float32_range,
        speed_up_over_dense_int8_range=row.speed_up_range,
    )
