"""groupify finetune: train a converted model further."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from groupify.cli.options import common_options, output_options, output_request
from groupify.cli.shared import CONTEXT, beside, print_report
from groupify.cli.training import recovery_options, telling_how_to_resume, training_request
from groupify.errors import SpecError


@click.command(context_settings=CONTEXT, short_help="Train a converted model further.")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--data", required=True, metavar="SPEC", help="A data set with a training part.")
@click.option(
    "--checkpoint", type=click.Path(path_type=Path), help="The dense weights, where the recipe names a file."
)
@click.option("--trust", is_flag=True, help="Let the folder's recipe import the code that it names.")
@recovery_options(epochs=1)
@output_options
@common_options
def finetune(folder: Path, **options: Any) -> None:
    """Train the converted model in FOLDER further, with the dense one as its teacher.

    Writes FOLDER-finetuned, or the folder given with -o.

    Under torchrun the processes share each batch, and the first one writes and prints.

    Example: groupify finetune demo-g4 --data demo --epochs 2
    """
    from groupify.pipeline import FinetuneRequest, run_finetune

    training = training_request(options)
    if training is None:
        raise SpecError("--epochs is 0: there is nothing to train; give a number above 0")
    output = output_request(options, beside(folder, "-finetuned"))
    with telling_how_to_resume(training, output):
        report = run_finetune(
            FinetuneRequest(
                folder=folder,
                output=output,
                data=options["data"],
                training=training,
                checkpoint=options["checkpoint"],
                trust=options["trust"],
                seed=options["seed"],
            ),
            progress=not options["quiet"],
        )
    print_report(report, options["as_json"])
