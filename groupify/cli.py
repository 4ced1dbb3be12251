"""The command line: parse, call the API, print."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import warnings
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import click

from groupify.cli_options import (
    common_options,
    finetune_settings,
    model_options,
    model_request,
    number_or,
    output_options,
    plan_options,
    plan_request,
    recovery_options,
    whole_numbers,
)
from groupify.errors import ArtefactError, GroupifyError, GroupifyWarning, SpecError

if TYPE_CHECKING:
    from groupify.reporting import Report

# Everything heavy (torch first of all) is imported inside the commands: --help answers at once.

_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class _InterruptError(Exception):
    """SIGINT or SIGTERM, on its way to ``main``; click would print an empty line for a KeyboardInterrupt."""


class _Terminated(KeyboardInterrupt):
    """SIGTERM: cleaned up after like SIGINT."""


class _Group(click.Group):
    def invoke(self, context: click.Context) -> Any:
        """Run the command; the reader's leaving of the pipe ends it quietly."""
        try:
            return super().invoke(context)
        except KeyboardInterrupt as error:
            raise _InterruptError from error
        except BrokenPipeError:
            # What is still buffered would fail again, and loudly, when Python closes stdout.
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise click.exceptions.Exit(0) from None


def main() -> NoReturn:
    """Run the command line and exit.

    0 done, 1 internal error, 2 refused, 3 parity failed, 130 interrupted, 143 terminated.
    """
    sys.path.insert(0, os.getcwd())  # module:function specs name the user's own files
    signal.signal(signal.SIGTERM, _terminate)
    try:
        cli.main(standalone_mode=False)
    except GroupifyError as error:
        _die(str(error), error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(2)
    except click.ClickException as error:
        _die(error.format_message(), 2)
    except _InterruptError as error:
        _leave(error.__cause__)
    except (KeyboardInterrupt, click.Abort) as error:
        _leave(error)
    except OSError as error:
        _die(f"cannot read or write: {error}", 2)
    except MemoryError:
        _die("out of memory; use fewer calibration images or a smaller model", 2)
    except Exception as error:
        if os.environ.get("GROUPIFY_TRACEBACK"):
            raise
        _die(
            f"internal error: {type(error).__name__}: {error}; please report it, with what "
            "GROUPIFY_TRACEBACK=1 shows",
            1,
        )
    sys.exit(0)


def _terminate(_: int, __: FrameType | None) -> NoReturn:
    raise _Terminated


def _leave(error: BaseException | None) -> NoReturn:
    if isinstance(error, _Terminated):
        _die("terminated; nothing was written", 143)
    _die("interrupted; nothing was written", 130)


def _die(message: str, code: int) -> NoReturn:
    click.echo(f"groupify: error: {' '.join(message.split())}", err=True)
    sys.exit(code)


def _speak_in_lines() -> None:
    """Show groupify's warnings as one line each, and no other library's."""

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if issubclass(category, GroupifyWarning):
            click.echo(f"groupify: warning: {' '.join(str(message).split())}", err=True)

    warnings.simplefilter("ignore")
    warnings.simplefilter("always", GroupifyWarning)
    warnings.showwarning = show


@click.group(cls=_Group, context_settings=_CONTEXT)
@click.version_option(package_name="groupify")
def cli() -> None:
    """Turn the convolutions of a trained CNN into grouped ones: smaller, faster, still accurate."""
    _speak_in_lines()


def _print_json(document: Any) -> None:
    click.echo(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))


def _print_report(report: Report, as_json: bool) -> None:
    from groupify.reporting import print_report, report_document
    from groupify.reporting.text import stdout_console

    if as_json:
        _print_json(report_document(report))
    else:
        print_report(report, stdout_console())


@cli.command(context_settings=_CONTEXT, short_help="Convert a model and write a folder.")
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
            output=options["output"] or Path(f"{label}-g{options['groups']}"),
            data=options["data"],
            calibration_images=options["calibrate"] or 0,
            reconstruct_steps=options["reconstruct"],
            finetune=finetune_settings(options) if options["epochs"] else None,
            force=options["force"],
            static_batch=options["static_batch"],
            threads=options["threads"],
            seed=options["seed"],
        ),
        progress=not options["quiet"],
    )
    _print_report(report, options["as_json"])


@cli.command(context_settings=_CONTEXT, short_help="Show what a conversion would do.")
@click.argument("model")
@model_options
@plan_options
@common_options
def plan(model: str, **options: Any) -> None:
    """Show what a conversion of MODEL would do; nothing is written.

    Example: groupify plan resnet50 --groups 8 --weights none
    """
    from groupify.reporting import print_plan
    from groupify.reporting.document import change_document, site_document
    from groupify.reporting.text import stdout_console

    # A plan depends on shapes alone: weights that are not at hand are no reason to warn or to wait.
    if options["weights"] == "auto":
        options["weights"] = "none"
    source = model_request(model, options).load(options["seed"])
    result = plan_request(options).make(source)
    if options["as_json"]:
        _print_json(
            {
                "model": model,
                "input_shape": list(result.input_shape),
                "groups": result.groups,
                "sites": [site_document(site) for site in result.sites],
                "params": change_document(result.params),
                "macs": change_document(result.macs),
            }
        )
    else:
        print_plan(result, stdout_console())


@cli.command(context_settings=_CONTEXT, short_help="Measure top-1 accuracy.")
@click.argument("target")
@click.option("--data", required=True, metavar="SPEC", help="A data set with a labelled test part.")
@click.option("--trust", is_flag=True, help="Let the folder's recipe import the code that it names.")
@model_options
@common_options
def evaluate(target: str, **options: Any) -> None:
    """Measure the top-1 accuracy of TARGET, an output folder or a dense model.

    Example: groupify evaluate demo-g4 --data demo
    """
    from groupify.data import load_data
    from groupify.errors import DataError
    from groupify.evaluation import evaluate as measure

    model, spec = _open(target, options)
    data = load_data(options["data"], spec, seed=options["seed"])
    if not data.labelled or data.test is None:
        raise DataError(f"data {options['data']!r} has no labelled test part to measure accuracy on")
    accuracy = measure(model, data.test, progress=not options["quiet"])
    if options["as_json"]:
        _print_json(
            {"model": target, "data": options["data"], "top1": accuracy.top1, "images": accuracy.images}
        )
    else:
        click.echo(f"{target}: top-1 {100 * accuracy.top1:.2f}% on {accuracy.images} test images")


def _open(target: str, options: dict[str, Any]) -> tuple[Any, Any]:
    """Return the model and the spec of an output folder or of a dense model."""
    from groupify.artefact import load, read_recipe

    if os.path.isdir(target):
        return load(target, trust=options["trust"]), read_recipe(target).model
    if os.sep in target:
        raise ArtefactError(
            f"no folder {target!r}; expected an output folder of 'groupify convert', or a model"
        )
    try:
        source = model_request(target, options).load(options["seed"])
    except SpecError as error:
        raise SpecError(f"no folder {target!r}, and as a model: {error}") from error
    return source.model, source.spec


def _beside(folder: Path, suffix: str) -> Path:
    """Return ``folder`` with a suffix to its name, also where that is a dot or two."""
    named = folder if folder.name not in ("", "..") else folder.resolve()
    return named.parent / f"{named.name}{suffix}"


@cli.command(context_settings=_CONTEXT, short_help="Train a converted model further.")
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

    Example: groupify finetune demo-g4 --data demo --epochs 2
    """
    from groupify.pipeline import FinetuneRequest, run_finetune

    report = run_finetune(
        FinetuneRequest(
            folder=folder,
            output=options["output"] or _beside(folder, "-finetuned"),
            data=options["data"],
            settings=finetune_settings(options),
            checkpoint=options["checkpoint"],
            trust=options["trust"],
            force=options["force"],
            static_batch=options["static_batch"],
            threads=options["threads"],
            seed=options["seed"],
        ),
        progress=not options["quiet"],
    )
    _print_report(report, options["as_json"])


@cli.command(context_settings=_CONTEXT, short_help="Export to ONNX, checked against PyTorch.")
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
    model, spec = _open(target, options)
    exported = export_onnx(
        model,
        path,
        input_shape=spec.input_shape,
        preprocessing=spec.preprocessing,
        static_batch=options["static_batch"],
    )
    parity = check_parity(model, exported.path, input_shape=spec.input_shape, seed=options["seed"])
    if options["as_json"]:
        _print_json(
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


@cli.command(context_settings=_CONTEXT, short_help="Time the converted model against the dense one.")
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
        _print_json(bench_document(result))
    else:
        print_bench(result, stdout_console())
