"""groupify export: an ONNX file, checked against PyTorch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from groupify.cli.options import common_options, model_options
from groupify.cli.shared import CONTEXT, open_target, print_json
from groupify.errors import ArtefactError


@click.command(context_settings=CONTEXT, short_help="Export to ONNX, checked against PyTorch.")
@click.argument("target")
@click.option("--output", "-o", type=click.Path(path_type=Path), help="File to write; default TARGET.onnx.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@click.option("--static-batch", type=click.IntRange(1), help="Fixed batch size.")
@click.option("--trust", is_flag=True, help="Let the folder's recipe import the code that it names.")
@model_options
@common_options
def export(target: str, **options: Any) -> None:
    """Export TARGET, an output folder or a dense model, to ONNX and check the file against PyTorch.

    Example: groupify export demo-g4 -o demo-g4.onnx --static-batch 1
    """
    from groupify.deployment.export import export_onnx
    from groupify.deployment.parity import check_parity

    path = options["output"] or Path(f"{Path(target).name.rpartition(':')[2]}.onnx")
    if os.path.lexists(path) and not options["force"]:
        raise ArtefactError(f"{path} exists; give --force to replace it, or another file with -o")
    if os.path.isdir(path) or not os.path.isdir(path.parent):
        raise ArtefactError(f"cannot write {path}: expected a file in an existing folder; choose it with -o")
    model, spec = open_target(target, options)
    exported = export_onnx(
        model,
        path,
        input_shape=spec.input_shape,
        preprocessing=spec.preprocessing,
        static_batch=options["static_batch"],
    )
    parity = check_parity(model, exported.path, input_shape=spec.input_shape, seed=options["seed"])
    if options["as_json"]:
        print_json(
            {
                "model": target,
                "files": {"onnx": str(exported.path)},
                "onnx_bytes": exported.file_bytes,
                "opset": exported.opset,
                "parity": {"max_abs_diff": parity.max_abs_diff, "max_rel_diff": parity.max_rel_diff},
            }
        )
    else:
        click.echo(
            f"wrote {exported.path} ({exported.file_bytes} bytes, opset {exported.opset}); "
            f"ONNX Runtime against PyTorch: largest difference {parity.max_abs_diff:.1e}"
        )
