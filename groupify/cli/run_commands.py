"""groupify convert and groupify finetune: whole runs, from a model to a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from groupify.cli.options import (
    command,
    common_options,
    data_option,
    device_option,
    fit_options,
    folder_task_options,
    model_options,
    output_options,
    plan_options,
    preprocessing_options,
    reconstruct_option,
    teacher_option,
    training_options,
    trust_option,
    uniform_option,
)
from groupify.cli.shared import (
    beside,
    is_trusted,
    model_label,
    model_request,
    named_function,
    output_request,
    plan_request,
    preprocessing_request,
    print_report,
    telling_how_to_resume,
    training_request,
)

if TYPE_CHECKING:
    from groupify.pipeline.requests import OutputRequest, TrainingRequest
    from groupify.reporting.results import Report


@command(short_help="Convert a model and write a folder.")
@click.argument("model")
@model_options
@plan_options
@fit_options
@reconstruct_option
@training_options(epochs=0)
@output_options()
@uniform_option
@device_option
@common_options
def convert(model: str, **options: Any) -> None:
    """Convert MODEL and write a folder: weights, recipe, ONNX file, report.

    MODEL is a torchvision name, demo, or package.module:factory.

    Without --groups and --budget, each conv gets the structure that loses least at the MACs of 4 groups.

    Example: groupify convert demo --data demo

    Or, with plain groups: groupify convert demo --groups 4 --data demo --epochs 1

    Or, for a budget: groupify convert demo --budget macs=30% --data demo
    """
    from groupify.pipeline.requests import ConversionRequest
    from groupify.pipeline.run import run_conversion

    label = model_label(model, options["arguments"])
    plan = plan_request(options)
    output, training = output_request(options, Path(f"{label}-{plan.label}")), training_request(options)
    request = ConversionRequest(
        model=model_request(model, options),
        plan=plan,
        output=output,
        data=options["data"],
        calibration_images=options["calibrate"],
        reconstruct_steps=options["reconstruct"],
        training=training,
        seed=options["seed"],
        uniform=options["uniform"],
    )
    _run(lambda progress: run_conversion(request, progress=progress), training, output, options)


@command(short_help="Train a converted model further.")
@click.argument("folder", type=click.Path(path_type=Path))
@teacher_option
@trust_option
@preprocessing_options
@data_option("A data set with a training part.", required=True)
@folder_task_options
@training_options(epochs=1)
@output_options(None, " Default: as FOLDER's files.")
@device_option
@common_options
def finetune(folder: Path, **options: Any) -> None:
    """Train the converted model in FOLDER further, with the dense one as its teacher.

    Writes FOLDER-finetuned, or the folder given with -o.

    Under torchrun the processes share each batch, and the first one writes and prints.

    Example: groupify finetune demo-g4 --data demo --epochs 2
    """
    from groupify.errors import SpecError
    from groupify.pipeline.requests import FinetuneRequest
    from groupify.pipeline.run import run_finetune

    training = training_request(options)
    if training is None:
        raise SpecError("--epochs is 0: there is nothing to train; give a number above 0")
    output = output_request(options, beside(folder, "-finetuned"))
    request = FinetuneRequest(
        folder=folder,
        output=output,
        data=options["data"],
        training=training,
        checkpoint=options["checkpoint"],
        trust=is_trusted(folder, options),
        device=options["device"],
        preprocessing=preprocessing_request(options),
        seed=options["seed"],
        task=options["task"],
        metric=named_function(options["metric"], "metric"),
    )
    _run(lambda progress: run_finetune(request, progress=progress), training, output, options)


def _run(
    start: Callable[[bool], Report | None],
    training: TrainingRequest | None,
    output: OutputRequest,
    options: dict[str, Any],
) -> None:
    with telling_how_to_resume(training, output):
        report = start(not options["quiet"])
    print_report(report, options["as_json"])
