"""The stages behind the training: export and check, then time."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from groupify.data.batches import calibration_images
from groupify.data.splits import DataSplits
from groupify.errors import ConversionError, GroupifyWarning
from groupify.measure.benchmarks import QUICK_SECONDS, Latency, benchmark_onnx, speed_up
from groupify.measure.profiling import site_times
from groupify.models.specs import ModelSpec
from groupify.onnx.comparison import Agreement, compare_files
from groupify.onnx.exporting import ExportedModel, export_onnx
from groupify.onnx.half_precision import halve_onnx
from groupify.onnx.parity import Parity, check_parity
from groupify.onnx.quantisation import quantize_onnx
from groupify.onnx.runtime import OnnxModule
from groupify.pipeline.prepare import Prepared
from groupify.pipeline.requests import ExportOptions
from groupify.recipe import RECIPE_HASH
from groupify.reporting.results import Int8File, LatencyChange
from groupify.scores import evaluate
from groupify.structures import FLOAT16, FLOAT32, INT8, Change, FilePrecision

# Each is run through the float file with all its activations kept, so more would take memory and time.
_CALIBRATION_IMAGES = 256
_COMPARED_IMAGES = 256
# Of reports.
FILE_ROLES: Mapping[FilePrecision, str] = {FLOAT32: "onnx", INT8: "onnx_int8", FLOAT16: "onnx_float16"}
DENSE, DENSE_INT8, GROUPED, GROUPED_INT8 = "dense", "dense int8", "grouped", "grouped int8"
# Enough real images to see a wrong export; parity is not an accuracy measurement.
_PARITY_IMAGES = 4
# Of the largest output; half precision rounds to 0.05%, layer by layer.
_FLOAT16_TOLERANCE = 0.1
# 90th over 10th percentile of the times; above it, something else kept the processor busy.
_STEADY = 2.0


@dataclass(frozen=True)
class Exported:
    """ONNX files that were checked.

    Attributes:
        file: the float file.
        parity: ONNX Runtime against PyTorch.
        paths: all files, by precision.
        int8: what is known of the int8 file; None where none was asked for.
        float16: the outputs of the float16 file against those of the float file; None where none was asked
            for.
    """

    file: ExportedModel
    parity: Parity
    paths: Mapping[FilePrecision, Path]
    int8: Int8File | None = None
    float16: Agreement | None = None


def export_and_check(
    model: nn.Module,
    spec: ModelSpec,
    paths: Mapping[FilePrecision, Path],
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
        paths: the files to write; the float file is needed in any case, for what is made of it.
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
        paths[FLOAT32],
        input_shape=shape,
        preprocessing=spec.preprocessing,
        static_batch=options.static_batch,
        opset=options.opset,
        metadata={} if recipe_sha256 is None else {RECIPE_HASH: recipe_sha256},
    )
    parity = check_parity(model, exported.path, input_shape=shape, images=_parity_images(data), seed=seed)
    int8 = None
    if INT8 in paths and data is not None:
        int8 = _write_int8(
            exported.path, paths[INT8], data, threads=options.threads, seed=seed, progress=progress
        )
    float16 = _write_float16(exported.path, paths[FLOAT16], shape, data) if FLOAT16 in paths else None
    return Exported(exported, parity, paths, int8, float16)


def int8_path(path: Path) -> Path:
    """Return where the int8 variant of an ONNX file belongs: ``model.onnx`` → ``model.int8.onnx``."""
    return path.with_name(f"{path.name.removesuffix('.onnx')}.int8.onnx")


def _parity_images(data: DataSplits | None) -> Tensor | None:
    """Return a few real images, test images where there are such."""
    part = None if data is None else data.test if data.test is not None else data.train
    return None if part is None else calibration_images(part, _PARITY_IMAGES, seed=0)


def _write_int8(
    path: Path, target: Path, data: DataSplits, *, threads: int, seed: int, progress: bool
) -> Int8File:
    """Write the int8 variant of a float ONNX file and measure all but its latency.

    Training images calibrate it (test images where there are no others), test images measure it.
    """
    test = data.test
    images = calibration_images(data.for_calibration, _CALIBRATION_IMAGES, seed=seed)
    quantized = quantize_onnx(path, target, images=images)
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


def _write_float16(
    path: Path, target: Path, input_shape: tuple[int, ...], data: DataSplits | None
) -> Agreement:
    """Write the float16 variant of a float ONNX file, and compare their outputs."""
    halve_onnx(path, target)
    images = _parity_images(data)
    if images is None:
        images = torch.randn(_PARITY_IMAGES, *input_shape, generator=torch.Generator().manual_seed(0))
    agreement = compare_files(path, target, images=images)
    if not agreement.max_rel_diff <= _FLOAT16_TOLERANCE:  # nor a NaN
        target.unlink()
        raise ConversionError(
            f"in float16 the outputs of {str(path)!r} are off by {100 * agreement.max_rel_diff:.2g}%: "
            "numbers of the model are too large or too small for it (largest 65,504); deploy the float file"
        )
    return agreement


# ---- time


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


def time_against_dense(
    prepared: Prepared,
    exported: Exported,
    others: Collection[Path],
    options: ExportOptions,
    aside: Path,
    *,
    seed: int,
    progress: bool,
) -> Timed:
    """Export the dense model aside, time all files in ONNX Runtime, interleaved, and profile the convs.

    Where the converted model has an int8 file, the dense one gets one as well.

    Args:
        prepared: the dense model and the names of the convs.
        exported: the converted model's files.
        others: more files to time in the same run.
        options: threads and batch size.
        aside: folder for the dense model's files.
        seed: of the choice of images that int8 is calibrated with.
        progress: show a bar on stderr.
    """
    shape, grouped = prepared.source.spec.input_shape, exported.file.path
    dense_file = export_onnx(
        prepared.source.model, aside / "dense.onnx", input_shape=shape, static_batch=options.static_batch,
        opset=options.opset,
    )  # fmt: skip
    files = {DENSE: dense_file.path, GROUPED: grouped, **{str(path): path for path in others}}
    dense_int8 = None
    if exported.int8 is not None and prepared.data is not None:
        files |= {DENSE_INT8: aside / "dense.int8.onnx", GROUPED_INT8: exported.paths[INT8]}
        dense_int8 = _write_int8(
            dense_file.path, files[DENSE_INT8], prepared.data, threads=options.threads, seed=seed,
            progress=progress,
        )  # fmt: skip
    rows = _time(files, shape, options, seconds=QUICK_SECONDS * len(files) / 2, progress=progress)
    return Timed(
        _latency_change(rows, options),
        dense_file,
        _timed_int8(exported.int8, GROUPED_INT8, rows),
        _timed_int8(dense_int8, DENSE_INT8, rows),
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
    dense, grouped = rows[DENSE], rows[GROUPED]
    return LatencyChange(
        dense.median_ms,
        grouped.median_ms,
        speed_up(dense, grouped),
        options.threads,
        options.batch_size,
        steady=all(row.p90_ms < _STEADY * row.p10_ms for row in rows.values()),
    )


def _timed_int8(int8: Int8File | None, name: str, rows: Mapping[str, Latency]) -> Int8File | None:
    """Add the latency of an int8 file, where there is one."""
    if int8 is None:
        return None
    row = rows[name]

    def over(rival: str) -> float | None:
        return speed_up(rows[rival], row) if rival in rows else None

    return dataclasses.replace(
        int8,
        milliseconds=row.median_ms,
        speed_up=over(DENSE),
        speed_up_over_float=over(DENSE if name == DENSE_INT8 else GROUPED),
        speed_up_over_dense_int8=over(DENSE_INT8),
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
    files = {GROUPED: exported.file.path, GROUPED_INT8: exported.paths[INT8]}
    rows = _time(files, spec.input_shape, options, seconds=QUICK_SECONDS, progress=progress)
    return dataclasses.replace(exported, int8=_timed_int8(exported.int8, GROUPED_INT8, rows))


def latency_notes(timed: Timed) -> tuple[str, ...]:
    """Return where it did not pay: slower than dense, which is warned of too, or int8 slower than float."""
    latency, int8 = timed.latency, timed.int8
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
    return (*filter(None, [note]), *int8_notes(int8))


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
