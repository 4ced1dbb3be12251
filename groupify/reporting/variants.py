"""The dense and the converted model in each precision, and which two of them a reader should compare."""

from __future__ import annotations

from dataclasses import dataclass, replace

from groupify.reporting.formatting import UNCERTAIN, milliseconds, percent, ratio_within, size
from groupify.reporting.results import Int8File, Range, Report
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
        within: between what that lies with 95%; None where that is not known.
    """

    model: str
    precision: Precision
    top1: float | None
    file_bytes: int | None = None
    milliseconds: float | None = None
    speed_up: float | None = None
    within: Range | None = None

    @property
    def name(self) -> str:
        """``dense int8``."""
        return f"{self.model} {self.precision}"


@dataclass(frozen=True)
class Headline:
    """The fastest converted model against the fastest dense one.

    Attributes:
        dense, grouped: the two.
        speed_up: how many times faster the converted one is; None where it was not timed, or where the
            machine was busy and nothing says within what bounds it lies.
        within: between what it lies with 95%; None where that is not known.
    """

    dense: Variant
    grouped: Variant
    speed_up: float | None
    within: Range | None = None

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
        grouped = replace(grouped, within=latency.speed_up_range)
    if report.int8 is None:
        return [dense, grouped]
    found = [dense, *_in_int8(DENSE, report.dense_int8)]
    # For int8 alone the float file was only made on the way.
    found += [grouped] if "onnx" in report.files else []
    return [*found, *_in_int8(GROUPED, report.int8)]


def _in_int8(model: str, file: Int8File | None) -> list[Variant]:
    if file is None:
        return []
    return [
        Variant(
            model, INT8, file.top1, file.file_bytes, file.milliseconds, file.speed_up, file.speed_up_range
        )
    ]


def headline(report: Report) -> Headline:
    """Return the fastest converted model of a report against the fastest dense one."""
    dense, grouped = (
        max((one for one in variants(report) if one.model == model), key=lambda one: one.speed_up or 0.0)
        for model in (DENSE, GROUPED)
    )
    speed_up, within = _over(grouped, dense, report)
    return Headline(dense, grouped, speed_up if is_known(within, report) else None, within)


def is_known(within: Range | None, report: Report) -> bool:
    """Whether a speed-up says something: it has bounds, or the machine was not busy."""
    return within is not None or (report.latency_ms is not None and report.latency_ms.steady)


def speed_up_text(value: float | None, within: Range | None, report: Report) -> str:
    """``3.10× (2.95–3.20)``, "uncertain" without bounds on a busy machine, a dash where nothing was timed."""
    if value is None or report.latency_ms is None:
        return "–"
    return ratio_within(value, within) if is_known(within, report) else UNCERTAIN


def variants_table(report: Report) -> Table:
    """Return a row for each model and precision of a report with int8 in it."""
    against = headline(report).dense
    over = [f"speed-up over {DENSE} {FLOAT32}"]
    if against.precision != FLOAT32:
        over.append(f"over {against.name}")
    rows = []
    for one in variants(report):
        gains = [(one.speed_up, one.within), _over(one, against, report)][: len(over)]
        speeds = (speed_up_text(*gain, report) for gain in gains)
        file = "–" if one.file_bytes is None else size(one.file_bytes)
        rows.append((one.name, percent(one.top1), milliseconds(one.milliseconds), *speeds, file))
    return Table(("", "top-1", "latency", *over, "ONNX file"), tuple(rows), words=("",))


def _over(one: Variant, other: Variant, report: Report) -> tuple[float | None, Range | None]:
    """How many times faster one is than another, side by side where that was measured, and the bounds."""
    int8 = report.int8
    if int8 is not None and (one.name, other.name) == (f"{GROUPED} {INT8}", f"{DENSE} {INT8}"):
        return int8.speed_up_over_dense_int8, int8.speed_up_over_dense_int8_range
    if other.name == f"{DENSE} {FLOAT32}":
        return one.speed_up, one.within
    return None if one.speed_up is None or not other.speed_up else one.speed_up / other.speed_up, None
