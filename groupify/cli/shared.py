"""From options to requests, and from results to the terminal."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from groupify.errors import SpecError

if TYPE_CHECKING:
    from groupify.models.preprocessing import PreprocessingOptions
    from groupify.pipeline.requests import (
        ExportOptions,
        ModelRequest,
        OutputRequest,
        PlanRequest,
        TrainingRequest,
    )
    from groupify.reporting.results import Report
    from groupify.structures import Precision


def print_json(document: Any) -> None:
    """Print one JSON document; where the console cannot show all characters, JSON's own escapes stand in."""
    ascii_only = not (sys.stdout.encoding or "").lower().startswith("utf")
    click.echo(json.dumps(document, indent=2, ensure_ascii=ascii_only, allow_nan=False))


def print_report(report: Report | None, as_json: bool) -> None:
    """Print a report, for people or as JSON; None = another process has it."""
    if report is None:
        return
    from groupify.reporting.tables import stdout_console
    from groupify.reporting.text import print_report

    if as_json:
        print_json(report.values())
    else:
        print_report(report, stdout_console())


def model_request(name: str, options: dict[str, Any]) -> ModelRequest:
    """Return which model or output folder is meant."""
    from groupify.pipeline.requests import ModelRequest

    known = ("weights", "checkpoint", "arguments", "input_shape", "device")
    given = {key: options[key] for key in known if key in options}
    return ModelRequest(
        name,
        **given,
        trust="trust" in options and is_trusted(name, options),
        preprocessing=preprocessing_request(options),
    )


def preprocessing_request(options: dict[str, Any]) -> PreprocessingOptions:
    """Return what is said about how images become inputs."""
    from groupify.models.preprocessing import PreprocessingOptions

    names = {field.name for field in dataclasses.fields(PreprocessingOptions)}
    return PreprocessingOptions(**{name: options[name] for name in names & options.keys()})


def is_trusted(folder: str | Path, options: dict[str, Any]) -> bool:
    """Whether a folder's recipe may import the code that it names: by --trust, or since --model names it.

    Raises:
        SpecError: --model names other code than the recipe.
    """
    from groupify.artefact import read_recipe
    from groupify.files import folder_exists

    named = options["factory"]
    if named is None:
        return bool(options["trust"])
    if not folder_exists(folder):
        raise SpecError(f"--model {named}: it goes with an output folder, and there is no folder {folder}")
    asked = read_recipe(folder).model.name
    if asked != named:
        raise SpecError(f"--model {named}: the recipe of {folder} names {asked!r}; give that if you trust it")
    return True


def model_label(name: str, arguments: Mapping[str, Any]) -> str:
    """Return what files are called after a model: its name, or the one that its factory is given.

    >>> model_label("timm:create_model", {"model_name": "hf_hub:timm/resnet18.a1_in1k"})
    'resnet18.a1_in1k'
    >>> model_label("my_package.nets:small_net", {})
    'small_net'
    """
    keys = ("model_name", "name", "arch", "architecture", "model", "variant")
    given = [arguments[key] for key in keys if isinstance(arguments.get(key), str)]
    words = re.findall(r"[\w.+-]*\w", given[0]) if given else []
    return str(words[-1]) if words else name.rpartition(":")[2].rpartition(".")[2]


def named_function(name: str | None, kind: str) -> Any:
    """Return the function of the user's own that an option names; None where it names none."""
    from groupify.models.sources import import_attribute

    return None if name is None else import_attribute(name, kind)


def plan_request(options: dict[str, Any]) -> PlanRequest:
    """Return how the convs are to be replaced."""
    from groupify.files import cache_folder
    from groupify.pipeline.requests import PlanRequest, families
    from groupify.planning.group_counts import GroupCounts
    from groupify.planning.rules import Rules
    from groupify.planning.search import SearchOptions

    if options["budget"] is not None and options["plan_file"] is not None:
        raise SpecError("--plan and a budget: a plan file leaves nothing to plan; give one of the two")
    if options["plan_file"] is not None:
        _refuse_rules_beside_a_plan_file()
    rules = Rules(
        include=options["include"],
        exclude=options["exclude"],
        min_group_width=options["min_group_width"],
        cpu=options["cpu"],
        precision=planned_precision(options["precision"]),
        shuffle=options["shuffle"],
        structures=families(options["structure"]),
    )
    search = SearchOptions(
        sensitivity=options["sensitivity"],
        verify=not options["no_verify"],
        threads=options["threads"],
        cache=cache_folder(),
        seed=options["seed"],
        progress=not options["quiet"],
        memory=options["memory"],
        task=options["task"],
        metric=named_function(options["metric"], "metric"),
    )
    return PlanRequest(
        None if options["groups"] is None else GroupCounts.of(options["groups"]),
        rules,
        file=options["plan_file"],
        budget=options["budget"],
        search=search,
        latency_table=options["latency_table"],
        save=options["save_plan"],
    )


# Options that say what a plan may do, and would be ignored where the plan is read from a file.
_RULES = ("groups", "structure", "include", "exclude", "cpu", "min_group_width", "shuffle")


def _refuse_rules_beside_a_plan_file() -> None:
    context = click.get_current_context()
    asked = (name for name in _RULES if context.get_parameter_source(name) is ParameterSource.COMMANDLINE)
    for name in asked:
        raise SpecError(
            f"--plan and --{name.replace('_', '-')}: the file says what becomes of each conv; leave out "
            "one of the two, or change the file"
        )


def export_options(options: dict[str, Any]) -> ExportOptions:
    """Return how the ONNX file is to be made."""
    from groupify.pipeline.requests import ExportOptions

    names = {field.name for field in dataclasses.fields(ExportOptions)}
    given = {name: options[name] for name in names & options.keys()}
    wanted = options["precision"]
    one = (wanted,) if wanted == "float16" else precisions(wanted)
    return ExportOptions(**given, precisions=() if wanted is None else one)


def precisions(given: str | None) -> tuple[Precision, ...]:
    """Return the precisions that ``--precision`` names."""
    from groupify.structures import PRECISIONS

    return tuple(precision for precision in PRECISIONS if given in (precision, "both"))


def planned_precision(given: str) -> Precision:
    """Return the precision that a plan is for: one for both is one for int8."""
    return precisions(given)[-1]


def output_request(options: dict[str, Any], default: Path) -> OutputRequest:
    """Return what to write; into ``default`` where no folder is named."""
    from groupify.pipeline.requests import OutputRequest

    return OutputRequest(
        options["output"] or default,
        export_options(options),
        force=options["force"],
        command=shlex.join(["groupify", *sys.argv[1:]]),
    )


def training_request(options: dict[str, Any]) -> TrainingRequest | None:
    """Return how to train and what to keep on the way; None = not at all.

    Raises:
        SpecError: an option that says something about a training that is not asked for.
    """
    from groupify.pipeline.requests import TrainingRequest
    from groupify.training.history import LogSettings
    from groupify.training.settings import FinetuneSettings

    if not options["epochs"]:
        for name in ("save_every", "resume", "log_file", "tensorboard", "loss"):
            if options[name]:
                option = name.replace("_", "-")
                raise SpecError(f"--{option} is about training, and there is none; give --epochs N")
        return None
    # The options bear the names of the settings; what is not given keeps the setting's default.
    given = {field.name: options.get(field.name) for field in dataclasses.fields(FinetuneSettings)}
    given["labels"] = False if options["labels"] == "none" else None
    given["amp"] = "bfloat16" if options["amp"] == "bf16" else None
    settings = FinetuneSettings(**{name: value for name, value in given.items() if value is not None})
    log = None
    if options["log_file"] is not None or options["tensorboard"] is not None:
        log = LogSettings(options["log_file"], options["tensorboard"], options["log_every"])
    return TrainingRequest(
        settings,
        save_every=options["save_every"],
        resume=options["resume"],
        log=log,
        loss=named_function(options["loss"], "loss"),
    )


@contextlib.contextmanager
def telling_how_to_resume(training: TrainingRequest | None, output: OutputRequest) -> Iterator[None]:
    """Put into a ``KeyboardInterrupt`` what it leaves: the state of the training, if there is one."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if training is not None and training.keeps_state and (file := output.state_file).exists():
            interrupt.args = (
                f"the state of the training is in {file}: the same command with --resume goes on from it",
            )
        raise


def beside(folder: Path, suffix: str) -> Path:
    """Return ``folder`` with a suffix to its name, also where that is a dot or two."""
    named = folder if folder.name not in ("", "..") else folder.resolve()
    return named.parent / f"{named.name}{suffix}"
