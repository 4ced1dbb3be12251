"""What ``groupify export`` does: an ONNX file, checked, and an int8 variant beside it if asked for."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from torch import nn

from groupify.data.splits import DataSplits
from groupify.errors import ArtefactError
from groupify.measure.benchmarks import QUICK_SECONDS, benchmark_onnx, speed_up
from groupify.models import ModelSpec
from groupify.onnx.exporting import export_onnx
from groupify.onnx.parity import check_parity
from groupify.pipeline.int8 import int8_notes, int8_path, parity_images, write_int8
from groupify.recipe import RECIPE_HASH
from groupify.reporting.results import ExportResult


def check_export_paths(path: Path, *, quantize: bool, force: bool, option: str = "-o") -> None:
    """Refuse files that cannot be written, before any work.

    Raises:
        ArtefactError: a file exists and ``force`` is not given, or its folder does not.
    """
    for file in (path, *((int8_path(path),) if quantize else ())):
        if os.path.lexists(file) and not force:
            raise ArtefactError(f"{file} exists; give --force to replace it, or another file with {option}")
        if os.path.isdir(file) or not os.path.isdir(file.parent):
            raise ArtefactError(
                f"cannot write {file}: expected a file in an existing folder; choose it with {option}"
            )


def run_export(
    model: nn.Module,
    spec: ModelSpec,
    path: Path,
    *,
    data: DataSplits | None = None,
    quantize: bool = False,
    static_batch: int | None = None,
    recipe_sha256: str | None = None,
    threads: int = 1,
    seed: int = 0,
    progress: bool = False,
) -> ExportResult:
    """Export a model, check the file against PyTorch, and quantise it if asked for.

    Args:
        model: a dense or converted model.
        spec: its input shape and preprocessing.
        path: the float file; the int8 file goes beside it.
        data: real images for the check and for int8.
        quantize: write an int8 variant as well; needs ``data``.
        static_batch: fixed batch size; None = dynamic.
        recipe_sha256: the hash of the recipe that the model was loaded with, for the file's metadata.
        threads: intra-op threads of the timing.
        seed: of the check's inputs and the choice of images.
        progress: show bars on stderr.

    Raises:
        ParityError: the file computes something else than the model.
        GroupifyError: anything that cannot be done as asked.
    """
    exported = export_onnx(
        model,
        path,
        input_shape=spec.input_shape,
        preprocessing=spec.preprocessing,
        static_batch=static_batch,
        metadata={} if recipe_sha256 is None else {RECIPE_HASH: recipe_sha256},
    )
    images = parity_images(data)
    parity = check_parity(model, exported.path, input_shape=spec.input_shape, images=images, seed=seed)
    files = {"onnx": str(path)}
    if not quantize or data is None:
        return ExportResult(exported, parity, files)
    int8 = write_int8(exported.path, data, threads=threads, seed=seed, progress=progress)
    rows = benchmark_onnx(
        {"float": exported.path, "int8": int8_path(exported.path)},
        input_shape=spec.input_shape,
        threads=(threads,),
        batch_sizes=(static_batch or 1,),
        seconds=QUICK_SECONDS,
        progress=progress,
    )
    int8 = dataclasses.replace(int8, milliseconds=rows[1].median_ms, speed_up_over_float=speed_up(*rows))
    files["onnx_int8"] = str(int8_path(path))
    return ExportResult(exported, parity, files, int8, int8_notes(int8))
