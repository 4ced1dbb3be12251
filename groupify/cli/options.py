"""Options that several commands share, and the requests that they amount to."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from groupify.errors import SpecError, near_names

if TYPE_CHECKING:
    from groupify.pipeline import ModelRequest, OutputRequest, PlanRequest, SearchRequest
    from groupify.planning.rules import Rules

# Everything heavy (torch first of all) is imported inside the functions: --help answers at once.

Command = TypeVar("Command", bound=Callable[..., Any])


def input_shape(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """Parse C,H,W."""
    if value is None:
        return None
    try:
        shape = tuple(int(part) for part in value.split(","))
    except ValueError:
        shape = ()
    if len(shape) != 3 or min(shape) < 1:
        raise SpecError(f"--input-size {value!r}: expected C,H,W, for example 3,224,224")
    return shape


def model_arguments(_: click.Context, __: click.Parameter, value: str | None) -> dict[str, Any]:
    """Parse the JSON object of a factory's arguments."""
    if value is None:
        return {}
    try:
        arguments = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise SpecError(f'--model-args {value!r} is no JSON: {error}; expected {{"name": value}}') from error
    if not isinstance(arguments, dict):
        raise SpecError(f'--model-args {value!r}: expected a JSON object like {{"num_classes": 10}}')
    return arguments


def whole_numbers(_: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, ...]:
    """Parse a list of whole numbers from 1, like 1,2; none where the option is not given."""
    if value is None:
        return ()
    try:
        numbers = tuple(int(part) for part in value.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise SpecError(f"{parameter.opts[0]} {value!r}: expected whole numbers from 1, for example 1,2")
    return numbers


def output_file(_: click.Context, parameter: click.Parameter, value: Path | None) -> Path | None:
    """Refuse a file that cannot be written, before the work whose result it is to hold."""
    if value is None:
        return None
    folder = next(parent for parent in value.absolute().parents if os.path.lexists(parent))
    if value.is_dir():
        problem = "it is a folder"
    elif not folder.is_dir():
        problem = f"{folder} is no folder"
    elif not os.access(value if value.exists() else folder, os.W_OK):
        problem = f"{folder} is not writable"
    else:
        return value
    raise SpecError(f"{parameter.opts[0]}: cannot write {value}: {problem}; choose another file")


def number_or(word: str, what: str) -> Callable[[click.Context, click.Parameter, str], int | None]:
    """Parse a whole number from 1, or a word that stands for None."""

    def parse(_: click.Context, parameter: click.Parameter, value: str) -> int | None:
        if value == word:
            return None
        try:
            number = int(value)
        except ValueError:
            number = 0
        if number < 1:
            raise SpecError(f"{parameter.opts[0]} {value!r}: expected {word} or a number of {what} from 1")
        return number

    return parse


PROCESSORS = ("auto", "avx2", "avx512", "arm64", "any")


def _targets(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """Tell the processor from the targets of a budget, which have a ``=``."""
    processors = [value for value in values if "=" not in value]
    for value in processors:
        if value not in PROCESSORS:
            raise SpecError(
                f"--target {value!r}: expected a processor ({', '.join(PROCESSORS)}) or a budget "
                f"like macs=40%{near_names(value, PROCESSORS)}"
            )
    if len(set(processors)) > 1:
        raise SpecError(f"--target names two processors, {' and '.join(processors)}; expected one")
    return (processors or ["auto"])[0], tuple(value for value in values if "=" in value)


def _options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


model_options = _options(
    click.option(
        "--weights",
        default="auto",
        show_default=True,
        help="auto: torchvision's default weights, or random ones where they cannot be had. "
        "DEFAULT or a name of torchvision: those or an error. none: random.",
    ),
    click.option(
        "--checkpoint", type=click.Path(path_type=Path), help="Your own weights: safetensors or torch."
    ),
    click.option(
        "--model-args", "arguments", callback=model_arguments, help="Arguments of the model's factory, JSON."
    ),
    click.option("--input-size", "input_shape", callback=input_shape, help="C,H,W of one image."),
)
threads_option = click.option(
    "--threads", type=click.IntRange(1), default=1, show_default=True, help="Threads when timing."
)
plan_options = _options(
    click.option("--groups", "-g", type=int, default=4, show_default=True, help="Groups to aim at."),
    click.option(
        "--kind",
        default="grouped",
        show_default=True,
        help="grouped, or grouped-pointwise: a grouped conv and a dense 1×1 conv.",
    ),
    click.option("--include", multiple=True, metavar="GLOB", help="Convert only these sites. Repeatable."),
    click.option("--exclude", multiple=True, metavar="GLOB", help="Leave these sites alone. Repeatable."),
    click.option(
        "--min-group-width",
        default="auto",
        show_default=True,
        callback=number_or("auto", "channels"),
        help="Fewest channels per group. auto: the block of ONNX Runtime's fast kernel; 1 switches it off.",
    ),
    click.option(
        "--target",
        "targets",
        multiple=True,
        callback=_targets,
        metavar="CPU|BUDGET",
        help="The processor that will run the model: auto (this one), avx2, avx512, arm64 or any. And a "
        "budget, to plan for instead of --groups: macs=40%, params=8M, bytes=8MB, latency=2x, drop=0.5. "
        "Repeatable; all hold.",
    ),
    click.option(
        "--shuffle",
        is_flag=False,
        flag_value="all",
        default="none",
        show_default=True,
        help="none; all: a channel shuffle behind every converted conv. With a budget: all tries both.",
    ),
    click.option(
        "--plan", "plan_file", type=click.Path(path_type=Path), help="Take the plan from this file."
    ),
    click.option(
        "--save-plan", type=click.Path(path_type=Path), callback=output_file,
        help="Write the plan to this file.",
    ),
    click.option(
        "--latency-table", type=click.Path(path_type=Path),
        help="Latencies measured where the model will run, by groupify bench MODEL --table FILE.",
    ),
    click.option(
        "--sensitivity", type=click.Choice(["fisher", "exact"]), default="fisher", show_default=True,
        help="With a budget: predict what each conv loses, or convert each alone and measure it (slow).",
    ),
    click.option(
        "--no-verify", is_flag=True,
        help="With a budget: neither convert the plan to compare it with uniform, nor time it as a whole.",
    ),
)  # fmt: skip
data_option = click.option(
    "--data",
    metavar="SPEC",
    help="demo, fashion-mnist[:ROOT], cifar10:ROOT, imagefolder:ROOT, module:function.",
)
calibrate_option = click.option(
    "--calibrate",
    default="1000",
    show_default=True,
    metavar="N|none",
    callback=number_or("none", "images"),
    help="Unlabelled training images for the fit. none: from the weights alone.",
)
quantize_option = click.option(
    "--quantize",
    is_flag=True,
    help="Write an int8 variant of the ONNX file beside it, calibrated on the data.",
)
common_options = _options(
    click.option("--seed", type=click.IntRange(0), default=0, show_default=True),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON document."),
    click.option("--quiet", "-q", is_flag=True, help="No progress bars."),
)
output_options = _options(
    click.option("--output", "-o", type=click.Path(path_type=Path), help="Folder to write."),
    click.option("--force", is_flag=True, help="Replace an earlier output folder."),
    click.option("--static-batch", type=click.IntRange(1), help="Fixed batch size of the ONNX file."),
    threads_option,
    quantize_option,
)


def plan_request(options: dict[str, Any]) -> PlanRequest:
    """Return how the convs are to be replaced."""
    from groupify.pipeline import PlanRequest

    return PlanRequest(
        groups=options["groups"],
        rules=_rules(options),
        file=options["plan_file"],
        search=_search_request(options),
    )


def _rules(options: dict[str, Any]) -> Rules:
    """Return which convs may be converted and into what."""
    from groupify.planning.rules import Rules

    # The default of --kind is for plans without a budget; only a kind that was asked for narrows the choice.
    source = click.get_current_context().get_parameter_source("kind")
    asked = source not in (None, ParameterSource.DEFAULT)
    return Rules(
        include=options["include"],
        exclude=options["exclude"],
        min_group_width=options["min_group_width"] or "auto",
        cpu=options["targets"][0],
        shuffle=options["shuffle"],
        structures=(options["kind"],) if asked else None,
    )


def _search_request(options: dict[str, Any]) -> SearchRequest | None:
    """Return the budget to plan for, if one is given."""
    if not options["targets"][1]:
        return None
    if options["plan_file"] is not None:
        raise SpecError("--plan and a budget: a plan file leaves nothing to plan; give one of the two")
    from groupify.pipeline import SearchRequest
    from groupify.planning.budget import Budget

    return SearchRequest(
        Budget.parse(*options["targets"][1]),
        sensitivity=options["sensitivity"],
        verify=not options["no_verify"],
        latency_table=options["latency_table"],
    )


def model_request(name: str, options: dict[str, Any]) -> ModelRequest:
    """Return which dense model is meant."""
    from groupify.pipeline import ModelRequest

    return ModelRequest(
        name,
        weights=options["weights"],
        checkpoint=options["checkpoint"],
        arguments=options["arguments"],
        input_shape=options["input_shape"],
    )


def output_request(options: dict[str, Any], default: Path) -> OutputRequest:
    """Return what to write; into ``default`` where no folder is named."""
    from groupify.pipeline import OutputRequest

    return OutputRequest(
        options["output"] or default,
        force=options["force"],
        static_batch=options["static_batch"],
        threads=options["threads"],
        command=shlex.join(["groupify", *sys.argv[1:]]),
        quantize=options["quantize"],
    )
