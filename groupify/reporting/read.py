"""Read reports back from output folders, checking what comes from outside."""

from __future__ import annotations

import base64
import contextlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from groupify.conversion.pictures import BlockPicture
from groupify.conversion.site_fit import SiteFit
from groupify.errors import ArtefactError, SpecError
from groupify.files import folder_exists
from groupify.machine import Machine
from groupify.models.specs import WeightsOrigin
from groupify.onnx.agreement import Agreement
from groupify.onnx.parity import Parity
from groupify.reporting.document import FORMAT, VERSION
from groupify.reporting.results import (
    AccuracyChange,
    CostChange,
    Int8File,
    LatencyChange,
    Report,
    UniformRun,
)
from groupify.reporting.schema import check, report_schema
from groupify.scores import ModelCost
from groupify.strict_json import parse, refuse
from groupify.structures import Change, SitePlan
from groupify.training.history import FinetuneRow

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
        return Run(folder.resolve().name, _report(document))
    except (ArtefactError, SpecError) as error:
        raise ArtefactError(f"{path}: {error}; convert the model again") from error


def _check(document: dict[str, Any]) -> None:
    schema = report_schema()
    check(document, schema, "report", schema)
    for index, picture in enumerate(document["pictures"]):
        for name in ("before", "after"):
            try:
                pixels = len(base64.b64decode(picture[name], validate=True))
            except ValueError:
                pixels = -1
            if pixels != picture["rows"] * picture["columns"]:
                where = f"report.pictures[{index}].{name}"
                refuse(where, picture[name], f"{picture['rows']} by {picture['columns']} pixels in base64")


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


def _report(document: dict[str, Any]) -> Report:
    """Return the report of a document that fits the schema."""
    cost = CostChange(*(ModelCost(**_costs(document, side)) for side in ("dense", "grouped")))
    onnx_bytes = _change(document["onnx_bytes"])
    latency, int8, parity = document["latency_ms"], document["int8"], document["parity"]
    times = document["site_milliseconds"].items()
    return Report(
        model=document["model"],
        weights=WeightsOrigin(**document["weights"]),
        input_shape=tuple(document["input_shape"]),
        sites=tuple(map(_site, document["sites"])),
        cost=cost,
        calibration=document["calibration"],
        fits=tuple(SiteFit(**{**fit, "error": _number(fit["error"])}) for fit in document["fits"]),
        accuracy=AccuracyChange(**document["accuracy"]),
        history=tuple(FinetuneRow(**row) for row in document["history"]),
        onnx_bytes=None if None in (onnx_bytes.dense, onnx_bytes.grouped) else onnx_bytes,
        parity=None if parity is None else Parity(**{**parity, "batch_sizes": tuple(parity["batch_sizes"])}),
        latency=None if latency is None else _latency(**latency),
        int8=None if int8 is None else Int8File(**{**int8, "agreement": Agreement(**int8["agreement"])}),
        uniform=tuple(UniformRun(**run) for run in document["uniform"]),
        machine=None if document["machine"] is None else Machine(**document["machine"]),
        seed=document["seed"],
        files=document["files"],
        notes=tuple(document["notes"]),
        pictures=tuple(map(_picture, document["pictures"])),
        site_milliseconds={
            name: Change(_number(pair["dense"]), _number(pair["grouped"])) for name, pair in times
        },
        command=document["command"],
        version=document["groupify"],
    )


def _costs(document: dict[str, Any], side: str) -> dict[str, int]:
    return {name: document[name][side] for name in ("params", "macs", "weight_bytes", "activation_bytes")}


def _latency(dense: float, grouped: float, **rest: Any) -> LatencyChange:
    return LatencyChange(Change(dense, grouped), **rest)


def _site(site: dict[str, Any]) -> SitePlan:
    lists = {name: tuple(site[name]) for name in ("kernel_size", "stride", "output_size")}
    return SitePlan(**{**site, **lists, "params": _change(site["params"]), "macs": _change(site["macs"])})


def _picture(picture: dict[str, Any]) -> BlockPicture:
    pixels = {name: base64.b64decode(picture[name]) for name in ("before", "after")}
    kept = {name: _number(picture[name]) for name in ("kept_before", "kept")}
    return BlockPicture(**{**picture, **pixels, **kept})


def _change(values: dict[str, Any]) -> Change[Any]:
    return Change(values["dense"], values["grouped"])


def _number(value: float | None) -> float:
    """JSON has no NaN."""
    return math.nan if value is None else value
