"""groupify convert: the whole way, from a dense model to a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from groupify.cli.options import (
    calibrate_option,
    common_options,
    data_option,
    model_options,
    model_request,
    output_options,
    output_request,
    plan_options,
    plan_request,
    whole_numbers,
)
from groupify.cli.shared import CONTEXT, print_report
from groupify.cli.training import recovery_options, telling_how_to_resume, training_request
from groupify.errors import SpecError


@click.command(context_settings=CONTEXT, short_help="Convert a model and write a folder.")
@click.argument("model")
@model_options
@plan_options
@data_option
@calibrate_option
@click.option("--reconstruct", type=click.IntRange(0), default=0, show_default=True, metavar="STEPS",
              help="Steps per block on the dense model's activations, after the fit; no labels.")  # fmt: skip
@click.option("--uniform", callback=whole_numbers, metavar="LIST",
              help="Numbers of groups to convert with as well, like 2,4,8, for comparison in the report: "
              "untrained, the same everywhere. Each takes about as long as the conversion.")  # fmt: skip
@recovery_options(epochs=0)
@output_options
@common_options
def convert(model: str, **options: Any) -> None:
    """Convert MODEL and write a folder: weights, recipe, ONNX file, report.

    MODEL is a torchvision name, demo, or package.module:factory.

    Example: groupify convert demo --groups 4 --data demo --epochs 1

    Or, for a budget: groupify convert demo --target macs=30% --data demo
    """
    from groupify.pipeline import ConversionRequest, run_conversion

    if options["data"] is None and options["epochs"]:
        raise SpecError(f"--epochs {options['epochs']:g} needs --data, for example --data demo")
    if options["data"] is None and options["reconstruct"]:
        raise SpecError(f"--reconstruct {options['reconstruct']} needs --data, for example --data demo")
    label = model.rpartition(":")[2].rpartition(".")[2]
    plan = plan_request(options)
    ending = "planned" if plan.search is not None or plan.file is not None else f"g{options['groups']}"
    output, training = output_request(options, Path(f"{label}-{ending}")), training_request(options)
    with telling_how_to_resume(training, output):
        report = run_conversion(
            ConversionRequest(
                model=model_request(model, options),
                plan=plan,
                output=output,
                data=options["data"],
                calibration_images=options["calibrate"] or 0,
                reconstruct_steps=options["reconstruct"],
                training=training,
                seed=options["seed"],
                save_plan=options["save_plan"],
                uniform=options["uniform"],
            ),
            progress=not options["quiet"],
        )
    print_report(report, options["as_json"])
