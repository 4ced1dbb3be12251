"""Whole runs, stage by stage: prepare → convert → train → export and check → time → report."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path

import safetensors.torch
from torch import nn

from groupify.artefact import WEIGHTS_FILE, load, write_artefact
from groupify.conversion.conversion import Conversion
from groupify.data.ranks import Ranks, process_group
from groupify.files import RECIPE_FILE, writing_folder
from groupify.graph.call import example_input
from groupify.machine import describe_machine, package_version
from groupify.models.specs import Source
from groupify.pipeline.converting import Grouped, convert_as_planned, convert_uniform, measured, train
from groupify.pipeline.exporting import (
    FILE_ROLES,
    Exported,
    Timed,
    export_and_check,
    latency_notes,
    time_against_dense,
)
from groupify.pipeline.prepare import Prepared, prepare_conversion, prepare_finetune
from groupify.pipeline.requests import ConversionRequest, FinetuneRequest, OutputRequest
from groupify.recipe import Recipe
from groupify.reporting.html import report_page
from groupify.reporting.read import REPORT_FILE, Run, earlier_runs
from groupify.reporting.results import Report, UniformRun
from groupify.scores import measure_cost
from groupify.structures import FLOAT32, Change, FilePrecision
from groupify.training.finetuning import FinetuneResult
from groupify.training.state import Checkpointing

MODEL_FILE = "model.onnx"
LAST_FILE = "last.safetensors"
PAGE_FILE = "report.html"


def run_conversion(request: ConversionRequest, *, progress: bool = False) -> Report | None:
    """Load, plan, convert, train, measure and write; the folder appears whole or not at all.

    Under torchrun the first process converts and writes, and every process does its share of the training.

    Returns:
        The report; None in all processes but the first.

    Raises:
        GroupifyError: anything that cannot be done as asked.
    """
    request.check()
    checkpointing = None if request.training is None else request.training.checkpointing(request.output)
    with process_group() as ranks, _writing(request.output, ranks) as folder, _aside() as aside:
        progress = progress and ranks.first
        prepared = prepare_conversion(request, ranks)
        grouped = convert_as_planned(prepared, request, ranks, progress=progress)
        grouped = train(grouped, prepared, request.training, checkpointing, ranks, progress=progress)
        if folder is None:
            return None
        uniform = convert_uniform(prepared, request, aside, progress=progress)
        output = _Output(folder, aside, request.output, request.seed, progress)
        report = _write(output, prepared, grouped, uniform)
    _forget_state(checkpointing)
    return report


def run_finetune(request: FinetuneRequest, *, progress: bool = False) -> Report | None:
    """Train a converted model further, measure and write; the folder appears whole or not at all.

    Under torchrun every process does its share of the work, and the first one writes.

    Returns:
        The report; None in all processes but the first.

    Raises:
        GroupifyError: anything that cannot be done as asked.
    """
    checkpointing = request.training.checkpointing(request.output)
    with process_group() as ranks, _writing(request.output, ranks) as folder, _aside() as aside:
        progress = progress and ranks.first
        student = load(request.folder, trust=request.trust)
        prepared = prepare_finetune(request)
        grouped = measured(student, prepared, ranks, progress=progress)
        grouped = train(grouped, prepared, request.training, checkpointing, ranks, progress=progress)
        if folder is None:
            return None
        output = _Output(folder, aside, request.output, request.seed, progress)
        report = _write(output, prepared, grouped, {})
    _forget_state(checkpointing)
    return report


@contextlib.contextmanager
def _writing(output: OutputRequest, ranks: Ranks) -> Iterator[Path | None]:
    """Yield the folder to write into; None in all processes but the first."""
    if not ranks.first:
        yield None
        return
    with writing_folder(output.folder, output.force) as folder:
        yield folder


@contextlib.contextmanager
def _aside() -> Iterator[Path]:
    """Yield a folder for files that are measured and then forgotten."""
    with tempfile.TemporaryDirectory(prefix="groupify-") as folder:
        yield Path(folder)


def _forget_state(checkpointing: Checkpointing | None) -> None:
    """Remove the state of a training whose result is written."""
    if checkpointing is not None:
        checkpointing.file.unlink(missing_ok=True)


# ---- what the first process writes


@dataclasses.dataclass(frozen=True)
class _Output:
    """Where and how to write.

    Attributes:
        folder: to write into; later renamed to the one asked for.
        aside: for files that are forgotten.
        request: the folder asked for, and how to measure.
        seed, progress: of the run.
    """

    folder: Path
    aside: Path
    request: OutputRequest
    seed: int
    progress: bool


def _write(output: _Output, prepared: Prepared, grouped: Grouped, uniform: dict[Path, UniformRun]) -> Report:
    """Write recipe, weights, ONNX file and report, measuring on the way."""
    exported = _write_model(output, prepared, grouped)
    timed = time_against_dense(
        prepared, exported, uniform, output.request.export, output.aside, seed=output.seed,
        progress=output.progress,
    )  # fmt: skip
    runs = (
        dataclasses.replace(run, milliseconds=timed.other_milliseconds[path]) for path, run in uniform.items()
    )
    report = dataclasses.replace(
        make_report(prepared, grouped, exported, timed),
        uniform=tuple(runs),
        seed=output.seed,
        files=_files(output, grouped, exported),
        command=output.request.command,
    )
    _write_report(output, report)
    return report


def _write_model(output: _Output, prepared: Prepared, grouped: Grouped) -> Exported:
    """Write recipe, weights and ONNX file."""
    source, accuracy = prepared.source, dataclasses.asdict(grouped.accuracy)
    recipe = Recipe(
        model=source.spec,
        weights=source.weights,
        sites=prepared.plan.recipes,
        cpu=prepared.plan.cpu,
        calibration=None if grouped.conversion is None else grouped.conversion.summary(),
        recovery=None if grouped.tuned is None else grouped.tuned.settings.as_recipe(),
        metrics={key: value for key, value in accuracy.items() if value is not None},
    )
    recipe = write_artefact(output.folder, grouped.model, recipe)
    last = _other_last(grouped.tuned)
    if last is not None:
        _write_last(output.folder, last)
    paths: dict[FilePrecision, Path] = {FLOAT32: output.aside / MODEL_FILE}
    for precision in output.request.export.precisions:
        paths[precision] = output.folder / _model_file(precision)
    return export_and_check(
        grouped.model,
        source.spec,
        paths,
        output.request.export,
        prepared.data,
        recipe_sha256=recipe.sha256,
        seed=output.seed,
        progress=output.progress,
    )


def _model_file(precision: FilePrecision) -> str:
    """Name of an ONNX file in the folder: ``model.onnx``, ``model.int8.onnx``."""
    return MODEL_FILE if precision == FLOAT32 else f"model.{precision}.onnx"


def _other_last(tuned: FinetuneResult | None) -> nn.Module | None:
    """Return the model of the last step, where it was trained and its weights are others than the best."""
    return None if tuned is None or tuned.best_step == tuned.steps else tuned.last_model


def _write_last(folder: Path, last: nn.Module) -> None:
    """Write the weights of the last step beside the best ones."""
    # Clones: safetensors refuses tensors that share memory, as tied weights do.
    state = {name: value.clone().contiguous() for name, value in last.state_dict().items()}
    # Not by save_file, whose files only their owner can read.
    (folder / LAST_FILE).write_bytes(safetensors.torch.save(state, {"format": "pt"}))


def make_report(prepared: Prepared, grouped: Grouped, exported: Exported, timed: Timed) -> Report:
    """Put together what the stages found."""
    source, conversion, tuned = prepared.source, grouped.conversion, grouped.tuned
    example = example_input(source.spec.input_shape, like=source.model)
    before, after = measure_cost(source.model, example), measure_cost(grouped.model, example)
    return Report(
        cpu=prepared.plan.cpu,
        precision=prepared.plan.precision,
        model=source.spec.name,
        weights=source.weights,
        input_shape=source.spec.input_shape,
        sites=prepared.plan.sites,
        params=Change(before.params, after.params),
        macs=Change(before.macs, after.macs),
        weight_bytes=Change(before.weight_bytes, after.weight_bytes),
        activation_bytes=Change(before.activation_bytes, after.activation_bytes),
        calibration="as before the fine-tune" if conversion is None else conversion.method,
        fits=() if conversion is None else conversion.fits,
        accuracy=grouped.accuracy,
        history=() if tuned is None else tuned.history,
        onnx_bytes=Change(timed.dense_file.file_bytes, exported.file.file_bytes),
        parity=exported.parity,
        latency_ms=timed.latency,
        int8=timed.int8,
        dense_int8=timed.dense_int8,
        machine=describe_machine(),
        notes=(*_notes(source, conversion), *latency_notes(timed)),
        pictures=() if conversion is None else conversion.pictures,
        site_milliseconds=timed.site_milliseconds,
        groupify=package_version("groupify"),
    )


def _notes(source: Source, conversion: Conversion | None) -> tuple[str, ...]:
    notes = []
    if not source.weights.pretrained:
        notes.append("the weights are random, so accuracy means nothing here; sizes and latencies hold")
    if conversion is not None:
        notes.extend(conversion.notes)
    return tuple(notes)


def _files(output: _Output, grouped: Grouped, exported: Exported) -> dict[str, str]:
    """Return what is in the folder, by role, under the name that it will have."""
    files = {
        "last_weights": None if _other_last(grouped.tuned) is None else LAST_FILE,
        "recipe": RECIPE_FILE,
        "weights": WEIGHTS_FILE,
        **{
            FILE_ROLES[precision]: path.name
            for precision, path in exported.paths.items()
            if path.parent == output.folder
        },
        "report": REPORT_FILE,
        "page": PAGE_FILE,
    }
    return {role: str(output.request.folder / name) for role, name in files.items() if name is not None}


def _write_report(output: _Output, report: Report) -> None:
    """Write ``report.json`` and ``report.html``; earlier runs of the same model are shown too."""
    (output.folder / REPORT_FILE).write_text(report.dumps(), encoding="utf-8")
    folder = output.request.folder
    page = report_page(Run(folder.resolve().name, report), earlier_runs(folder, report))
    (output.folder / PAGE_FILE).write_text(page, encoding="utf-8")
