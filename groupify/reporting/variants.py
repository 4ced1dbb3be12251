"""The dense and the converted model in each precision, and which two of them a reader should compare."""

from __future__ import annotations

from dataclasses import dataclass, replace

from groupify.reporting.formatting import UNCERTAIN, milliseconds, percent, ratio, size
from groupify.reporting.results import Int8File, Report
from groupify.reporting.tables import Table
from groupify.structures import FLOAT32, INT8, Precision

DENSE, GROUPED = "dense", "grouped"


@dataclass(frozen=True)
class Variant:
    """One model in one precision; what was not measured is None.

    Attributes:
        model: ``"dense"`` or ``"grouped"``.
        precision: what it computes in.
        top1: accuracy on the test part, a fraction.
        file_bytes: size of its ONNX file.
        milliseconds: median per batch.
        speed_up: over dense float32.
    """

    model: str
    precision: Precision
    top1: float | None
    file_bytes: int | None = None
    milliseconds: float | None = None
    speed_up: float | None = None

    @property
    def name(self) -> str:
        """``dense int8``."""
        return f"{self.model} {self.precision}"


@dataclass(frozen=True)
class Headline:
    """The fastest converted model against the fastest dense one.

    Attributes:
        dense, grouped: the two.
        speed_up: how many times faster the converted one is; None where it was not timed, or on a busy
            machine.
    """

    dense: Variant
    grouped: Variant
    speed_up: float | None

    @property
    def lost(self) -> float | None:
        """Top-1 of the dense one minus that of the converted one, in points."""
        if self.dense.top1 is None or self.grouped.top1 is None:
            return None
        return 100 * (self.dense.top1 - self.grouped.top1)

    @property
    def shrunk(self) -> float | None:
        """How many times smaller the file is."""
        if not self.dense.file_bytes or not self.grouped.file_bytes:
            return None
        return self.dense.file_bytes / self.grouped.file_bytes


def variants(report: Report) -> list[Variant]:
    """Return what a report compares: the dense models, then the converted ones that were written."""
    accuracy, files, latency = report.accuracy, report.onnx_bytes, report.latency_ms
    after = accuracy.converted if accuracy.recovered is None else accuracy.recovered
    dense = Variant(DENSE, FLOAT32, accuracy.dense)
    grouped = Variant(GROUPED, FLOAT32, after)
    if files is not None:
        dense = replace(dense, file_bytes=files.dense)
        grouped = replace(grouped, file_bytes=files.grouped)
    if latency is not None:
        dense = replace(dense, milliseconds=latency.dense, speed_up=1.0)
        grouped = replace(grouped, milliseconds=latency.grouped, speed_up=latency.speed_up)
    if report.int8 is None:
        return [dense, grouped]
    found = [dense, *_in_int8(DENSE, report.dense_int8)]
    # For int8 alone the float file was only made on the way.
    found += [grouped] if "onnx" in report.files else []
    return [*found, *_in_int8(GROUPED, report.int8)]


def _in_int8(model: str, file: Int8File | None) -> list[Variant]:
    if file is None:
        return []
    return [Variant(model, INT8, file.top1, file.file_bytes, file.milliseconds, file.speed_up)]


def headline(report: Report) -> Headline:
    """Return the fastest converted model of a report against the fastest dense one."""
    dense, grouped = (
        max((one for one in variants(report) if one.model == model), key=lambda one: one.speed_up or 0.0)
        for model in (DENSE, GROUPED)
    )
    steady = report.latency_ms is not None and report.latency_ms.steady
    return Headline(dense, grouped, _over(grouped, dense, report) if steady else None)


def variants_table(report: Report) -> Table:
    """Return a row for each model and precision of a report with int8 in it."""
    against = headline(report).dense
    steady = report.latency_ms is None or report.latency_ms.steady
    over = [f"speed-up over {DENSE} {FLOAT32}"]
    if against.precision != FLOAT32:
        over.append(f"over {against.name}")
    rows = []
    for one in variants(report):
        gains = [one.speed_up, _over(one, against, report)][: len(over)]
        speeds = (("–" if gain is None else ratio(gain)) if steady else UNCERTAIN for gain in gains)
        file = "–" if one.file_bytes is None else size(one.file_bytes)
        rows.append((one.name, percent(one.top1), milliseconds(one.milliseconds), *speeds, file))
    return Table(("", "top-1", "latency", *over, "ONNX file"), tuple(rows), words=("",))


def _over(one: Variant, other: Variant, report: Report) -> float | None:
    """How many times faster one is than another, side by side where that was measured."""
    int8 = report.int8
    if int8 is not None and (one.name, other.name) == (f"{GROUPED} {INT8}", f"{DENSE} {INT8}"):
        return int8.speed_up_over_dense_int8
    return None if one.speed_up is None or not other.speed_up else one.speed_up / other.speed_up
