"""Read reports back from output folders, checking what comes from outside."""

from __future__ import annotations

import base64
import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from groupify.errors import ArtefactError
from groupify.files import folder_exists
from groupify.reporting.document import FORMAT, VERSION
from groupify.reporting.schema import check, report_schema
from groupify.strict_json import parse, refuse

REPORT_FILE = "report.json"
_MAX_BYTES = 64 * 2**20
_MAX_SIBLINGS = 200
# What an earlier version of groupify did not write yet.
_LATER = ("shuffles", "uniform", "int8")


@dataclass(frozen=True)
class Run:
    """One report and the name of the folder that it lay in."""

    name: str
    document: dict[str, Any]


def read_report(folder: Path) -> Run:
    """Read the report of an output folder.

    Raises:
        ArtefactError: there is none, it cannot be read, or it is no report of this version.
    """
    path = folder / REPORT_FILE
    folder_exists(folder)
    try:
        if not path.is_file():
            raise ArtefactError(
                f"no {REPORT_FILE} in {folder}; expected an output folder of 'groupify convert'"
            )
        if path.stat().st_size > _MAX_BYTES:
            raise ArtefactError(f"{path} has more than {_MAX_BYTES >> 20} MiB; that is no report of groupify")
        text = path.read_text("utf-8")
    except OSError as error:
        raise ArtefactError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ArtefactError(f"{path} is no UTF-8 text: {error}; convert the model again") from error
    try:
        document = parse(text)
    except ArtefactError as error:
        raise ArtefactError(f"{path} is no JSON: {error}; convert the model again") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ArtefactError(f"{path} is no report of this groupify; convert the model again")
    if document.get("version") != VERSION:
        raise ArtefactError(f"{path} has version {document.get('version')!r}, expected {VERSION}")
    try:
        _check(document)
    except ArtefactError as error:
        raise ArtefactError(f"{path}: {error}; convert the model again") from error
    return Run(folder.resolve().name, document)


def _check(document: dict[str, Any]) -> None:
    schema = report_schema()
    required = [name for name in schema["required"] if name not in _LATER]
    check(document, {**schema, "required": required}, "report", schema)
    for index, picture in enumerate(document["pictures"]):
        for name in ("before", "after"):
            try:
                pixels = len(base64.b64decode(picture[name], validate=True))
            except ValueError:
                pixels = -1
            if pixels != picture["rows"] * picture["columns"]:
                where = f"report.pictures[{index}].{name}"
                refuse(where, picture[name], f"{picture['rows']} by {picture['columns']} pixels in base64")


def earlier_runs(folder: Path, document: dict[str, Any]) -> list[Run]:
    """Reports of the same model in the folders beside ``folder``, by name, as far as they can be read."""
    runs = []
    own = folder.resolve()
    with contextlib.suppress(OSError):
        for path in sorted(own.parent.glob(f"*/{REPORT_FILE}"))[:_MAX_SIBLINGS]:
            if path.parent == own or path.parent.name.startswith("."):
                continue
            with contextlib.suppress(ArtefactError):
                run = read_report(path.parent)
                if all(run.document[key] == document[key] for key in ("model", "input_shape", "weights")):
                    runs.append(run)
    return runs
