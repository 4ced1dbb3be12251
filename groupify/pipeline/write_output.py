"""Write an output folder: artefact, ONNX file and report, measured on the way."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from groupify.artefact import WEIGHTS_FILE, write_artefact
from groupify.conversion.convert import Conversion
from groupify.data import DataSplits, calibration_images
from groupify.deployment.benchmark import QUICK_SECONDS, benchmark_onnx, speed_up
from groupify.deployment.export import ExportedModel, export_onnx
from groupify.deployment.machine import describe_machine, package_version
from groupify.deployment.parity import check_parity
from groupify.deployment.site_times import site_times
from groupify.graph.trace import example_input
from groupify.output_folder import RECIPE_FILE
from groupify.pipeline.requests import OutputRequest
from groupify.pipeline.write_report import PAGE_FILE, write_report
from groupify.planning import Change, Plan, measure_cost
from groupify.recipe import Recipe
from groupify.recovery.finetune import FinetuneResult
from groupify.reporting import AccuracyChange, CostChange, LatencyChange, Report
from groupify.reporting.read import REPORT_FILE
from groupify.zoo import Source

MODEL_FILE = "model.onnx"
# Enough real images to see a wrong export; parity is not an accuracy measurement.
_PARITY_IMAGES = 4
# 90th over 10th percentile of the times; above it, something else kept the processor busy.
_STEADY = 2.0


def write_output(
    folder: Path,
    request: OutputRequest,
    source: Source,
    chosen: Plan,
    model: nn.Module,
    *,
    conversion: Conversion | None,
    tuned: FinetuneResult | None,
    accuracy: AccuracyChange,
    data: DataSplits | None,
    seed: int,
    progress: bool,
    target: str = "auto",
) -> Report:
    """Write recipe, weights, ONNX file and report into ``folder``, measuring on the way.

    Args:
        folder: existing folder to write into, later renamed to the one asked for.
        request: the folder asked for and how to measure.
        source: the dense model.
        chosen: what was replaced.
        model: the grouped model.
        conversion: how its weights were found; None when it was only trained further.
        tuned: how it was trained.
        accuracy: measured before.
        data: gives real images for the parity check.
        seed: seed of the parity check's inputs.
        progress: show bars on stderr.
        target: the processor that will run the ONNX file; see ``blocked_width``.
    """
    shape = source.spec.input_shape
    recipe = Recipe(
        model=source.spec,
        weights=source.weights,
        sites=chosen.recipes,
        calibration=None if conversion is None else conversion.summary(),
        recovery=None if tuned is None else dataclasses.asdict(tuned.settings),
        metrics={key: value for key, value in dataclasses.asdict(accuracy).items() if value is not None},
    )
    recipe = write_artefact(folder, model, recipe)
    images = _parity_images(data)
    exported = export_onnx(
        model,
        folder / MODEL_FILE,
        input_shape=shape,
        preprocessing=source.spec.preprocessing,
        static_batch=request.static_batch,
        metadata={"groupify.recipe_sha256": recipe.sha256 or ""},
        target=target,
    )
    parity = check_parity(model, exported.path, input_shape=shape, images=images, seed=seed)
    latency, dense_file, profile = time_against_dense(
        source.model, exported, shape, request, [site.name for site in chosen.sites], progress=progress
    )
    example = example_input(shape, like=source.model)
    files = {
        "recipe": RECIPE_FILE,
        "weights": WEIGHTS_FILE,
        "onnx": MODEL_FILE,
        "report": REPORT_FILE,
        "page": PAGE_FILE,
    }
    report = Report(
        model=source.spec.name,
        weights=source.weights,
        input_shape=shape,
        sites=chosen.sites,
        cost=CostChange(measure_cost(source.model, example), measure_cost(model, example)),
        calibration="as before the fine-tune" if conversion is None else conversion.method,
        fits=() if conversion is None else conversion.fits,
        accuracy=accuracy,
        history=() if tuned is None else tuned.history,
        onnx_bytes=Change(dense_file.file_bytes, exported.file_bytes),
        parity=parity,
        latency=latency,
        machine=describe_machine(),
        seed=seed,
        files={role: str(request.folder / name) for role, name in files.items()},
        notes=_notes(source, conversion),
        pictures=() if conversion is None else conversion.pictures,
        site_milliseconds=profile,
        command=request.command,
        version=package_version("groupify"),
    )
    write_report(folder, request.folder, report)
    return report


def time_against_dense(
    dense: nn.Module,
    grouped: ExportedModel,
    shape: tuple[int, ...],
    request: OutputRequest,
    sites: Sequence[str] = (),
    *,
    progress: bool,
) -> tuple[LatencyChange, ExportedModel, dict[str, Change[float]]]:
    """Export the dense model aside and time both in ONNX Runtime, interleaved; then profile their sites."""
    batch, threads = request.static_batch or 1, request.threads
    with tempfile.TemporaryDirectory(prefix="groupify-") as aside:
        dense_file = export_onnx(
            dense, Path(aside) / "dense.onnx", input_shape=shape, static_batch=request.static_batch
        )
        first, second = benchmark_onnx(
            {"dense": dense_file.path, "grouped": grouped.path},
            input_shape=shape,
            threads=(threads,),
            batch_sizes=(batch,),
            seconds=QUICK_SECONDS,
            progress=progress,
        )
        profiles = [
            site_times(path, sites, input_shape=shape, threads=threads, batch_size=batch)
            for path in (dense_file.path, grouped.path)
        ]
    profile = {
        name: Change(profiles[0][name], profiles[1][name])
        for name in sites
        if all(name in p for p in profiles)
    }
    times = Change(first.median_ms, second.median_ms)
    steady = all(row.p90_ms < _STEADY * row.p10_ms for row in (first, second))
    return LatencyChange(times, speed_up(first, second), threads, batch, steady), dense_file, profile


def _parity_images(data: DataSplits | None) -> Tensor | None:
    part = None if data is None else data.test if data.test is not None else data.train
    return None if part is None else calibration_images(part, _PARITY_IMAGES, seed=0)


def _notes(source: Source, conversion: Conversion | None) -> tuple[str, ...]:
    notes = []
    if not source.weights.pretrained:
        notes.append("the weights are random, so accuracy means nothing here; sizes and latencies hold")
    if conversion is not None:
        notes.extend(conversion.notes)
    return tuple(notes)
