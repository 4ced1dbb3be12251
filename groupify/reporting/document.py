"""Reports as JSON documents."""

from __future__ import annotations

import base64
import dataclasses
import math
from typing import Any

from groupify.conversion.pictures import BlockPicture
from groupify.reporting.results import ExportResult, Report
from groupify.structures import Change, Plan, SitePlan

# Of the document, as report.schema.json has it; readers check them first.
FORMAT = "groupify-report"
VERSION = 2


def report_document(report: Report) -> dict[str, Any]:
    """Return a report as plain JSON values; accuracies are fractions, null where not measured."""
    cost = report.cost
    latency = report.latency
    document: dict[str, Any] = clean(
        {
            "format": FORMAT,
            "version": VERSION,
            "groupify": report.version,
            "command": report.command,
            "model": report.model,
            "weights": dataclasses.asdict(report.weights),
            "input_shape": list(report.input_shape),
            "seed": report.seed,
            "calibration": report.calibration,
            "sites": [site_document(site) for site in report.sites],
            "fits": [dataclasses.asdict(fit) for fit in report.fits],
            "params": {"dense": cost.dense.params, "grouped": cost.grouped.params},
            "macs": {"dense": cost.dense.macs, "grouped": cost.grouped.macs},
            "weight_bytes": {"dense": cost.dense.weight_bytes, "grouped": cost.grouped.weight_bytes},
            "activation_bytes": {
                "dense": cost.dense.activation_bytes,
                "grouped": cost.grouped.activation_bytes,
            },
            "onnx_bytes": change_document(report.onnx_bytes),
            "latency_ms": None
            if latency is None
            else {
                **change_document(latency.milliseconds),
                "speed_up": latency.speed_up,
                "threads": latency.threads,
                "batch_size": latency.batch_size,
                "steady": latency.steady,
            },
            "uniform": [dataclasses.asdict(run) for run in report.uniform],
            "int8": None if report.int8 is None else dataclasses.asdict(report.int8),
            "accuracy": dataclasses.asdict(report.accuracy),
            "history": [dataclasses.asdict(row) for row in report.history],
            "parity": None if report.parity is None else dataclasses.asdict(report.parity),
            "machine": None if report.machine is None else dataclasses.asdict(report.machine),
            "files": dict(report.files),
            "notes": list(report.notes),
            "site_milliseconds": {
                name: change_document(times) for name, times in report.site_milliseconds.items()
            },
            "pictures": [_picture_document(picture) for picture in report.pictures],
        }
    )
    return document


def _picture_document(picture: BlockPicture) -> dict[str, Any]:
    pixels = {name: base64.b64encode(getattr(picture, name)).decode("ascii") for name in ("before", "after")}
    return {**dataclasses.asdict(picture), **pixels}


def export_document(result: ExportResult) -> dict[str, Any]:
    """Return what was exported as plain JSON values."""
    document: dict[str, Any] = clean(
        {
            "files": dict(result.files),
            "onnx_bytes": result.exported.file_bytes,
            "opset": result.exported.opset,
            "parity": dataclasses.asdict(result.parity),
            "int8": None if result.int8 is None else dataclasses.asdict(result.int8),
            "notes": list(result.notes),
        }
    )
    return document


def plan_document(plan: Plan) -> dict[str, Any]:
    """Return a plan as plain JSON values."""
    return {
        "input_shape": list(plan.input_shape),
        "groups": plan.groups,
        "cpu": plan.cpu,
        "sites": [site_document(site) for site in plan.sites],
        "params": change_document(plan.params),
        "macs": change_document(plan.macs),
        "notes": list(plan.notes),
    }


def site_document(site: SitePlan) -> dict[str, Any]:
    """Return one site as plain JSON values."""
    return {
        "name": site.name,
        "kind": site.kind,
        "groups_before": site.groups_before,
        "groups": site.groups,
        "shuffle": site.shuffle,
        "reason": site.reason,
        "in_channels": site.in_channels,
        "out_channels": site.out_channels,
        "kernel_size": list(site.kernel_size),
        "stride": list(site.stride),
        "output_size": list(site.output_size),
        "params": change_document(site.params),
        "macs": change_document(site.macs),
    }


def change_document(change: Change[Any] | None) -> dict[str, Any]:
    """Return a pair as ``{"dense": …, "grouped": …}``, with nulls where there is none."""
    if change is None:
        return {"dense": None, "grouped": None}
    return {"dense": change.dense, "grouped": change.grouped}


def clean(value: Any) -> Any:
    """Turn tuples into lists, and numbers that JSON does not know (NaN, infinity) into null."""
    if isinstance(value, dict):
        return {key: clean(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
