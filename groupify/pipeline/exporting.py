"""The stage behind the training: export and check."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from groupify.data.batches import calibration_images
from groupify.data.splits import DataSplits
from groupify.errors import ConversionError, SpecError
from groupify.graph.call import Call, Example
from groupify.models.specs import ModelSpec
from groupify.onnx.comparison import Agreement, compare_files
from groupify.onnx.exporting import ExportedModel, export_onnx
from groupify.onnx.half_precision import halve_onnx
from groupify.onnx.int8.exporting import run_at_other_sizes
from groupify.onnx.int8.quantisation import quantize_onnx
from groupify.onnx.parity import Parity, check_parity
from groupify.onnx.runtime import OnnxModule
from groupify.paired import Answers
from groupify.pipeline.requests import ExportOptions
from groupify.recipe import RECIPE_HASH
from groupify.reporting.results import ExportResult, Int8File
from groupify.scores import evaluate
from groupify.structures import FLOAT16, FLOAT32, INT8, FilePrecision
from groupify.tasks import AUTO, OUTPUTS

# Each is run through the float file with all its activations kept, so more would take memory and time.
_CALIBRATION_IMAGES = 256
_COMPARED_IMAGES = 256
# Of reports.
FILE_ROLES: Mapping[FilePrecision, str] = {FLOAT32: "onnx", INT8: "onnx_int8", FLOAT16: "onnx_float16"}
# Enough real images to see a wrong export; parity is not an accuracy measurement.
_PARITY_IMAGES = 4
# Of the largest output; half precision rounds to 0.05%, layer by layer.
_FLOAT16_TOLERANCE = 0.1


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
    example: Example | None = None,
    recipe_sha256: str | None = None,
    answers: Answers | None = None,
    task: str = AUTO,
    seed: int = 0,
    progress: bool = False,
) -> Exported:
    """Export a model, check the file against PyTorch, and quantise it if asked for.

    Args:
        model: a dense or converted model.
        spec: its input shape and preprocessing.
        paths: the files to write; the float file is needed in any case, for what is made of it.
        options: how.
        data: real images for the check, and for int8.
        example: how the model is called; None = with one image of the spec's input shape.
        recipe_sha256: the hash of the recipe that belongs to the model, for the file's metadata.
        answers: of the dense model on the test part, to compare those of the int8 file with.
        task: what the model is taken for, see ``groupify.tasks``.
        seed: of the check's inputs and the choice of images.
        progress: show bars on stderr.

    Raises:
        ParityError: the file computes something else than the model.
        GroupifyError: anything that cannot be done as asked.
    """
    shape, images = spec.input_shape, _parity_images(data)
    how: dict[str, Any] = {"input_shape": shape}
    if isinstance(example, Call):
        _refuse_images_for(example, options)
        how, images = {"example_inputs": example}, None
    exported = export_onnx(
        model,
        paths[FLOAT32],
        **how,
        preprocessing=spec.preprocessing,
        static_batch=options.static_batch,
        dynamic_size=options.dynamic_size,
        opset=options.opset,
        metadata={} if recipe_sha256 is None else {RECIPE_HASH: recipe_sha256},
    )
    parity = check_parity(
        model, exported.path, **how, images=images, dynamic_size=options.dynamic_size, seed=seed
    )
    int8 = None
    if INT8 in paths and data is not None:
        int8 = write_int8(
            exported.path, paths[INT8], data, answers=answers, task=task, threads=options.threads, seed=seed,
            progress=progress,
        )  # fmt: skip
        _run_at_other_sizes(exported.path, paths[INT8], data, parity)
    float16 = _write_float16(exported.path, paths[FLOAT16], shape, data) if FLOAT16 in paths else None
    return Exported(exported, parity, paths, int8, float16)


def export_result(
    exported: Exported, wanted: Mapping[FilePrecision, Path], notes: tuple[str, ...] = ()
) -> ExportResult:
    """Return what an export tells of the files that were asked for.

    Args:
        exported: those and the float file, which may have been made on the way alone.
        wanted: the files asked for, by precision.
        notes: what the reader should know.
    """
    file = exported.file
    if FLOAT32 not in wanted:
        path = next(iter(wanted.values()))
        file = replace(file, path=path, file_bytes=path.stat().st_size)
    files = {FILE_ROLES[precision]: str(path) for precision, path in wanted.items()}
    return ExportResult(file, exported.parity, files, exported.int8, exported.float16, notes)


def _run_at_other_sizes(float32: Path, int8: Path, data: DataSplits, parity: Parity) -> None:
    images = _parity_images(data)
    if images is not None:
        run_at_other_sizes(float32, int8, images, parity.shapes)


def _refuse_images_for(example: Call, options: ExportOptions) -> None:
    for precision in options.precisions:
        if precision != FLOAT32:
            raise SpecError(
                f"{precision} is for models called with one tensor of images, and this one is called with "
                f"{example.shapes()}: export it in float32"
            )


def paths_of(path: Path, options: ExportOptions) -> dict[FilePrecision, Path]:
    """Return where the files asked for go: of two, the float file to ``path`` and the other beside it."""
    beside = int8_path(path) if FLOAT32 in options.precisions else path
    paths: dict[FilePrecision, Path] = {FLOAT32: path, FLOAT16: path, INT8: beside}
    return {precision: paths[precision] for precision in options.precisions}


def int8_path(path: Path) -> Path:
    """Return where the int8 variant of an ONNX file belongs: ``model.onnx`` → ``model.int8.onnx``."""
    return path.with_name(f"{path.name.removesuffix('.onnx')}.int8.onnx")


def _parity_images(data: DataSplits | None) -> Tensor | None:
    """Return a few real images, test images where there are such."""
    part = None if data is None else data.test if data.test is not None else data.train
    return None if part is None else calibration_images(part, _PARITY_IMAGES, seed=0)


def write_int8(
    path: Path, target: Path, data: DataSplits, *, answers: Answers | None = None, task: str = AUTO,
    threads: int, seed: int, progress: bool,
) -> Int8File:  # fmt: skip
    """Write the int8 variant of a float ONNX file and measure all but its latency.

    Training images calibrate it (test images where there are no others), test images measure it.
    """
    test = data.test
    images = calibration_images(data.for_calibration, _CALIBRATION_IMAGES, seed=seed)
    quantized = quantize_onnx(path, target, images=images)
    # Images that did not set the ranges, where there are such.
    fresh = images if test is None else calibration_images(test, _COMPARED_IMAGES, seed=seed)
    agreement = compare_files(path, quantized.path, images=fresh, threads=threads)
    if task == OUTPUTS:  # the largest entry of an embedding means nothing
        agreement = replace(agreement, top1_agreement=None)
    top1 = changed = None
    if data.labelled and test is not None and task != OUTPUTS:
        found = evaluate(OnnxModule(quantized.path, threads=threads), test, progress=progress)
        top1 = found.top1
        if answers is not None and found.answers is not None:
            changed = answers.against(found.answers)
    return Int8File(
        file_bytes=quantized.file_bytes,
        calibration_images=quantized.calibration_images,
        reduced_range=quantized.reduced_range,
        agreement=agreement,
        top1=top1,
        left_in_float=quantized.left_in_float,
        changed=changed,
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
