"""The stages that make the grouped model: convert, then train."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from groupify.conversion.conversion import Calibration, Conversion, convert
from groupify.conversion.reconstruct import ReconstructionOptions
from groupify.conversion.surgery import restructure
from groupify.data.batches import calibration_images
from groupify.data.ranks import Ranks
from groupify.data.splits import DataSplits
from groupify.errors import SpecError
from groupify.graph.call import example_input
from groupify.onnx.exporting import export_onnx
from groupify.pipeline.inputs import warn_near_chance
from groupify.pipeline.prepare import Prepared
from groupify.pipeline.requests import ConversionRequest, TrainingRequest
from groupify.reporting.results import AccuracyChange, UniformRun
from groupify.scores import evaluate, measure_cost
from groupify.training.finetuning import FinetuneResult, finetune
from groupify.training.state import Checkpointing


@dataclass(frozen=True)
class Grouped:
    """A grouped model, and how it came about.

    Attributes:
        model: on the CPU.
        accuracy: of it and of the dense model, as far as measured.
        conversion: how its weights were found; None when it was only trained further, or another process
            converted it.
        tuned: how it was trained; None = not at all.
    """

    model: nn.Module
    accuracy: AccuracyChange
    conversion: Conversion | None = None
    tuned: FinetuneResult | None = None


def convert_as_planned(
    prepared: Prepared, request: ConversionRequest, ranks: Ranks, *, progress: bool
) -> Grouped:
    """Convert with the plan and measure the accuracy.

    The first process converts; the others get its weights.

    Raises:
        GroupifyError: the model cannot be converted as planned.
    """
    dense, conversion = prepared.source.model, None
    if ranks.first:
        conversion = convert(
            dense, prepared.plan, _calibration(prepared, request), seed=request.seed, progress=progress
        )
        conversion = replace(conversion, notes=(*prepared.notes, *conversion.notes))
        model = conversion.model
    else:
        model = restructure(dense, prepared.plan.recipes)
    return measured(ranks.share_weights(model), prepared, ranks, conversion, progress=progress)


def _calibration(prepared: Prepared, request: ConversionRequest) -> Calibration | None:
    if prepared.data is None or request.calibration_images == 0:
        return None
    images = calibration_images(prepared.data.for_calibration, request.calibration_images, seed=request.seed)
    return Calibration(images, reconstruction=ReconstructionOptions(steps=request.reconstruct_steps))


def measured(
    model: nn.Module,
    prepared: Prepared,
    ranks: Ranks,
    conversion: Conversion | None = None,
    *,
    progress: bool,
) -> Grouped:
    """Return a converted model with its accuracy and the dense one's, where there are labels for that."""
    data = prepared.data
    if data is None or not data.labelled or data.test is None:
        return Grouped(model, AccuracyChange(), conversion)
    before = evaluate(prepared.source.model, data.test, progress=progress, ranks=ranks)
    warn_near_chance(before, prepared.source, data)
    after = evaluate(model, data.test, progress=progress, ranks=ranks)
    accuracy = AccuracyChange(dense=before.top1, converted=after.top1, images=before.images)
    return Grouped(model, accuracy, conversion)


def train(
    grouped: Grouped,
    prepared: Prepared,
    request: TrainingRequest | None,
    checkpointing: Checkpointing | None,
    ranks: Ranks,
    *,
    progress: bool,
) -> Grouped:
    """Fine-tune on the device asked for, and measure the accuracy again; the result is on the CPU.

    Raises:
        GroupifyError: the model cannot be trained as asked.
    """
    data = prepared.data
    if request is None or data is None:
        return grouped
    device = _device(request.device)
    tuned = finetune(
        copy.deepcopy(grouped.model).to(device),
        data,
        teacher=copy.deepcopy(prepared.source.model).to(device),
        settings=request.settings,
        checkpointing=checkpointing,
        log=request.log,
        distributed=ranks.world > 1,
        progress=progress,
    )
    tuned = replace(tuned, model=tuned.model.cpu(), last_model=tuned.last_model.cpu())
    accuracy = replace(grouped.accuracy, recovered=_top1(tuned.model, data, ranks, progress))
    return replace(grouped, model=tuned.model, accuracy=accuracy, tuned=tuned)


def _device(name: str) -> torch.device:
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise SpecError("--device cuda: PyTorch sees no GPU here; give --device cpu")
    if name == "cpu" or not available:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _top1(model: nn.Module, data: DataSplits, ranks: Ranks, progress: bool) -> float | None:
    if not data.labelled or data.test is None:
        return None
    return evaluate(model, data.test, progress=progress, ranks=ranks).top1


def convert_uniform(
    prepared: Prepared, request: ConversionRequest, folder: Path, *, progress: bool
) -> dict[Path, UniformRun]:
    """Convert with the other plans as the run itself was, without training.

    Args:
        prepared: gives the plans, and labelled test images.
        request: gives calibration, batch size and seed.
        folder: where to export to; to be timed, and removed.
        progress: show bars on stderr.

    Returns:
        What was measured so far, by ONNX file.
    """
    data, shape = prepared.data, prepared.source.spec.input_shape
    if not prepared.uniform or data is None or data.test is None:
        return {}
    dense, calibration = prepared.source.model, _calibration(prepared, request)
    runs = {}
    for groups, plan in prepared.uniform.items():
        model = convert(dense, plan, calibration, seed=request.seed, progress=progress).model
        exported = export_onnx(
            model,
            folder / f"uniform-{groups}.onnx",
            input_shape=shape,
            static_batch=request.output.export.static_batch,
        )
        cost = measure_cost(model, example_input(shape, like=dense))
        top1 = evaluate(model, data.test, progress=progress).top1
        runs[exported.path] = UniformRun(groups, cost.params, cost.macs, top1)
    return runs
