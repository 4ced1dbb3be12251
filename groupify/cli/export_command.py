"""groupify export: an ONNX file, checked against PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from groupify.cli.options import (
    common_options,
    model_options,
    quantize_option,
    threads_option,
)
from groupify.cli.shared import CONTEXT, open_target, print_json
from groupify.errors import ArtefactError
from groupify.files import folder_exists


@click.command(context_settings=CONTEXT, short_help="Export to ONNX, checked against PyTorch.")
@click.argument("name", metavar="TARGET")
@click.option("--output", "-o", type=click.Path(path_type=Path), help="File to write; default TARGET.onnx.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@click.option(
    "--python", type=click.Path(path_type=Path), metavar="FILE",
    help="Write a Python file that rebuilds the folder's model with torch and torchvision alone, no ONNX.",
)  # fmt: skip
@click.option("--static-batch", type=click.IntRange(1), help="Fixed batch size.")
@click.option("--trust", is_flag=True, help="Let the folder's recipe import the code that it names.")
@click.option("--data", metavar="SPEC", help="Real images for the check, and the calibration of --quantize.")
@quantize_option
@threads_option
@model_options
@common_options
def export(name: str, **options: Any) -> None:
    """Export TARGET, an output folder or a dense model, to ONNX and check the file against PyTorch.

    Example: groupify export demo-g4 -o demo-g4.onnx --static-batch 1
    """
    if options["python"] is not None:
        _export_python(name, options)
        return
    from groupify.artefact import read_recipe
    from groupify.data.splits import load_data
    from groupify.pipeline.int8 import check_quantize
    from groupify.pipeline.onnx_files import check_export_paths, run_export
    from groupify.reporting.document import export_document
    from groupify.reporting.text import export_lines

    path = options["output"] or Path(f"{Path(name).name.rpartition(':')[2]}.onnx")
    check_quantize(options["quantize"], options["data"])
    check_export_paths(path, quantize=options["quantize"], force=options["force"])
    model, spec = open_target(name, options)
    data = None if options["data"] is None else load_data(options["data"], spec, seed=options["seed"])
    result = run_export(
        model,
        spec,
        path,
        data=data,
        quantize=options["quantize"],
        static_batch=options["static_batch"],
        recipe_sha256=read_recipe(name).sha256 if folder_exists(name) else None,
        threads=options["threads"],
        seed=options["seed"],
        progress=not options["quiet"],
    )
    if options["as_json"]:
        print_json({"model": name, **export_document(result)})
    else:
        for line in export_lines(result):
            click.echo(line)


def _export_python(target: str, options: dict[str, Any]) -> None:
    from groupify.artefact import WEIGHTS_FILE, read_recipe
    from groupify.onnx.python_file import write_python_file
    from groupify.pipeline.onnx_files import check_export_paths

    path = options["python"]
    check_export_paths(path, quantize=False, force=options["force"], option="--python")
    if not folder_exists(target):
        raise ArtefactError(f"--python needs an output folder of 'groupify convert', not {target!r}")
    write_python_file(read_recipe(target), path, trust=options["trust"])
    weights = Path(target) / WEIGHTS_FILE
    if options["as_json"]:
        print_json({"model": target, "files": {"python": str(path), "weights": str(weights)}})
    else:
        click.echo(f"wrote {path}: load({str(weights)!r}) gives the model, with torch and torchvision alone")
