"""The stage behind the export: dense against converted in ONNX Runtime, in one run."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from groupify.errors import GroupifyWarning
from groupify.measure.benchmarks import QUICK_SECONDS, Latency, benchmark_onnx, speed_up, speed_up_range
from groupify.measure.profiling import site_times
from groupify.models.specs import ModelSpec
from groupify.onnx.exporting import ExportedModel, export_onnx
from groupify.pipeline.compressed import Compressed
from groupify.pipeline.exporting import Exported, write_int8
from groupify.pipeline.requests import ExportOptions
from groupify.reporting.results import Int8File, LatencyChange
from groupify.structures import INT8, Change

DENSE, DENSE_INT8, GROUPED, GROUPED_INT8 = "dense", "dense int8", "grouped", "grouped int8"
# 90th over 10th percentile of the times; above it, something else kept the processor busy.
STEADY = 2.0


@dataclass(frozen=True)
class Timed:
    """Latencies from one interleaved run.

    Attributes:
        latency: dense against grouped.
        dense_file: the dense model's export, gone by now.
        int8: what is known of the int8 file, with its latency.
        dense_int8: the same of the dense model; None where the other is.
        site_milliseconds: each conv's share in a profiled run, dense and grouped.
        other_milliseconds: of the other files.
    """

    latency: LatencyChange
    dense_file: ExportedModel
    int8: Int8File | None
    dense_int8: Int8File | None = None
    site_milliseconds: Mapping[str, Change[float]] = field(default_factory=dict)
    other_milliseconds: Mapping[Path, float] = field(default_factory=dict)


# Besides the timing itself: the dense model's export, sessions, and profiled runs of each conv.
_AROUND_TIMING = 3.0


def timing_seconds(exported: Exported, others: Collection[Path]) -> float:
    """Return about how long :func:`time_against_dense` takes; int8 files of the dense model not counted."""
    files = 2 * (1 if exported.int8 is None else 2) + len(others)
    return QUICK_SECONDS * files / 2 + _AROUND_TIMING


def time_against_dense(
    result: Compressed,
    exported: Exported,
    others: Collection[Path],
    options: ExportOptions,
    aside: Path,
    *,
    progress: bool,
) -> Timed:
    """Export the dense model aside, time all files in ONNX Runtime, interleaved, and profile the convs.

    Where the converted model has an int8 file, the dense one gets one as well.

    Args:
        result: the dense model and the names of the convs.
        exported: the converted model's files.
        others: more files to time in the same run.
        options: threads and batch size.
        aside: folder for the dense model's files.
        progress: show a bar on stderr.
    """
    shape, grouped = result.source.spec.input_shape, exported.file.path
    dense_file = export_onnx(
        result.source.model, aside / "dense.onnx", input_shape=shape, static_batch=options.static_batch,
        dynamic_size=options.dynamic_size, opset=options.opset,
    )  # fmt: skip
    files = {DENSE: dense_file.path, GROUPED: grouped, **{str(path): path for path in others}}
    dense_int8 = None
    if exported.int8 is not None and result.data is not None:
        files |= {DENSE_INT8: aside / "dense.int8.onnx", GROUPED_INT8: exported.paths[INT8]}
        dense_int8 = write_int8(
            dense_file.path, files[DENSE_INT8], result.data, task=result.task, threads=options.threads,
            seed=result.seed, progress=progress,
        )  # fmt: skip
    rows = _time(files, shape, options, seconds=QUICK_SECONDS * len(files) / 2, progress=progress)
    return Timed(
        _latency_change(rows, options),
        dense_file,
        _timed_int8(exported.int8, GROUPED_INT8, rows),
        _timed_int8(dense_int8, DENSE_INT8, rows),
        _site_milliseconds(result, dense_file.path, grouped, options),
        {path: rows[str(path)].median_ms for path in others},
    )


def _time(
    files: Mapping[str, Path],
    input_shape: tuple[int, ...],
    options: ExportOptions,
    *,
    seconds: float,
    progress: bool,
) -> dict[str, Latency]:
    """Time files in one run, interleaved."""
    rows = benchmark_onnx(
        files,
        input_shape=input_shape,
        threads=(options.threads,),
        batch_sizes=(options.batch_size,),
        seconds=seconds,
        progress=progress,
    )
    return {row.model: row for row in rows}


def _latency_change(rows: Mapping[str, Latency], options: ExportOptions) -> LatencyChange:
    dense, grouped = rows[DENSE], rows[GROUPED]
    return LatencyChange(
        dense.median_ms,
        grouped.median_ms,
        speed_up(dense, grouped),
        options.threads,
        options.batch_size,
        steady=all(row.p90_ms < STEADY * row.p10_ms for row in rows.values()),
        speed_up_range=speed_up_range(dense, grouped),
    )


def _timed_int8(int8: Int8File | None, name: str, rows: Mapping[str, Latency]) -> Int8File | None:
    """Add the latency of an int8 file, where there is one."""
    if int8 is None:
        return None
    row = rows[name]

    def over(rival: str) -> float | None:
        return speed_up(rows[rival], row) if rival in rows else None

    def within(rival: str) -> tuple[float, float] | None:
        return speed_up_range(rows[rival], row) if rival in rows else None

    return dataclasses.replace(
        int8,
        milliseconds=row.median_ms,
        speed_up=over(DENSE),
        speed_up_over_float=over(DENSE if name == DENSE_INT8 else GROUPED),
        speed_up_over_dense_int8=over(DENSE_INT8),
        speed_up_range=within(DENSE),
        speed_up_over_dense_int8_range=within(DENSE_INT8),
    )


def _site_milliseconds(
    result: Compressed, dense: Path, grouped: Path, options: ExportOptions
) -> dict[str, Change[float]]:
    """Profile the convs that both files have under their own names."""
    names = [site.name for site in result.plan.sites]
    before, after = (
        site_times(
            path,
            names,
            input_shape=result.source.spec.input_shape,
            threads=options.threads,
            batch_size=options.batch_size,
        )
        for path in (dense, grouped)
    )
    return {name: Change(before[name], after[name]) for name in names if name in before and name in after}


def time_int8(exported: Exported, spec: ModelSpec, options: ExportOptions, *, progress: bool) -> Exported:
    """Time the int8 file, where there is one, against its float file."""
    if exported.int8 is None:
        return exported
    files = {GROUPED: exported.file.path, GROUPED_INT8: exported.paths[INT8]}
    rows = _time(files, spec.input_shape, options, seconds=QUICK_SECONDS, progress=progress)
    return dataclasses.replace(exported, int8=_timed_int8(exported.int8, GROUPED_INT8, rows))


def latency_notes(timed: Timed) -> tuple[str, ...]:
    """Return where it did not pay, and what stays float32 in the int8 file."""
    return (*pay_notes(timed.latency, timed.int8), *left_in_float_notes(timed.int8))


# How the notes of pay_notes begin.
SLOW_NOTES = ("slower than the dense model on", "dense int8 wins on", "int8 is slower than float on")


def pay_notes(latency: LatencyChange, int8: Int8File | None) -> tuple[str, ...]:
    """Return where it did not pay: slower than dense, which is warned of too, or int8 slower than float."""
    over_int8 = None if int8 is None else int8.speed_up_over_dense_int8
    note = None
    if not latency.steady:  # on a busy machine it would be a matter of luck
        pass
    elif over_int8 is None and latency.speed_up < 1:
        note = (
            f"slower than the dense model on this machine: speed-up {latency.speed_up:.2f} in ONNX Runtime; "
            "give fewer groups, or leave out narrow layers with --min-group-width auto or --exclude"
        )
    elif over_int8 is not None and over_int8 < 1:
        note = (
            f"dense int8 wins on this machine: in int8 the converted model has {over_int8:.2f}× its speed; "
            "deploy that (groupify export MODEL --precision int8), or plan for less of it, for example "
            "--budget latency=2x --precision int8"
        )
    if note is not None:
        warnings.warn(note, GroupifyWarning, stacklevel=2)
    return (*filter(None, [note]), *_slow_int8(int8))


def int8_notes(int8: Int8File | None) -> tuple[str, ...]:
    """Return what stays float32 in the int8 file, and that int8 does not pay here, where it does not."""
    return (*left_in_float_notes(int8), *_slow_int8(int8))


def left_in_float_notes(int8: Int8File | None) -> tuple[str, ...]:
    """Return what stays float32 in the int8 file, if anything."""
    if int8 is None or not int8.left_in_float:
        return ()
    first = int8.left_in_float[0]
    more = len(int8.left_in_float) - 1
    others = f" and {more} more" if more else ""
    return (f"stays float32 in the int8 file: {first.name}{others} ({first.reason})",)


def _slow_int8(int8: Int8File | None) -> tuple[str, ...]:
    if int8 is None or int8.speed_up_over_float is None or int8.speed_up_over_float >= 1:
        return ()
    return (
        f"int8 is slower than float on this machine: {int8.speed_up_over_float:.2f}× its speed; ONNX "
        "Runtime has no blocked kernel for int8 convs, so deploy the float file here",
    )
