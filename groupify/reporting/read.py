"""Read reports back from output folders, checking what comes from outside."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from groupify.errors import ArtefactError
from groupify.files import folder_exists
from groupify.reporting.results import Report

REPORT_FILE = "report.json"
_MAX_BYTES = 64 * 2**20
_MAX_SIBLINGS = 200


@dataclass(frozen=True)
class Run:
    """One report and the name of the folder that it lay in."""

    name: str
    report: Report


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
    except OSError as error:
        raise ArtefactError(f"cannot read {path}: {error.strerror or error}") from error
    return Run(folder.resolve().name, Report.read(path))


def earlier_runs(folder: Path, report: Report) -> list[Run]:
    """Reports of the same model in the folders beside ``folder``, by name, as far as they can be read."""
    runs = []
    own = folder.resolve()
    with contextlib.suppress(OSError):
        for path in sorted(own.parent.glob(f"*/{REPORT_FILE}"))[:_MAX_SIBLINGS]:
            if path.parent == own or path.parent.name.startswith("."):
                continue
            with contextlib.suppress(ArtefactError):
                run = read_report(path.parent)
                if _model(run.report) == _model(report):
                    runs.append(run)
    return runs


def _model(report: Report) -> tuple[Any, ...]:
    return report.model, report.input_shape, report.weights
