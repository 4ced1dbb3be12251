"""The whole way of a conversion: load, plan, convert, recover, measure, write."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from groupify.artefact import load, read_recipe
from groupify.conversion.conversion import Calibration, convert
from groupify.conversion.reconstruct import ReconstructionOptions
from groupify.conversion.surgery import restructure
from groupify.data.batches import calibration_images
from groupify.data.ranks import Ranks, process_group
from groupify.data.splits import DataSplits, load_data
from groupify.errors import DataError, GroupifyWarning, SpecError
from groupify.files import writing_folder
from groupify.graph.forward import run_once
from groupify.graph.trace import example_input
from groupify.machine import find_cpu
from groupify.models import Source, load_model
from groupify.pipeline.budget import find_plan
from groupify.pipeline.int8 import check_quantize
from groupify.pipeline.requests import (
    ConversionRequest,
    FinetuneRequest,
    OutputRequest,
    TrainingRequest,
)
from groupify.pipeline.uniform import convert_uniform, uniform_plans
from groupify.pipeline.write_output import write_output
from groupify.planning.plan_file import PlanFile
from groupify.planning.race import BudgetPlan
from groupify.planning.sites import describe
from groupify.recipe import Recipe
from groupify.reporting.budget import race_lines
from groupify.reporting.results import AccuracyChange, Report
from groupify.scores import class_scores, evaluate
from groupify.training.finetuning import FinetuneResult, finetune
from groupify.training.state import Checkpointing


def run_conversion(request: ConversionRequest, *, progress: bool = False) -> Report | None:
    """Load, plan, convert, recover, measure and write; the folder appears whole or not at all.

    Under torchrun the first process converts and writes, and every process does its share of the training.

    Returns:
        The report; None in all processes but the first.

    Raises:
        GroupifyError: anything that cannot be done as asked.
    """
    check_quantize(request.output.quantize, request.data)
    checkpointing = None if request.training is None else request.training.checkpointing(request.output)
    with (
        process_group() as ranks,
        _writing(request.output, ranks) as folder,
        tempfile.TemporaryDirectory(prefix="groupify-") as aside,
    ):
        if ranks.world > 1:
            _refuse_what_one_process_measures(request)
        progress = progress and ranks.first
        source = request.model.load(request.seed)
        data = None if request.data is None else open_data(request.data, source, request.seed)
        if request.uniform and (data is None or not data.labelled or data.test is None):
            raise SpecError("--uniform compares accuracies: give --data with labels and a test part")
        found = _find_plan(request, source, data, progress)
        chosen = found.plan if found is not None else request.plan.make(source)
        calibration = _calibration(data, request) if ranks.first else None
        rivals = uniform_plans(request, source, chosen)
        if request.save_plan is not None and ranks.first:
            PlanFile.of(source.spec.name, chosen).write(request.save_plan)
        conversion = None
        if ranks.first:
            conversion = convert(source.model, chosen, calibration, seed=request.seed, progress=progress)
        if conversion is not None and found is not None:
            conversion = dataclasses.replace(conversion, notes=(*race_lines(found), *conversion.notes))
        model = ranks.share_weights(
            restructure(source.model, chosen.recipes) if conversion is None else conversion.model
        )
        accuracy = _accuracy(source.model, model, data, progress, ranks)
        tuned = None
        if request.training is not None and data is not None:
            tuned = _train(model, source.model, data, request.training, checkpointing, progress, ranks)
            model = tuned.model
            accuracy = dataclasses.replace(accuracy, recovered=_top1(model, data, progress, ranks))
        if folder is None:
            return None
        uniform = None
        if rivals and data is not None and data.test is not None:
            uniform = convert_uniform(
                request, source, rivals, calibration, data.test, Path(aside), progress=progress
            )
        report = write_output(
            folder,
            request.output,
            source,
            chosen,
            model,
            conversion=conversion,
            tuned=tuned,
            accuracy=accuracy,
            data=data,
            seed=request.seed,
            progress=progress,
            uniform=uniform,
        )
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
    with process_group() as ranks, _writing(request.output, ranks) as folder:
        progress = progress and ranks.first
        recipe = read_recipe(request.folder)
        student = load(request.folder, trust=request.trust)
        source = dense_source(recipe, request.checkpoint, trust=request.trust)
        data = open_data(request.data, source, request.seed)
        accuracy = _accuracy(source.model, student, data, progress, ranks)
        tuned = _train(student, source.model, data, request.training, checkpointing, progress, ranks)
        accuracy = dataclasses.replace(accuracy, recovered=_top1(tuned.model, data, progress, ranks))
        if folder is None:
            return None
        report = write_output(
            folder,
            request.output,
            source,
            describe(source.model, recipe.sites, source.spec.input_shape, recipe.cpu or find_cpu()),
            tuned.model,
            conversion=None,
            tuned=tuned,
            accuracy=accuracy,
            data=data,
            seed=request.seed,
            progress=progress,
        )
    _forget_state(checkpointing)
    return report


def dense_source(recipe: Recipe, checkpoint: Path | None, *, trust: bool) -> Source:
    """Load the dense model that a recipe was made from, weights included.

    Raises:
        SpecError: the recipe does not say where its weights can be had; name the file.
    """
    spec, origin = recipe.model, recipe.weights
    if ":" in spec.name and not trust and not spec.name.startswith("groupify.models.demo:"):
        raise SpecError(f"the recipe's model {spec.name!r} is code of its own; give --trust if you trust it")
    if checkpoint is None and origin.kind == "checkpoint":
        raise SpecError(
            f"the dense weights are needed as a teacher and came from {origin.sentence!r}; "
            "give --checkpoint FILE"
        )
    weights = {"torchvision": origin.value, "demo": "auto"}.get(origin.kind, "none")
    source = load_model(
        spec.name,
        weights=str(weights),
        checkpoint=checkpoint,
        arguments=spec.arguments,
        input_shape=spec.input_shape,
        seed=origin.value if isinstance(origin.value, int) else 0,
    )
    return Source(source.model, spec, recipe.weights)


def open_data(spec: str, source: Source, seed: int) -> DataSplits:
    """Load a data set for a model, checking its labels against the model's classes.

    Raises:
        ConversionError: the model does not run on its input shape.
        GroupifyError: the data cannot be had, or do not fit the model.

    Warns:
        GroupifyWarning: the model is no classifier, so the labels are not used.
    """
    classes = class_count(source)
    data = load_data(spec, source.spec, num_classes=classes, seed=seed)
    if classes is None and data.labelled:
        warnings.warn(
            f"{source.spec.name} gives no logits of shape (N, classes), so the labels of {spec} are not used "
            "and no accuracy is measured",
            GroupifyWarning,
            stacklevel=2,
        )
        data = dataclasses.replace(data, labelled=False)
    return data


def class_count(source: Source) -> int | None:
    """Number of classes that a model tells apart; None when it is no classifier."""
    try:
        return class_scores(
            run_once(source.model, example_input(source.spec.input_shape, like=source.model))
        ).shape[1]
    except DataError:
        return None


def _refuse_what_one_process_measures(request: ConversionRequest) -> None:
    plan = request.plan
    if request.uniform:
        raise SpecError("--uniform is measured in one process: leave it out under torchrun")
    if plan.search is not None and plan.file is None:
        raise SpecError(
            "a budget is planned in one process: write the plan with 'groupify plan --save-plan FILE', "
            "then give --plan FILE under torchrun"
        )


@contextlib.contextmanager
def _writing(output: OutputRequest, ranks: Ranks) -> Iterator[Path | None]:
    """Yield the folder to write into; None in all processes but the first."""
    if not ranks.first:
        yield None
        return
    with writing_folder(output.folder, output.force) as folder:
        yield folder


def _train(
    student: nn.Module,
    teacher: nn.Module,
    data: DataSplits,
    request: TrainingRequest,
    checkpointing: Checkpointing | None,
    progress: bool,
    ranks: Ranks,
) -> FinetuneResult:
    """Fine-tune on the device asked for; the result is on the CPU."""
    device = _device(request.device)
    tuned = finetune(
        copy.deepcopy(student).to(device),
        data,
        teacher=copy.deepcopy(teacher).to(device),
        settings=request.settings,
        checkpointing=checkpointing,
        log=request.log,
        distributed=ranks.world > 1,
        progress=progress,
    )
    return dataclasses.replace(tuned, model=tuned.model.cpu(), last_model=tuned.last_model.cpu())


def _device(name: str) -> torch.device:
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise SpecError("--device cuda: PyTorch sees no GPU here; give --device cpu")
    if name == "cpu" or not available:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _forget_state(checkpointing: Checkpointing | None) -> None:
    """Remove the state of a training whose result is written."""
    if checkpointing is not None:
        checkpointing.file.unlink(missing_ok=True)


def _find_plan(
    request: ConversionRequest, source: Source, data: DataSplits | None, progress: bool
) -> BudgetPlan | None:
    """Plan for a budget, where there is one."""
    search = request.plan.search
    if search is None or request.plan.file is not None:
        return None
    return find_plan(
        request.plan, search, source, data, calibration_images=request.calibration_images,
        threads=request.output.threads, seed=request.seed, progress=progress,
    )  # fmt: skip


def _calibration(data: DataSplits | None, request: ConversionRequest) -> Calibration | None:
    if data is None or request.calibration_images == 0:
        return None
    images = calibration_images(data.for_calibration, request.calibration_images, seed=request.seed)
    return Calibration(images, reconstruction=ReconstructionOptions(steps=request.reconstruct_steps))


def _accuracy(
    dense: nn.Module, converted: nn.Module, data: DataSplits | None, progress: bool, ranks: Ranks
) -> AccuracyChange:
    if data is None or not data.labelled or data.test is None:
        return AccuracyChange()
    before = evaluate(dense, data.test, progress=progress, ranks=ranks)
    after = evaluate(converted, data.test, progress=progress, ranks=ranks)
    return AccuracyChange(dense=before.top1, converted=after.top1, images=before.images)


def _top1(model: nn.Module, data: DataSplits, progress: bool, ranks: Ranks) -> float | None:
    if not data.labelled or data.test is None:
        return None
    return evaluate(model, data.test, progress=progress, ranks=ranks).top1
