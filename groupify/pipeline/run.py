"""Whole runs: compress or open a folder → train → export and check → time → report, written at the end."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path

import safetensors.torch
from torch import nn

from groupify.artefact import WEIGHTS_FILE, write_artefact
from groupify.data.ranks import Ranks, process_group
from groupify.errors import SpecError
from groupify.files import RECIPE_FILE, writing_folder
from groupify.machine import describe_machine, package_version
from groupify.pipeline.comparisons import check_comparable, uniform_plans
from groupify.pipeline.compressed import Compressed
from groupify.pipeline.converting import (
    compression_stages,
    convert_uniform,
    has_test_labels,
    measured,
    on_cpu,
    run_compression,
    train,
)
from groupify.pipeline.exporting import FILE_ROLES, Exported, export_and_check
from groupify.pipeline.folders import model_file, open_folder, precisions_of
from groupify.pipeline.inputs import tell_preprocessing, with_data
from groupify.pipeline.requests import ConversionRequest, FinetuneRequest, OutputRequest
from groupify.pipeline.subject import Subject
from groupify.pipeline.timing import Timed, latency_notes, time_against_dense, timing_seconds
from groupify.reporting.html import report_page
from groupify.reporting.read import REPORT_FILE, Run, earlier_runs
from groupify.reporting.results import ChosenStep, Report, UniformRun
from groupify.stages import Stages
from groupify.structures import FLOAT32, Change, FilePrecision
from groupify.training.finetuning import FinetuneResult
from groupify.training.state import Checkpointing

# Beside the weights that were chosen: those before a training, and those of its last step.
_OTHER_WEIGHTS = {"weights_before_training": "before.safetensors", "last_weights": "last.safetensors"}
PAGE_FILE = "report.html"
# Stages: exporting, timing.
_WRITING = 2


def run_conversion(request: ConversionRequest, *, progress: bool = False) -> Report | None:
    """Load, compress, train, measure and write; the folder appears whole or not at all.

    Under torchrun the first process converts and writes, and every process does its share of the training.

    Returns:
        The report; None in all processes but the first.

    Raises:
        GroupifyError: anything that cannot be done as asked.
    """
    request.check()
    checkpointing = None if request.training is None else request.training.checkpointing(request.output)
    with process_group() as ranks, _writing(request.output, ranks) as folder, _aside() as aside:
        if ranks.world > 1:
            _refuse_what_one_process_measures(request)
        subject = _subject(request)
        trained, compared = request.training is not None, bool(request.uniform)
        count = compression_stages(subject, request.plan) + trained + compared + _WRITING
        stages = Stages(count, show=progress and ranks.first)
        if request.uniform:
            check_comparable(request, subject)
        result = run_compression(subject, request.plan, ranks=ranks, stages=stages)
        plans = uniform_plans(request, subject, result.plan)
        result = train(result, request.training, checkpointing, ranks, stages)
        if folder is None:
            return None
        if compared:
            stages.begin(f"converting {len(plans)} uniform plans as well")
        uniform = convert_uniform(plans, subject, request.output.export, aside, progress=stages.show)
        report = _write(_Output(folder, aside, request.output, stages), on_cpu(result), uniform)
    _forget_state(checkpointing)
    return report


def _subject(request: ConversionRequest) -> Subject:
    source, data = with_data(
        request.model.load(request.seed), request.data, request.model.preprocessing, seed=request.seed,
        task=request.plan.search.task,
    )  # fmt: skip
    tell_preprocessing(source, data)
    return Subject(
        source, source.spec.input_shape, data, None, request.calibration_images, request.reconstruct_steps,
        request.seed, request.plan.search.memory, request.plan.search.metric, request.plan.search.task,
    )  # fmt: skip


def _refuse_what_one_process_measures(request: ConversionRequest) -> None:
    if request.uniform:
        raise SpecError("--uniform is measured in one process: leave it out under torchrun")
    if request.plan.is_searched:
        raise SpecError(
            "structures are chosen for each conv in one process: write the plan with 'groupify plan "
            "MODEL --save-plan FILE', then give --plan FILE under torchrun; or give --groups 4"
        )


def run_finetune(request: FinetuneRequest, *, progress: bool = False) -> Report | None:
    """Train a converted model further, measure and write; the folder appears whole or not at all.

    Under torchrun every process does its share of the work, and the first one writes.

    Returns:
        The report; None in all processes but the first.

    Raises:
        GroupifyError: anything that cannot be done as asked.
    """
    output = request.output
    if not output.export.precisions:
        export = dataclasses.replace(output.export, precisions=precisions_of(request.folder))
        output = dataclasses.replace(output, export=export)
    checkpointing = request.training.checkpointing(output)
    with process_group() as ranks, _writing(output, ranks) as folder, _aside() as aside:
        opened = open_folder(request)
        count = has_test_labels(opened.data, opened.task) + 1 + _WRITING
        stages = Stages(count, show=progress and ranks.first)
        result = measured(opened, ranks, stages)
        result = train(result, request.training, checkpointing, ranks, stages)
        if folder is None:
            return None
        report = _write(_Output(folder, aside, output, stages), on_cpu(result), {})
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
        stages: says what is being done.
    """

    folder: Path
    aside: Path
    request: OutputRequest
    stages: Stages


def _write(output: _Output, result: Compressed, uniform: dict[Path, UniformRun]) -> Report:
    """Write recipe, weights, ONNX file and report, measuring on the way."""
    names = " and ".join(output.request.export.precisions)
    output.stages.begin(f"exporting to ONNX in {names}, checked against PyTorch")
    exported = _write_model(output, result)
    output.stages.begin(
        "timing dense against converted in ONNX Runtime",
        lambda: timing_seconds(exported, uniform),
    )
    timed = time_against_dense(
        result, exported, uniform, output.request.export, output.aside, progress=output.stages.show
    )
    runs = (
        dataclasses.replace(run, milliseconds=timed.other_milliseconds[path]) for path, run in uniform.items()
    )
    report = dataclasses.replace(
        make_report(result, exported, timed),
        uniform=tuple(runs),
        files=_files(output, result, exported),
        command=output.request.command,
    )
    _write_report(output, report)
    return report


def _write_model(output: _Output, result: Compressed) -> Exported:
    """Write recipe, weights and ONNX file."""
    recipe = write_artefact(output.folder, result.model, result.recipe)
    for role, model in _other_models(result.tuned).items():
        _write_weights(output.folder / _OTHER_WEIGHTS[role], model)
    paths: dict[FilePrecision, Path] = {FLOAT32: output.aside / model_file(FLOAT32)}
    for precision in output.request.export.precisions:
        paths[precision] = output.folder / model_file(precision)
    return export_and_check(
        result.model, result.source.spec, paths, output.request.export, result.data,
        recipe_sha256=recipe.sha256, answers=result.answers, task=result.task, seed=result.seed,
        progress=output.stages.show,
    )  # fmt: skip


def _other_models(tuned: FinetuneResult | None) -> dict[str, nn.Module]:
    """Return the models of a training that were not chosen, by role."""
    if tuned is None:
        return {}
    chosen = {"weights_before_training": tuned.best_step == 0, "last_weights": tuned.best_step == tuned.steps}
    models = {"weights_before_training": tuned.given_model, "last_weights": tuned.last_model}
    return {role: model for role, model in models.items() if not chosen[role]}


def _write_weights(path: Path, model: nn.Module) -> None:
    # Clones: safetensors refuses tensors that share memory, as tied weights do.
    state = {name: value.clone().contiguous() for name, value in model.state_dict().items()}
    # Not by save_file, whose files only their owner can read.
    path.write_bytes(safetensors.torch.save(state, {"format": "pt"}))


def make_report(result: Compressed, exported: Exported, timed: Timed) -> Report:
    """Put together what the stages found."""
    source, plan, tuned = result.source, result.plan, result.tuned
    before, after = result.costs.dense, result.costs.compressed
    return Report(
        cpu=plan.cpu,
        precision=plan.precision,
        budget=result.budget,
        preprocessing=source.spec.preprocessing,
        model=source.spec.name,
        weights=source.weights,
        input_shape=source.spec.input_shape,
        sites=plan.sites,
        params=Change(before.params, after.params),
        macs=Change(before.macs, after.macs),
        weight_bytes=Change(before.weight_bytes, after.weight_bytes),
        activation_bytes=Change(before.activation_bytes, after.activation_bytes),
        calibration=result.method,
        fits=result.fits,
        accuracy=result.accuracy,
        metric=result.measured_by_metric,
        history=() if tuned is None else tuned.history,
        chosen=None if tuned is None else ChosenStep(tuned.best_step, tuned.validation_images),
        onnx_bytes=Change(timed.dense_file.file_bytes, exported.file.file_bytes),
        parity=exported.parity,
        latency_ms=timed.latency,
        int8=timed.int8,
        dense_int8=timed.dense_int8,
        machine=describe_machine(),
        seed=result.seed,
        notes=(*_notes(result), *latency_notes(timed)),
        pictures=result.pictures,
        site_milliseconds=timed.site_milliseconds,
        groupify=package_version("groupify"),
    )


def _notes(result: Compressed) -> tuple[str, ...]:
    if result.source.weights.pretrained:
        return result.notes
    return (
        "the weights are random, so accuracy means nothing here; sizes and latencies hold",
        *result.notes,
    )


def _files(output: _Output, result: Compressed, exported: Exported) -> dict[str, str]:
    """Return what is in the folder, by role, under the name that it will have."""
    files = {
        "recipe": RECIPE_FILE,
        "weights": WEIGHTS_FILE,
        **{role: _OTHER_WEIGHTS[role] for role in _other_models(result.tuned)},
        **{
            FILE_ROLES[precision]: path.name
            for precision, path in exported.paths.items()
            if path.parent == output.folder
        },
        "report": REPORT_FILE,
        "page": PAGE_FILE,
    }
    return {role: str(output.request.folder / name) for role, name in files.items()}


def _write_report(output: _Output, report: Report) -> None:
    """Write ``report.json`` and ``report.html``; earlier runs of the same model are shown too."""
    (output.folder / REPORT_FILE).write_text(report.dumps(), encoding="utf-8")
    folder = output.request.folder
    page = report_page(Run(folder.resolve().name, report), earlier_runs(folder, report))
    (output.folder / PAGE_FILE).write_text(page, encoding="utf-8")
