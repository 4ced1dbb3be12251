"""groupify convert: the whole way, from a dense model to a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from groupify.cli.options import (
    common_options,
    model_options,
    model_request,
    number_or,
    output_options,
    output_request,
    plan_options,
    plan_request,
)
from groupify.cli.shared import CONTEXT, print_report
from groupify.cli.training import recovery_options, training_request
from groupify.errors import SpecError


@click.command(context_settings=CONTEXT, short_help="Convert a model and write a folder.")
@click.argument("model")
@model_options
@plan_options
@click.option(
    "--data",
    metavar="SPEC",
    help="demo, fashion-mnist[:ROOT], cifar10:ROOT, imagefolder:ROOT, module:function.",
)
@click.option(
    "--calibrate",
    default="1000",
    show_default=True,
    metavar="N|none",
    callback=number_or("none", "images"),
    help="Unlabelled training images for the fit. none: from the weights alone.",
)
@click.option("--reconstruct", type=click.IntRange(0), default=0, show_default=True, metavar="STEPS",
              help="Steps per block on the dense model's activations, after the fit; no labels.")  # fmt: skip
@recovery_options(epochs=0)
@output_options
@common_options
def convert(model: str, **options: Any) -> None:
    """Convert MODEL and write a folder: weights, recipe, ONNX file, report.

    MODEL is a torchvision name, demo, or package.module:factory.

    Example: groupify convert demo --groups 4 --data demo --epochs 1
    """
    from groupify.pipeline import ConversionRequest, run_conversion

    if options["data"] is None and options["epochs"]:
        raise SpecError(f"--epochs {options['epochs']:g} needs --data, for example --data demo")
    if options["data"] is None and options["reconstruct"]:
        raise SpecError(f"--reconstruct {options['reconstruct']} needs --data, for example --data demo")
    label = model.rpartition(":")[2].rpartition(".")[2]
    report = run_conversion(
        ConversionRequest(
            model=model_request(model, options),
            plan=plan_request(options),
            output=output_request(options, Path(f"{label}-g{options['groups']}")),
            data=options["data"],
            calibration_images=options["calibrate"] or 0,
            reconstruct_steps=options["reconstruct"],
            training=training_request(options),
            seed=options["seed"],
        ),
        progress=not options["quiet"],
    )
    print_report(report, options["as_json"])
