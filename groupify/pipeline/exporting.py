"""The stages behind the training: export and check, then time."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from groupify.data.batches import calibration_images
from groupify.data.splits import DataSplits
from groupify.errors import GroupifyWarning
from groupify.measure.benchmarks import QUICK_SECONDS, Latency, benchmark_onnx, speed_up
from groupify.measure.profiling import site_times
from groupify.models.specs import ModelSpec
from groupify.onnx.comparison import compare_files
from groupify.onnx.exporting import ExportedModel, export_onnx
from groupify.onnx.parity import Parity, check_parity
from groupify.onnx.quantisation import quantize_onnx
from groupify.onnx.runtime import OnnxModule
from groupify.pipeline.prepare import Prepared
from groupify.pipeline.requests import ExportOptions
from groupify.recipe import RECIPE_HASH
from groupify.reporting.results import Int8File, LatencyChange
from groupify.scores import evaluate
from groupify.structures import Change

# Each is run through the float file with all its activations kept, so more would take memory and time.
_CALIBRATION_IMAGES = 256
_COMPARED_IMAGES = 256
# Enough real images to see a wrong export; parity is not an accuracy measurement.
_PARITY_IMAGES = 4
# 90th over 10th percentile of the times; above it, something else kept the processor busy.
_STEADY = 2.0


@dataclass(frozen=True)
class Exported:
    """ONNX files that were checked.

    Attributes:
        file: the float file.
        parity: ONNX Runtime against PyTorch.
        int8: what is known of the int8 file beside it; None where none was asked for.
    """

    file: ExportedModel
    parity: Parity
    int8: Int8File | None = None


def export_and_check(
    model: nn.Module,
    spec: ModelSpec,
    path: Path,
    options: ExportOptions,
    data: DataSplits | None,
    *,
    recipe_sha256: str | None,
    seed: int,
    progress: bool,
) -> Exported:
    """Export a model, check the file against PyTorch, and quantise it if asked for.

    Args:
        model: a dense or converted model.
        spec: its input shape and preprocessing.
        path: the float file; the int8 file goes beside it.
        options: how.
        data: real images for the check, and for int8.
        recipe_sha256: the hash of the recipe that belongs to the model, for the file's metadata.
        seed: of the check's inputs and the choice of images.
        progress: show bars on stderr.

    Raises:
        ParityError: the file computes something else than the model.
        GroupifyError: anything that cannot be done as asked.
    """
    shape = spec.input_shape
    exported = export_onnx(
        model,
        path,
        input_shape=shape,
        preprocessing=spec.preprocessing,
        static_batch=options.static_batch,
        opset=options.opset,
        metadata={} if recipe_sha256 is None else {RECIPE_HASH: recipe_sha256},
    )
    parity = check_parity(model, exported.path, input_shape=shape, images=_parity_images(data), seed=seed)
    int8 = None
    if options.quantize and data is not None:
        int8 = _write_int8(exported.path, data, threads=options.threads, seed=seed, progress=progress)
    return Exported(exported, parity, int8)


def int8_path(path: Path) -> Path:
    """Return where the int8 variant of an ONNX file belongs: ``model.onnx`` → ``model.int8.onnx``."""
    return path.with_name(f"{path.name.removesuffix('.onnx')}.int8.onnx")


def _parity_images(data: DataSplits | None) -> Tensor | None:
    """Return a few real images, test images where there are such."""
    part = None if data is None else data.test if data.test is not None else data.train
    return None if part is None else calibration_images(part, _PARITY_IMAGES, seed=0)


def _write_int8(path: Path, data: DataSplits, *, threads: int, seed: int, progress: bool) -> Int8File:
    """Write the int8 variant beside a float ONNX file and measure all but its latency.

    Training images calibrate it (test images where there are no others), test images measure it.
    """
    test = data.test
    images = calibration_images(data.for_calibration, _CALIBRATION_IMAGES, seed=seed)
    quantized = quantize_onnx(path, int8_path(path), images=images)
    # Images that did not set the ranges, where there are such.
    fresh = images if test is None else calibration_images(test, _COMPARED_IMAGES, seed=seed)
    agreement = compare_files(path, quantized.path, images=fresh, threads=threads)
    top1 = None
    if data.labelled and test is not None:
        top1 = evaluate(OnnxModule(quantized.path, threads=threads), test, progress=progress).top1
    return Int8File(
        file_bytes=quantized.file_bytes,
        calibration_images=quantized.calibration_images,
        reduced_range=quantized.reduced_range,
        agreement=agreement,
        top1=top1,
        left_in_float=quantized.left_in_float,
    )


# ---- time


@dataclass(frozen=True)
class Timed:
    """Latencies from one interleaved run.

    Attributes:
        latency: dense against grouped.
        dense_file: the dense model's export, gone by now.
        int8: what is known of the int8 file, with its latency.
        site_milliseconds: each conv's share in a profiled run, dense and grouped.
        other_milliseconds: of the other files.
    """

    latency: LatencyChange
    dense_file: ExportedModel
    int8: Int8File | None
    site_milliseconds: Mapping[str, Change[float]] = field(default_factory=dict)
    other_milliseconds: Mapping[Path, float] = field(default_factory=dict)


def time_against_dense(
    prepared: Prepared,
    exported: Exported,
    others: Collection[Path],
    options: ExportOptions,
    aside: Path,
    *,
    progress: bool,
) -> Timed:
    """Export the dense model aside and time all files in ONNX Runtime, interleaved; then profile the convs.

    Args:
        prepared: the dense model and the names of the convs.
        exported: the converted model's files.
        others: more files to time in the same run.
        options: threads and batch size.
        aside: folder for the dense model's file.
        progress: show a bar on stderr.
    """
    shape, grouped = prepared.source.spec.input_shape, exported.file.path
    dense_file = export_onnx(
        prepared.source.model, aside / "dense.onnx", input_shape=shape, static_batch=options.static_batch,
        opset=options.opset,
    )  # fmt: skip
    files = {"dense": dense_file.path, "grouped": grouped, **{str(path): path for path in others}}
    if exported.int8 is not None:
        files["int8"] = int8_path(grouped)
    rows = _time(files, shape, options, seconds=QUICK_SECONDS * len(files) / 2, progress=progress)
    return Timed(
        _latency_change(rows, options),
        dense_file,
        _timed_int8(exported.int8, rows),
        _site_milliseconds(prepared, dense_file.path, grouped, options),
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
    dense, grouped = rows["dense"], rows["grouped"]
    return LatencyChange(
        dense.median_ms,
        grouped.median_ms,
        speed_up(dense, grouped),
        options.threads,
        options.batch_size,
        steady=all(row.p90_ms < _STEADY * row.p10_ms for row in rows.values()),
    )


def _timed_int8(int8: Int8File | None, rows: Mapping[str, Latency]) -> Int8File | None:
    """Add the latency of the int8 file, where there is one."""
    if int8 is None:
        return None
    row = rows["int8"]
    return dataclasses.replace(
        int8,
        milliseconds=row.median_ms,
        speed_up=speed_up(rows["dense"], row) if "dense" in rows else None,
        speed_up_over_float=speed_up(rows["grouped"], row),
    )


def _site_milliseconds(
    prepared: Prepared, dense: Path, grouped: Path, options: ExportOptions
) -> dict[str, Change[float]]:
    """Profile the convs that both files have under their own names."""
    names = [site.name for site in prepared.plan.sites]
    before, after = (
        site_times(
            path,
            names,
            input_shape=prepared.source.spec.input_shape,
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
    files = {"grouped": exported.file.path, "int8": int8_path(exported.file.path)}
    rows = _time(files, spec.input_shape, options, seconds=QUICK_SECONDS, progress=progress)
    return dataclasses.replace(exported, int8=_timed_int8(exported.int8, rows))


def latency_notes(timed: Timed) -> tuple[str, ...]:
    """Return where it did not pay: slower than dense, which is warned of too, or int8 slower than float."""
    notes = []
    latency = timed.latency
    if latency.speed_up < 1 and latency.steady:  # on a busy machine it would be a matter of luck
        note = (
            f"slower than the dense model on this machine: speed-up {latency.speed_up:.2f} in ONNX Runtime; "
            "give fewer groups, or leave out narrow layers with --min-group-width auto or --exclude"
        )
        warnings.warn(note, GroupifyWarning, stacklevel=2)
        notes.append(note)
    return (*notes, *int8_notes(timed.int8))


def int8_notes(int8: Int8File | None) -> tuple[str, ...]:
    """Return what stays float32 in the int8 file, and that int8 does not pay here, where it does not."""
    if int8 is None:
        return ()
    notes = []
    if int8.left_in_float:
        first = int8.left_in_float[0]
        more = len(int8.left_in_float) - 1
        others = f" and {more} more" if more else ""
        notes.append(f"stays float32 in the int8 file: {first.name}{others} ({first.reason})")
    if int8.speed_up_over_float is not None and int8.speed_up_over_float < 1:
        notes.append(
            f"int8 is slower than float on this machine: {int8.speed_up_over_float:.2f}× its speed; ONNX "
            "Runtime has no blocked kernel for int8 convs, so deploy the float file here"
        )
    return tuple(notes)
