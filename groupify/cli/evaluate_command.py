"""groupify evaluate: top-1 accuracy."""

from __future__ import annotations

from typing import Any

import click

from groupify.cli.options import common_options, model_options
from groupify.cli.shared import CONTEXT, open_target, print_json


@click.command(context_settings=CONTEXT, short_help="Measure top-1 accuracy.")
@click.argument("target")
@click.option("--data", required=True, metavar="SPEC", help="A data set with a labelled test part.")
@click.option("--trust", is_flag=True, help="Let the folder's recipe import the code that it names.")
@model_options
@common_options
def evaluate(target: str, **options: Any) -> None:
    """Measure the top-1 accuracy of TARGET, an output folder or a dense model.

    Example: groupify evaluate demo-g4 --data demo
    """
    from groupify.data.splits import load_data
    from groupify.errors import DataError
    from groupify.scores import evaluate as measure

    model, spec = open_target(target, options)
    data = load_data(options["data"], spec, seed=options["seed"])
    if not data.labelled or data.test is None:
        raise DataError(f"data {options['data']!r} has no labelled test part to measure accuracy on")
    accuracy = measure(model, data.test, progress=not options["quiet"])
    if options["as_json"]:
        print_json(
            {"model": target, "data": options["data"], "top1": accuracy.top1, "images": accuracy.images}
        )
    else:
        click.echo(f"{target}: top-1 {100 * accuracy.top1:.2f}% on {accuracy.images} test images")
