"""The whole way of a conversion: load, plan, convert, recover, measure, write."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from groupify.artefact import load, read_recipe
from groupify.conversion.convert import Calibration, convert
from groupify.conversion.reconstruct import ReconstructionOptions
from groupify.data import DataSplits, calibration_images, load_data
from groupify.deployment.machine import blocked_width
from groupify.errors import DataError, SpecError
from groupify.evaluation import class_logits, evaluate, evaluating
from groupify.graph.trace import example_input
from groupify.output_folder import writing_folder
from groupify.planning import Plan, describe, plan
from groupify.recipe import Recipe
from groupify.recovery.finetune import finetune
from groupify.recovery.settings import FinetuneSettings
from groupify.reporting import AccuracyChange, Report
from groupify.write_output import write_output
from groupify.zoo import Source, load_model


@dataclass(frozen=True)
class ModelRequest:
    """Which dense model; see ``load_model`` for the fields."""

    name: str
    weights: str = "auto"
    checkpoint: Path | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    input_shape: tuple[int, ...] | None = None

    def load(self, seed: int) -> Source:
        """Load it."""
        return load_model(
            self.name,
            weights=self.weights,
            checkpoint=self.checkpoint,
            arguments=self.arguments,
            input_shape=self.input_shape,
            seed=seed,
        )


@dataclass(frozen=True)
class PlanRequest:
    """How the convs are to be replaced; see ``plan`` for the fields not said here.

    Attributes:
        min_group_width: None = the channel block of the kernel on ``target``, and widths that are
            multiples of it where there are such.
        target: the processor that will run the model; see ``blocked_width``.
    """

    groups: int
    kind: str = "grouped"
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    min_group_width: int | None = None
    target: str = "auto"
    shuffle: str = "none"

    def make(self, source: Source) -> Plan:
        """Make the plan for a model."""
        block = blocked_width(self.target) if self.min_group_width is None else 1
        return plan(
            source.model,
            source.spec.input_shape,
            groups=self.groups,
            kind=self.kind,
            include=self.include,
            exclude=self.exclude,
            min_group_width=block if self.min_group_width is None else self.min_group_width,
            block=block,
            shuffle=self.shuffle,
        )


@dataclass(frozen=True)
class ConversionRequest:
    """Everything that ``run_conversion`` does.

    Attributes:
        model, plan: the dense model and how its convs are to be replaced.
        output: the folder to write.
        data: data spec; None = no data.
        calibration_images: unlabelled training images for the fit; 0 = from the weights alone.
        reconstruct_steps: steps of block reconstruction after the fit; 0 = none.
        finetune: settings of the fine-tune; None = none.
        force: replace an earlier output folder.
        static_batch: fixed batch size of the ONNX file; None = dynamic.
        threads: intra-op threads of the timing.
        seed: seed of everything random.
    """

    model: ModelRequest
    plan: PlanRequest
    output: Path
    data: str | None = None
    calibration_images: int = 1000
    reconstruct_steps: int = 0
    finetune: FinetuneSettings | None = None
    force: bool = False
    static_batch: int | None = None
    threads: int = 1
    seed: int = 0


def run_conversion(request: ConversionRequest, *, progress: bool = False) -> Report:
    """Load, plan, convert, recover, measure and write; the folder appears whole or not at all.

    Raises:
        GroupifyError: anything that cannot be done as asked.
    """
    with writing_folder(request.output, request.force) as folder:
        source = request.model.load(request.seed)
        chosen = request.plan.make(source)
        data = None if request.data is None else open_data(request.data, source, request.seed)
        calibration = _calibration(data, request)
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
            tuned=tuned,
            accuracy=accuracy,
            data=data,
            static_batch=request.static_batch,
            threads=request.threads,
            seed=request.seed,
            progress=progress,
            target=request.plan.target,
        )


@dataclass(frozen=True)
class FinetuneRequest:
    """Everything that ``run_finetune`` does.

    Attributes:
        folder: the output folder of a conversion.
        output: the folder to write.
        data: data spec with a training part.
        settings: how to train.
        checkpoint: the dense weights, where the recipe names a file.
        trust: let the recipe import the code that it names.
        force, static_batch, threads, seed: as in ``ConversionRequest``.
    """

    folder: Path
    output: Path
    data: str
    settings: FinetuneSettings
    checkpoint: Path | None = None
    trust: bool = False
    force: bool = False
    static_batch: int | None = None
    threads: int = 1
    seed: int = 0


def run_finetune(request: FinetuneRequest, *, progress: bool = False) -> Report:
    """Train a converted model further, measure and write; the folder appears whole or not at all.

    Raises:
        GroupifyError: anything that cannot be done as asked.
    """
    with writing_folder(request.output, request.force) as folder:
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
            static_batch=request.static_batch,
            threads=request.threads,
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
