"""The options of all commands, in the sections that ``--help`` shows, and what parses their values."""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from groupify.errors import SpecError

# Everything heavy (torch first of all) is imported inside the functions: --help answers at once.

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
GENERAL = "General"

Command = TypeVar("Command", bound=Callable[..., Any])
Decorator = Callable[[Command], Command]
Value = TypeVar("Value")


class _Option(click.Option):
    """An option that belongs to a section of the help."""

    def __init__(self, *arguments: Any, section: str, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.section = section


class SectionedCommand(click.Command):
    """A command whose help shows its options by section."""

    def sections(self, context: click.Context) -> dict[str, list[tuple[str, str]]]:
        """Return the lines of the help by section, in the order of their first options."""
        lines: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(context):
            line = parameter.get_help_record(context)
            if isinstance(parameter, click.Option) and line is not None:
                lines.setdefault(getattr(parameter, "section", GENERAL), []).append(line)
        return lines

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the sections; called by click."""
        for title, lines in self.sections(context).items():
            with formatter.section(title):
                formatter.write_dl(lines)


command = functools.partial(click.command, cls=SectionedCommand, context_settings=CONTEXT)


def section(title: str) -> Callable[..., Decorator[Any]]:
    """Return ``click.option`` for options of one section."""
    return functools.partial(click.option, cls=_Option, section=title)


def together(*options: Decorator[Any]) -> Decorator[Any]:
    """Return one decorator that adds several options, shown in this order."""

    def decorate(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


# ---- values


def input_shape(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """Parse C,H,W, or the shape of an input of another dimension."""
    if value is None:
        return None
    try:
        shape = tuple(int(part) for part in value.split(","))
    except ValueError:
        shape = ()
    if len(shape) not in (2, 3, 4) or min(shape) < 1:
        raise SpecError(
            f"--input-size {value!r}: expected C,H,W, for example 3,224,224; C,L for 1-d models, "
            "C,D,H,W for 3-d ones"
        )
    return shape


def numbers(_: click.Context, parameter: click.Parameter, value: str | None) -> tuple[float, ...] | None:
    """Parse a list of numbers, like 0.5,0.5,0.5."""
    if value is None:
        return None
    try:
        found = tuple(float(part) for part in value.split(","))
    except ValueError:
        found = ()
    if not found or not all(map(math.isfinite, found)):
        raise SpecError(f"{parameter.opts[0]} {value!r}: expected numbers, for example 0.5 or 0.5,0.5,0.5")
    return found


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


def paths(_: click.Context, parameter: click.Parameter, value: str | None) -> tuple[Path, ...]:
    """Parse a list of files, like a.onnx,b.onnx; none where the option is not given."""
    if value is None:
        return ()
    found = tuple(Path(part) for part in value.split(",") if part)
    if not found:
        raise SpecError(f"{parameter.opts[0]} {value!r}: expected files, for example a.onnx,b.onnx")
    return found


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


def number_or(
    word: str, meaning: Value, what: str
) -> Callable[[click.Context, click.Parameter, str], int | Value]:
    """Return what parses a whole number from 1, or a word."""

    def parse(_: click.Context, parameter: click.Parameter, value: str) -> int | Value:
        if value == word:
            return meaning
        try:
            number = int(value)
        except ValueError:
            number = 0
        if number < 1:
            raise SpecError(f"{parameter.opts[0]} {value!r}: expected {word} or a number of {what} from 1")
        return number

    return parse


def memory(_: click.Context, __: click.Parameter, value: str | None) -> int | None:
    """Parse an amount of memory, like 2GiB."""
    if value is None:
        return None
    from groupify.memory import parse_bytes

    try:
        return parse_bytes(value)
    except SpecError as error:
        raise SpecError(f"--memory: {error}") from error


def budget(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> Any:
    """Parse the limits of a budget, all of them together; None where none is given."""
    if not values:
        return None
    from groupify.planning.budget import Budget

    return Budget.parse(*values)


# ---- sections

_PATH = click.Path(path_type=Path)
_model = section("Model")
_preprocessing = section("How images become inputs")
_plan = section("What to convert")
_fit = section("How to fit")
_training = section("Training")
_run = section("Training run")
output = section("Output")
_general = section(GENERAL)

trust_option = together(
    _model("--trust", is_flag=True, help="Let the folder's recipe import the code that it names."),
    _model("--model", "factory", metavar="MODULE:FACTORY",
           help="The factory that the folder's recipe names: naming it here trusts it, without --trust."),
)  # fmt: skip
teacher_option = _model("--checkpoint", type=_PATH, help="The dense weights; default: the recipe's file.")
factory_options = together(
    _model("--model-args", "arguments", callback=model_arguments,
           help="Arguments of the model's factory, JSON."),
    _model("--input-size", "input_shape", callback=input_shape, metavar="C,H,W",
           help="Shape of one input; C,L for 1-d models, C,D,H,W for 3-d ones."),
)  # fmt: skip
preprocessing_options = together(
    _preprocessing("--mean", callback=numbers, metavar="NUMBERS",
                   help="Of the training images, for pixels in [0, 1]: one, or one per channel."),
    _preprocessing("--std", callback=numbers, metavar="NUMBERS", help="Their standard deviation."),
    _preprocessing("--resize", type=click.IntRange(0), metavar="PIXELS",
                   help="Shorter side before the crop; 0: the image's own."),
    _preprocessing("--crop", type=click.Choice(["center", "none"]),
                   help="center: the input is the middle of the image. none: the whole image, resized."),
    _preprocessing("--interpolation", type=click.Choice(["bilinear", "bicubic", "nearest"]),
                   help="Of resizing. Default of all five: what the model, its weights or the recipe say."),
)  # fmt: skip
model_options = together(
    _model("--weights", default="auto", show_default=True,
           help="auto: torchvision's default weights, or random ones where they cannot be had. "
           "DEFAULT or a name of torchvision: those or an error. none: random. A factory's own are kept; "
           "none says that those are random."),
    _model("--checkpoint", type=_PATH, help="Your own weights: safetensors or torch."),
    factory_options,
    preprocessing_options,
)  # fmt: skip

_TASKS = click.Choice(["auto", "classes", "outputs"])
_TASK_HELP = (
    "What the model is judged by: the softmax of its class scores, or the relative error of its outputs. "
    "auto: by their form."
)
_METRIC_HELP = (
    "A function of a model that returns how well it does, higher is better; drop= in a budget is then in its "
    "units."
)
_CPU_HELP = "Processor that will run the model: avx2, avx512, arm64, any, or auto: this one."
plan_options = together(
    _plan("--groups", "-g", metavar="N",
          help="Groups to aim at; by name too: '4,layer3.*=8'. Without it and --budget: each conv gets the "
          "structure that loses least, at the MACs of 4 plain groups."),
    _plan("--budget", multiple=True, callback=budget, metavar="LIMITS",
          help="Plan for a budget instead of --groups: macs=40%, params=8M, bytes=8MB, latency=2x, drop=0.5, "
          "or several with commas between. Repeatable; all hold. latency=2x is against the dense model in "
          "--precision, latency=2x:float32 against dense float32."),
    _plan("--structure", metavar="FAMILY",
          help="grouped; grouped-pointwise: a grouped conv and a dense 1×1 conv; block-term: a grouped conv "
          "between 1×1 convs; auto: each conv what loses least. The last two have the MACs of --groups plain "
          "groups. Default: with --groups, grouped; else auto."),
    _plan("--include", multiple=True, metavar="GLOB", help="Convert only these sites. Repeatable."),
    _plan("--exclude", multiple=True, metavar="GLOB", help="Leave these sites alone. Repeatable."),
    _plan("--cpu", default="auto", show_default=True, help=_CPU_HELP),
    _plan("--min-group-width", default="auto", show_default=True,
          callback=number_or("auto", "auto", "channels"),
          help="Fewest channels per group. auto: the block of ONNX Runtime's fast kernel on --cpu; "
          "1 switches it off."),
    _plan("--shuffle", is_flag=False, flag_value="all", default="none", show_default=True,
          metavar="none|all",
          help="all: a channel shuffle behind every conv that is grouped; where structures are chosen, both "
          "are tried."),
    _plan("--latency-table", type=_PATH,
          help="Latencies measured where the model will run, by groupify bench MODEL --table FILE."),
    _plan("--sensitivity", default="auto", show_default=True,
          type=click.Choice(["auto", "errors", "fisher", "outputs", "exact"]),
          help="What each conv loses. errors: its own relative error; fisher: "
          "weighted by the Fisher information of class scores; outputs: times what replacing the conv alone "
          "does to the outputs; auto: errors for class scores, else outputs; exact: all choices converted "
          "(slow)."),
    _plan("--task", default="auto", show_default=True, type=_TASKS, help=_TASK_HELP),
    _plan("--metric", metavar="MODULE:FUNCTION", help=_METRIC_HELP),
    _plan("--no-verify", is_flag=True,
          help="Neither convert a chosen plan to compare it with uniform, nor time it as a whole."),
    _plan("--plan", "plan_file", type=_PATH, help="Take the plan from this file."),
    _plan("--save-plan", type=_PATH, callback=output_file, help="Write the plan to this file."),
)  # fmt: skip
frontier_options = together(
    _plan("--frontier", type=click.Choice(["predicted", "measured"]), is_flag=False, flag_value="predicted",
          help="Where structures are chosen: show what more and less of the limit would give. measured: "
          "convert every point."),
    _plan("--frontier-plot", type=_PATH, callback=output_file, help="Draw it here, for example x.svg."),
)  # fmt: skip

fit_options = together(
    _fit("--data", metavar="SPEC",
         help="demo, fashion-mnist[:ROOT], cifar10:ROOT, imagefolder:ROOT, module:function."),
    _fit("--calibrate", default="1000", show_default=True, metavar="N|none",
         callback=number_or("none", 0, "images"),
         help="Unlabelled training images for the fit. none: from the weights alone."),
    _fit("--memory", callback=memory, metavar="SIZE",
         help="What activations take that wait during a conversion, like 2GiB; what would be more waits on "
         "disk. Default: half of what is free."),
)  # fmt: skip
reconstruct_option = _fit(
    "--reconstruct", type=click.IntRange(0), default=0, show_default=True, metavar="STEPS",
    help="Steps per block on the dense model's activations, after the fit; no labels.",
)  # fmt: skip


def data_option(what: str, *, required: bool = False) -> Decorator[Any]:
    """Return ``--data`` for a command that fits nothing."""
    return section("Data")("--data", required=required, metavar="SPEC", help=what)


folder_task_options = together(
    section("Data")("--task", type=_TASKS, help=f"{_TASK_HELP} Default: what the folder's recipe says."),
    section("Data")("--metric", metavar="MODULE:FUNCTION", help=_METRIC_HELP),
)


def training_options(epochs: float) -> Decorator[Any]:
    """Return the options of a fine-tune; ``epochs`` is the default of the first."""
    return together(
        _training("--epochs", type=float, default=epochs, show_default=True, help="Of fine-tuning."),
        _training("--batch-size", type=click.IntRange(1), help="Images per step, of all processes."),
        _training("--optimizer", type=click.Choice(["sgd", "adamw"]), help="Default: adamw."),
        _training("--learning-rate", type=float,
                  help="Peak learning rate; of adamw relative to the weights. Default: by what was lost."),
        _training("--learning-rate-schedule", "schedule", type=click.Choice(["cosine", "one-cycle"]),
                  help="Default: cosine."),
        _training("--warmup", "warmup_fraction", type=float, metavar="SHARE",
                  help="Share of the steps in which the learning rate rises, 0 to 1."),
        _training("--weight-decay", type=float, help="Of the weights; norms and biases have none."),
        _training("--labels", type=click.Choice(["auto", "none"]), default="auto", show_default=True,
                  help="none: learn from the dense model alone, as auto does where there are none of use."),
        _training("--loss", metavar="MODULE:FUNCTION",
                  help="A function of outputs and labels, of any shape, that returns a tensor, a number "
                  "or one for each image; lower is better. In the place of the cross-entropy."),
        _training("--distill", type=click.Choice(["logits", "attention", "none"]),
                  help="What to learn from the dense model; attention: the outputs and where layers look."),
        _training("--distillation-weight", type=float, help="Share of the dense model's, 0 to 1."),
        _training("--temperature", type=float, help="Of the distillation."),
        _training("--label-smoothing", type=float, help="Of the cross-entropy, 0 to 1."),
        _training("--ema", "ema_decay", type=float, metavar="DECAY", help="Average the weights, like 0.99."),
        _training("--augment", is_flag=True, default=None, help="Use the data set's standard augmentation."),
        _training("--freeze-batch-norms/--no-freeze-batch-norms", default=None,
                  help="Keep the statistics of the batch norms. Default: where little was lost."),
        _training("--images-per-epoch", type=click.IntRange(1), help="For a stream of unknown length."),
        _run("--amp", type=click.Choice(["bf16", "none"]), default="none", show_default=True,
                  help="Mixed precision."),
        _run("--channels-last", is_flag=True, default=None,
                  help="Train in the channels-last memory format."),
        _run("--accumulate", type=click.IntRange(1), metavar="N",
                  help="Put a batch through the model in N parts, to need less memory."),
        _run("--save-every", type=click.IntRange(1), metavar="STEPS",
                  help="Save the state of the training beside the output folder, as FOLDER.state."),
        _run("--resume", is_flag=True, help="Go on from the state of an interrupted run, if any."),
        _run("--log-file", type=_PATH, metavar="FILE", callback=output_file,
                  help="Write JSON lines with loss, accuracy, learning rate and images per second."),
        _run("--log-every", type=click.IntRange(1), default=50, show_default=True, metavar="STEPS"),
        _run("--tensorboard", type=_PATH, metavar="FOLDER",
                  help="Log for TensorBoard, where it is installed."),
    )  # fmt: skip


def precision_option(what: str, default: str | None = "float32", *more: str) -> Decorator[Any]:
    """Return ``--precision``; ``more`` are values that it takes besides the usual ones."""
    choice = click.Choice(["float32", "int8", "both", *more])
    return output("--precision", type=choice, default=default, show_default=True, help=what)


threads_option = output(
    "--threads", type=click.IntRange(1), default=1, show_default=True, help="Threads when timing."
)
export_options = together(
    output("--static-batch", type=click.IntRange(1), help="Fixed batch size of the ONNX file."),
    output("--dynamic-size", is_flag=True,
           help="Leave height and width of the ONNX file open too, for models that take images of any size. "
           "It is checked at two sizes, and timed at that of --input-size."),
    output("--opset", type=click.IntRange(18, 23),
           help="Of the ONNX operators. Default: 18, the fastest in ONNX Runtime, or the lowest that has all "
           "that the model needs."),
    threads_option,
)  # fmt: skip
_PRECISION = "What the ONNX file computes in; both: two files. int8 is calibrated on --data."


def output_options(precision: str | None = "float32", default: str = "") -> Decorator[Any]:
    """Return the options of a command that writes a folder; ``default`` says what no precision means."""
    return together(
        output("--output", "-o", type=_PATH, help="Folder to write."),
        output("--force", is_flag=True, help="Replace an earlier output folder."),
        precision_option(_PRECISION + default, precision),
        export_options,
    )


uniform_option = output(
    "--uniform", callback=whole_numbers, metavar="LIST",
    help="Numbers of groups to convert with as well, like 2,4,8, for comparison in the report: untrained, "
    "the same everywhere. Each takes about as long as the conversion.",
)  # fmt: skip
device_option = _model(
    "--device", default="auto", show_default=True, metavar="DEVICE",
    help="Where the model runs in PyTorch: cpu, cuda, cuda:1, mps. auto: a GPU of CUDA or ROCm if there is "
    "one.",
)  # fmt: skip
common_options = together(
    _general("--seed", type=click.IntRange(0), default=0, show_default=True),
    _general("--json", "as_json", is_flag=True, help="Print one JSON document."),
    _general("--quiet", "-q", is_flag=True, help="No progress bars, no notes."),
)
