"""groupify evaluate and groupify export: what takes an output folder or a dense model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from groupify.cli.options import (
    command,
    common_options,
    data_option,
    device_option,
    export_options,
    model_options,
    output,
    precision_option,
    trust_option,
)
from groupify.cli.shared import export_options as asked_export
from groupify.cli.shared import is_trusted, model_label, model_request, print_json
from groupify.errors import GateError


@command(short_help="Measure top-1 accuracy.")
@click.argument("target")
@data_option("A data set with a labelled test part.", required=True)
@model_options
@output(
    "--min-top1", type=click.FloatRange(0, 100), metavar="PERCENT",
    help="Exit with 4 where the accuracy is below this, for checks before a deployment.",
)  # fmt: skip
@trust_option
@device_option
@common_options
def evaluate(target: str, **options: Any) -> None:
    """Measure the top-1 accuracy of TARGET, an output folder, a dense model or an ONNX file.

    Example: groupify evaluate demo-g4 --data demo

    Or, a file as it runs in ONNX Runtime: groupify evaluate demo-g4/model.int8.onnx --data demo
    """
    from groupify.pipeline.targets import run_evaluation

    accuracy = run_evaluation(
        model_request(target, options), options["data"], seed=options["seed"], progress=not options["quiet"]
    )
    if options["as_json"]:
        print_json(
            {"model": target, "data": options["data"], "top1": accuracy.top1, "images": accuracy.images}
        )
    else:
        click.echo(f"{target}: top-1 {100 * accuracy.top1:.2f}% on {accuracy.images} test images")
    least = options["min_top1"]
    if least is not None and 100 * accuracy.top1 < least:
        raise GateError(f"--min-top1 {least:g}: {target} has {100 * accuracy.top1:.2f}%")


@command(short_help="Export to ONNX, checked against PyTorch.")
@click.argument("name", metavar="TARGET")
@output(
    "--output", "-o", type=click.Path(path_type=Path),
    help="File to write; default TARGET.onnx. Of --precision both it is the float one, the other beside it.",
)  # fmt: skip
@output("--force", is_flag=True, help="Replace an existing file.")
@output(
    "--python", type=click.Path(path_type=Path), metavar="FILE",
    help="Write a Python file that rebuilds the folder's model with torch and torchvision alone, no ONNX.",
)  # fmt: skip
@precision_option(
    "What the file computes in; both: an int8 file too. int8 is calibrated on --data. float16: half the "
    "size, for processors that compute in it; its inputs and outputs are float32.",
    "float32",
    "float16",
)
@export_options
@data_option("Real images for the check, and the calibration of int8.")
@model_options
@trust_option
@common_options
def export(name: str, **options: Any) -> None:
    """Export TARGET, an output folder or a dense model, to ONNX and check the file against PyTorch.

    Example: groupify export demo-g4 -o demo-g4.onnx --static-batch 1
    """
    if options["python"] is not None:
        _export_python(name, options)
        return
    from groupify.pipeline.targets import run_export
    from groupify.reporting.document import export_document
    from groupify.reporting.text import export_lines

    result = run_export(
        model_request(name, options),
        options["output"] or _default_file(name, options),
        asked_export(options),
        data=options["data"],
        force=options["force"],
        seed=options["seed"],
        progress=not options["quiet"],
    )
    if options["as_json"]:
        print_json({"model": name, **export_document(result)})
    else:
        for line in export_lines(result):
            click.echo(line)


def _default_file(name: str, options: dict[str, Any]) -> Path:
    precision = options["precision"]
    ending = ".onnx" if precision in ("float32", "both") else f".{precision}.onnx"
    return Path(f"{model_label(Path(name).name, options['arguments'])}{ending}")


def _export_python(target: str, options: dict[str, Any]) -> None:
    from groupify.pipeline.targets import export_python

    path = options["python"]
    weights = export_python(target, path, force=options["force"], trust=is_trusted(target, options))
    if options["as_json"]:
        print_json({"model": target, "files": {"python": str(path), "weights": str(weights)}})
    else:
        click.echo(f"wrote {path}: load({str(weights)!r}) gives the model, with torch and torchvision alone")
