"""Plain JSON values for what the command line prints and no document holds."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from groupify.reporting.results import ExportResult
from groupify.structures import Plan


def export_document(result: ExportResult) -> dict[str, Any]:
    """Return what was exported as plain JSON values."""
    document: dict[str, Any] = clean(
        {
            "files": dict(result.files),
            "onnx_bytes": result.exported.file_bytes if "onnx" in result.files else None,
            "opset": result.exported.opset,
            "parity": dataclasses.asdict(result.parity),
            "float16": None if result.float16 is None else dataclasses.asdict(result.float16),
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
        "precision": plan.precision,
        "sites": [clean(dataclasses.asdict(site)) for site in plan.sites],
        "params": dataclasses.asdict(plan.params),
        "macs": dataclasses.asdict(plan.macs),
        "notes": list(plan.notes),
    }


def clean(value: Any) -> Any:
    """Turn tuples into lists, and numbers that JSON does not know (NaN, infinity) into null."""
    if isinstance(value, dict):
        return {key: clean(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
