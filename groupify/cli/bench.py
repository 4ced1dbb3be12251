"""groupify bench: the converted model against the dense one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from groupify.cli.options import common_options, whole_numbers
from groupify.cli.shared import CONTEXT, print_json


@click.command(context_settings=CONTEXT, short_help="Time the converted model against the dense one.")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--threads", default="1", show_default=True, callback=whole_numbers, help="Like 1,2.")
@click.option(
    "--batch-sizes", default="1", show_default=True, callback=whole_numbers, help="A list, like 1,8."
)
@click.option("--seconds", type=click.FloatRange(0.1), default=4.0, show_default=True, help="Per setting.")
@click.option("--pytorch", is_flag=True, help="Time PyTorch eager and a training step as well.")
@click.option("--trust", is_flag=True, help="Let the folder's recipe import the code that it names.")
@common_options
def bench(folder: Path, **options: Any) -> None:
    """Time the converted model in FOLDER against the dense one, interleaved in one run.

    Example: groupify bench demo-g4 --threads 1,2 --batch-sizes 1,8
    """
    from groupify.bench import bench_document, bench_folder
    from groupify.reporting.text import print_bench, stdout_console

    result = bench_folder(
        folder,
        threads=options["threads"],
        batch_sizes=options["batch_sizes"],
        seconds=options["seconds"],
        pytorch=options["pytorch"],
        trust=options["trust"],
        seed=options["seed"],
        progress=not options["quiet"],
    )
    if options["as_json"]:
        print_json(bench_document(result))
    else:
        print_bench(result, stdout_console())
