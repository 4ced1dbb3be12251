"""groupify bench: the converted model against the dense one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from groupify.cli.options import (
    command,
    common_options,
    factory_options,
    output_file,
    paths,
    precision_option,
    section,
    trust_option,
    whole_numbers,
)
from groupify.cli.shared import is_trusted, model_request, precisions, print_json
from groupify.errors import ArtefactError, GateError, SpecError
from groupify.files import folder_exists

if TYPE_CHECKING:
    from groupify.structures import Precision

_timing = section("Timing")


@command(short_help="Time the converted model against the dense one, or any ONNX files.")
@click.argument("folder", metavar="[FOLDER|MODEL]", required=False)
@trust_option
@factory_options
@_timing(
    "--table", type=click.Path(path_type=Path), callback=output_file,
    help="Time every conv of FOLDER|MODEL and what could replace it, and write a latency table for "
    "--latency-table here; an existing one of this machine is completed.",
)  # fmt: skip
@_timing(
    "--onnx", "files", callback=paths, metavar="FILES",
    help="Time these ONNX files instead, in turns, against the first: a.onnx,b.onnx. Sizes that they leave "
    "open are those of --input-size.",
)  # fmt: skip
@_timing(
    "--provider",
    default="cpu",
    show_default=True,
    metavar="NAME",
    help="Execution provider of ONNX Runtime for --onnx: cpu, cuda, tensorrt, openvino, coreml or xnnpack.",
)
@precision_option("What to time, or to write a table of. Default: float32, and int8 if FOLDER has it.", None)
@_timing("--threads", default="1", show_default=True, callback=whole_numbers, help="Like 1,2.")
@_timing("--batch-sizes", default="1", show_default=True, callback=whole_numbers, help="A list, like 1,8.")
@_timing("--seconds", type=click.FloatRange(0.1), default=4.0, show_default=True, help="Per setting.")
@_timing(
    "--max-latency-ratio", type=click.FloatRange(0, min_open=True), metavar="RATIO",
    help="Exit with 4 where a time ÷ that of the dense model in the same precision, or with --onnx of the "
    "first file, is above this.",
)  # fmt: skip
@_timing(
    "--update-report", is_flag=True,
    help="Write the times of the first setting into FOLDER's report.json and report.html, in the place of "
    "those that are there.",
)  # fmt: skip
@_timing("--pytorch", is_flag=True, help="Time PyTorch eager and a training step as well.")
@common_options
def bench(folder: str | None, **options: Any) -> None:
    """Time the converted model in FOLDER against the dense one, interleaved in one run.

    Example: groupify bench demo-g4 --threads 1,2 --batch-sizes 1,8

    Or, a latency table: groupify bench resnet50 --table laptop.json

    Or, in int8 as well: groupify bench demo-g4 --precision both

    Or, files from anywhere: groupify bench --onnx dense.onnx,other.onnx
    """
    if options["files"]:
        _bench_files(folder, options)
        return
    if folder is None:
        raise SpecError("nothing to time: give an output folder, a model with --table FILE, or --onnx FILES")
    if options["provider"] != "cpu":
        raise SpecError("--provider is for files: give them with --onnx")
    _bench_folder(folder, options)


def _bench_folder(folder: str, options: dict[str, Any]) -> None:
    from groupify.measure.folder import DENSE, bench_document, bench_folder
    from groupify.reporting.read import read_report
    from groupify.reporting.tables import stdout_console
    from groupify.reporting.text import print_bench

    if options["table"] is not None:
        if options["update_report"]:
            raise SpecError("--update-report is for an output folder: leave out --table")
        _write_table(folder, options)
        return
    if not folder_exists(folder):
        raise ArtefactError(
            f"no folder {folder!r}; expected an output folder of 'groupify convert', "
            "or a model with --table FILE"
        )
    if options["update_report"]:
        read_report(Path(folder))  # that there is one shows before the timing
    result = bench_folder(
        folder,
        precisions=_precisions(options),
        threads=options["threads"],
        batch_sizes=options["batch_sizes"],
        seconds=options["seconds"],
        pytorch=options["pytorch"],
        trust=is_trusted(folder, options),
        seed=options["seed"],
        progress=not options["quiet"],
    )
    if options["update_report"]:
        from groupify.pipeline.refreshing import update_report

        update_report(folder, result)
    if options["as_json"]:
        print_json(bench_document(result))
    else:
        print_bench(result, stdout_console())
        if options["update_report"]:
            click.echo(f"wrote the times into report.json and report.html of {folder}")
    _hold(options, {f"{row.name}, {row.setting}": row.speed_up for row in result.rows if row.model != DENSE})


def _hold(options: dict[str, Any], speed_ups: Mapping[str, float]) -> None:
    """Refuse what is slower than allowed."""
    most = options["max_latency_ratio"]
    slow = {name: 1 / speed_up for name, speed_up in speed_ups.items() if most and 1 / speed_up > most}
    if slow:
        found = "; ".join(f"{ratio:.3f} for {name}" for name, ratio in slow.items())
        raise GateError(f"--max-latency-ratio {most:g}: measured {found}")


def _precisions(options: dict[str, Any]) -> tuple[Precision, ...] | None:
    return None if options["precision"] is None else precisions(options["precision"])


def _bench_files(folder: str | None, options: dict[str, Any]) -> None:
    from groupify.measure.onnx_files import bench_files
    from groupify.reporting.tables import stdout_console
    from groupify.reporting.text import print_files_bench

    for given, name in (
        (folder, folder), (options["table"], "--table"), (options["pytorch"], "--pytorch"),
        (options["precision"], "--precision"), (options["update_report"], "--update-report"),
    ):  # fmt: skip
        if given:
            raise SpecError(f"--onnx times files alone: leave out {name}")
    result = bench_files(
        options["files"],
        threads=options["threads"],
        batch_sizes=options["batch_sizes"],
        seconds=options["seconds"],
        input_shape=options["input_shape"],
        provider=options["provider"],
        seed=options["seed"],
        progress=not options["quiet"],
    )
    if options["as_json"]:
        print_json(dataclasses.asdict(result))
    else:
        print_files_bench(result, stdout_console())
    first = result.rows[0].path
    _hold(
        options,
        {
            f"{row.path}, threads {row.threads}, batch {row.batch_size}": row.speed_up
            for row in result.rows
            if row.path != first
        },
    )


def _write_table(target: str, options: dict[str, Any]) -> None:
    from groupify.pipeline.targets import run_table

    if len(options["threads"]) > 1:
        raise SpecError("--table is for one number of threads: give --threads N, and a file for each")
    table = run_table(
        model_request(target, options),
        options["table"],
        precisions=_precisions(options) or ("float32",),
        threads=options["threads"][0],
        seed=options["seed"],
        progress=not options["quiet"],
    )
    if options["as_json"]:
        print_json({"table": str(options["table"]), "machine": table.machine, "convs": len(table.convs)})
    else:
        click.echo(f"wrote {options['table']}: {len(table.convs)} convs, on {table.machine}")
