"""The whole way of a conversion: load, plan, convert, recover, measure, write."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import torch
from torch import nn

from groupify.artefact import load, read_recipe
from groupify.conversion.convert import Calibration, convert
from groupify.conversion.reconstruct import ReconstructionOptions
from groupify.data import DataSplits, calibration_images, load_data
from groupify.errors import DataError, SpecError
from groupify.evaluation import class_logits, evaluate, evaluating
from groupify.graph.trace import example_input
from groupify.output_folder import writing_folder
from groupify.pipeline.int8 import check_quantize
from groupify.pipeline.requests import ConversionRequest, FinetuneRequest
from groupify.pipeline.write_output import write_output
from groupify.planning import describe
from groupify.recipe import Recipe
from groupify.recovery.finetune import finetune
from groupify.reporting import AccuracyChange, Report
from groupify.shuffles import choose_shuffles
from groupify.zoo import Source, load_model


def run_conversion(request: ConversionRequest, *, progress: bool = False) -> Report:
    """Load, plan, convert, recover, measure and write; the folder appears whole or not at all.

    Raises:
        GroupifyError: anything that cannot be done as asked.
    """
    check_quantize(request.output.quantize, request.data)
    measures_shuffles = request.plan.shuffle == "auto"
    if measures_shuffles and (request.data is None or request.calibration_images == 0):
        raise SpecError(
            "--shuffle auto is measured on images: give --data, not --calibrate none; or choose none or all"
        )
    with writing_folder(request.output.folder, request.output.force) as folder:
        source = request.model.load(request.seed)
        chosen = request.plan.make(source, with_shuffles=not measures_shuffles)
        data = None if request.data is None else open_data(request.data, source, request.seed)
        calibration = _calibration(data, request)
        shuffles = None
        if measures_shuffles and calibration is not None:
            shuffles = choose_shuffles(
                source.model, chosen, calibration, target=request.plan.target,
                threads=request.output.threads, seed=request.seed, progress=progress,
            )  # fmt: skip
            chosen = shuffles.plan
        conversion = convert(source.model, chosen, calibration, seed=request.seed, progress=progress)
        accuracy = _accuracy(source.model, conversion.model, data, progress)
        model, tuned = conversion.model, None
        if request.finetune is not None and data is not None:
            tuned = finetune(model, data, teacher=source.model, settings=request.finetune, progress=progress)
            model = tuned.model
            accuracy = dataclasses.replace(accuracy, recovered=_top1(model, data, progress))
        return write_output(
            folder,
            request.output,
            source,
            chosen,
            model,
            conversion=conversion,
            shuffles=shuffles,
            tuned=tuned,
            accuracy=accuracy,
            data=data,
            seed=request.seed,
            progress=progress,
            target=request.plan.target,
        )


def run_finetune(request: FinetuneRequest, *, progress: bool = False) -> Report:
    """Train a converted model further, measure and write; the folder appears whole or not at all.

    Raises:
        GroupifyError: anything that cannot be done as asked.
    """
    with writing_folder(request.output.folder, request.output.force) as folder:
        recipe = read_recipe(request.folder)
        student = load(request.folder, trust=request.trust)
        source = dense_source(recipe, request.checkpoint, trust=request.trust)
        data = open_data(request.data, source, request.seed)
        accuracy = _accuracy(source.model, student, data, progress)
        tuned = finetune(student, data, teacher=source.model, settings=request.settings, progress=progress)
        accuracy = dataclasses.replace(accuracy, recovered=_top1(tuned.model, data, progress))
        return write_output(
            folder,
            request.output,
            source,
            describe(source.model, recipe.sites, source.spec.input_shape),
            tuned.model,
            conversion=None,
            tuned=tuned,
            accuracy=accuracy,
            data=data,
            seed=request.seed,
            progress=progress,
        )


def dense_source(recipe: Recipe, checkpoint: Path | None, *, trust: bool) -> Source:
    """Load the dense model that a recipe was made from, weights included.

    Raises:
        SpecError: the recipe does not say where its weights can be had; name the file.
    """
    spec, origin = recipe.model, recipe.weights.source
    if ":" in spec.name and not trust and not spec.name.startswith("groupify.demo:"):
        raise SpecError(f"the recipe's model {spec.name!r} is code of its own; give --trust if you trust it")
    weights, seed = "none", 0
    if checkpoint is None:
        if origin.startswith("torchvision "):
            weights = origin.removeprefix("torchvision ").strip("'\"").rpartition(".")[2]
        elif origin == "demo":
            weights = "auto"
        elif match := re.fullmatch(r"random, seed (\d+)", origin):
            seed = int(match[1])
        elif origin != "factory":
            raise SpecError(
                f"the dense weights are needed as a teacher and came from {origin!r}; give --checkpoint FILE"
            )
    source = load_model(
        spec.name,
        weights=weights,
        checkpoint=checkpoint,
        arguments=spec.arguments,
        input_shape=spec.input_shape,
        seed=seed,
    )
    return Source(source.model, spec, recipe.weights)


def open_data(spec: str, source: Source, seed: int) -> DataSplits:
    """Load a data set for a model, checking its labels against the model's classes."""
    return load_data(spec, source.spec, num_classes=class_count(source), seed=seed)


def class_count(source: Source) -> int | None:
    """Number of classes that a model tells apart; None when it is no classifier."""
    with evaluating(source.model), torch.no_grad():
        try:
            return class_logits(
                source.model(example_input(source.spec.input_shape, like=source.model))
            ).shape[1]
        except DataError:
            return None


def _calibration(data: DataSplits | None, request: ConversionRequest) -> Calibration | None:
    if data is None or request.calibration_images == 0:
        return None
    part = data.train if data.train is not None else data.test
    if part is None:
        raise DataError(f"data {data.spec!r} has neither a training nor a test part")
    images = calibration_images(part, request.calibration_images, seed=request.seed)
    return Calibration(images, reconstruction=ReconstructionOptions(steps=request.reconstruct_steps))


def _accuracy(
    dense: nn.Module, converted: nn.Module, data: DataSplits | None, progress: bool
) -> AccuracyChange:
    if data is None or not data.labelled or data.test is None:
        return AccuracyChange()
    before = evaluate(dense, data.test, progress=progress)
    after = evaluate(converted, data.test, progress=progress)
    return AccuracyChange(dense=before.top1, converted=after.top1, images=before.images)


def _top1(model: nn.Module, data: DataSplits, progress: bool) -> float | None:
    if not data.labelled or data.test is None:
        return None
    return evaluate(model, data.test, progress=progress).top1
