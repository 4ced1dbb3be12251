"""A report in one sentence, read from its JSON document."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from groupify.models.specs import UNTRAINED

# Less than this, in points, is no difference that a reader should see.
_EQUAL_POINTS = 0.05

# What a sentence or a table says of the speed where the machine was busy.
UNCERTAIN = "uncertain"
UNCERTAIN_SPEED = f"speed {UNCERTAIN}"

Document = Mapping[str, Any]


def verdict(document: Document) -> str:
    """Return ``"3.2× faster, 3.5× smaller, 0.6 points less accurate"``, as far as it was measured."""
    parts = [_speed(document), _size(document), _accuracy(document)]
    return ", ".join(part for part in parts if part)


def final_accuracy(document: Document) -> float | None:
    """Top-1 of the written model, a fraction; None where it was not measured."""
    accuracy = document["accuracy"]
    value: float | None = (
        accuracy["recovered"] if accuracy["recovered"] is not None else accuracy["converted"]
    )
    return value


def ratio_of(change: Mapping[str, Any]) -> float | None:
    """Dense ÷ grouped; None where one of them is missing or zero."""
    dense, grouped = change["dense"], change["grouped"]
    return dense / grouped if dense and grouped else None


def points_lost(document: Document) -> float | None:
    """Top-1 of the dense model minus that of the written one, in points."""
    before, after = document["accuracy"]["dense"], final_accuracy(document)
    return None if before is None or after is None else 100 * (before - after)


def steady_speed_up(document: Document) -> float | None:
    """The measured speed-up; None where nothing was timed, or on a busy machine, where it may be anything."""
    latency = document["latency_ms"]
    return float(latency["speed_up"]) if latency is not None and latency["steady"] else None


def _speed(document: Document) -> str:
    speed_up = steady_speed_up(document)
    if speed_up is None:
        return "" if document["latency_ms"] is None else UNCERTAIN_SPEED
    if 0.995 <= speed_up < 1.005:
        return "as fast"
    return f"{speed_up:.1f}× faster" if speed_up > 1 else f"{1 / speed_up:.1f}× slower"


def _size(document: Document) -> str:
    ratio = ratio_of(document["onnx_bytes"]) or ratio_of(document["weight_bytes"])
    if ratio is None or 0.995 <= ratio < 1.005:
        return ""
    return f"{ratio:.1f}× smaller" if ratio > 1 else f"{1 / ratio:.1f}× larger"


def _accuracy(document: Document) -> str:
    lost = points_lost(document)
    if lost is None or document["weights"]["kind"] in UNTRAINED:
        return "accuracy not measured"
    if abs(lost) < _EQUAL_POINTS:
        return "just as accurate"
    amount = f"{abs(lost):.1f} point" + ("" if f"{abs(lost):.1f}" == "1.0" else "s")
    return f"{amount} {'less' if lost > 0 else 'more'} accurate"
