"""What several commands do: open their target, print their result."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from groupify.cli.options import model_request
from groupify.errors import ArtefactError, SpecError
from groupify.files import folder_exists

if TYPE_CHECKING:
    from groupify.reporting.results import Report

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


def print_json(document: Any) -> None:
    """Print one JSON document."""
    click.echo(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))


def print_report(report: Report | None, as_json: bool) -> None:
    """Print a report, for people or as JSON; None = another process has it."""
    if report is None:
        return
    from groupify.reporting.document import report_document
    from groupify.reporting.tables import stdout_console
    from groupify.reporting.text import print_report

    if as_json:
        print_json(report_document(report))
    else:
        print_report(report, stdout_console())


def open_target(target: str, options: dict[str, Any]) -> tuple[Any, Any]:
    """Return the model and the spec of an output folder or of a dense model."""
    from groupify.artefact import load, read_recipe

    if folder_exists(target):
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


def beside(folder: Path, suffix: str) -> Path:
    """Return ``folder`` with a suffix to its name, also where that is a dot or two."""
    named = folder if folder.name not in ("", "..") else folder.resolve()
    return named.parent / f"{named.name}{suffix}"
