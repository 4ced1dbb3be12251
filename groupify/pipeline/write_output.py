"""Write an output folder: artefact, ONNX file and report, measured on the way."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from torch import nn

from groupify.artefact import WEIGHTS_FILE, write_artefact
from groupify.conversion.conversion import Conversion
from groupify.data.splits import DataSplits
from groupify.files import RECIPE_FILE
from groupify.graph.trace import example_input
from groupify.machine import describe_machine, package_version
from groupify.models import Source
from groupify.onnx.exporting import export_onnx
from groupify.onnx.parity import check_parity
from groupify.pipeline.int8 import int8_path, parity_images, write_int8
from groupify.pipeline.latency import latency_notes, time_against_dense
from groupify.pipeline.requests import OutputRequest
from groupify.pipeline.write_report import PAGE_FILE, write_report
from groupify.recipe import RECIPE_HASH, Recipe
from groupify.reporting.read import REPORT_FILE
from groupify.reporting.results import AccuracyChange, CostChange, Report, UniformRun
from groupify.scores import measure_cost
from groupify.structures import Change, Plan
from groupify.training.finetuning import FinetuneResult

MODEL_FILE = "model.onnx"
LAST_FILE = "last.safetensors"


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
    uniform: Mapping[Path, UniformRun] | None = None,
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
        data: gives real images for the parity check, and the ranges for int8.
        seed: seed of the parity check's inputs and of the choice of images for int8.
        progress: show bars on stderr.
        uniform: other numbers of groups by their ONNX files, which are timed beside this one's.
    """
    uniform = uniform or {}
    shape = source.spec.input_shape
    recipe = Recipe(
        model=source.spec,
        weights=source.weights,
        sites=chosen.recipes,
        calibration=None if conversion is None else conversion.summary(),
        recovery=None if tuned is None else tuned.settings.as_recipe(),
        metrics={key: value for key, value in dataclasses.asdict(accuracy).items() if value is not None},
    )
    recipe = write_artefact(folder, model, recipe)
    images = parity_images(data)
    exported = export_onnx(
        model,
        folder / MODEL_FILE,
        input_shape=shape,
        preprocessing=source.spec.preprocessing,
        static_batch=request.static_batch,
        metadata={RECIPE_HASH: recipe.sha256 or ""},
    )
    parity = check_parity(model, exported.path, input_shape=shape, images=images, seed=seed)
    int8 = None
    if request.quantize and data is not None:
        int8 = write_int8(exported.path, data, threads=request.threads, seed=seed, progress=progress)
    names = [site.name for site in chosen.sites]
    timed = time_against_dense(
        source.model, exported, int8, shape, request, names, uniform, progress=progress
    )
    example = example_input(shape, like=source.model)
    files = {
        **_write_last(folder, tuned),
        "recipe": RECIPE_FILE,
        "weights": WEIGHTS_FILE,
        "onnx": MODEL_FILE,
        **({} if int8 is None else {"onnx_int8": int8_path(exported.path).name}),
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
        onnx_bytes=Change(timed.dense_file.file_bytes, exported.file_bytes),
        parity=parity,
        latency=timed.latency,
        int8=timed.int8,
        uniform=tuple(
            dataclasses.replace(run, milliseconds=timed.other_milliseconds[path])
            for path, run in uniform.items()
        ),
        machine=describe_machine(),
        seed=seed,
        files={role: str(request.folder / name) for role, name in files.items()},
        notes=(*_notes(source, conversion), *latency_notes(timed)),
        pictures=() if conversion is None else conversion.pictures,
        site_milliseconds=timed.site_milliseconds,
        command=request.command,
        version=package_version("groupify"),
    )
    write_report(folder, request.folder, report)
    return report


def _write_last(folder: Path, tuned: FinetuneResult | None) -> dict[str, str]:
    """Write the weights of the last step beside the best ones, where they are others."""
    if tuned is None or tuned.best_step == tuned.steps:
        return {}
    # Clones: safetensors refuses tensors that share memory, as tied weights do.
    state = {name: value.clone().contiguous() for name, value in tuned.last_model.state_dict().items()}
    # Not by save_file, whose files only their owner can read.
    (folder / LAST_FILE).write_bytes(safetensors.torch.save(state, {"format": "pt"}))
    return {"last_weights": LAST_FILE}


def _notes(source: Source, conversion: Conversion | None) -> tuple[str, ...]:
    notes = []
    if not source.weights.pretrained:
        notes.append("the weights are random, so accuracy means nothing here; sizes and latencies hold")
    if conversion is not None:
        notes.extend(conversion.notes)
    return tuple(notes)
