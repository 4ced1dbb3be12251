"""A compressed model as text, as ``print`` shows it: the plan, the totals, and how it came about."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass

from groupify.conversion.site_fit import SiteFit
from groupify.models.preprocessing import Preprocessing
from groupify.models.specs import WeightsOrigin
from groupify.reporting.formatting import count, lost, percent, ratio, size
from groupify.reporting.results import AccuracyChange, MetricChange
from groupify.reporting.sites import site_cells
from groupify.reporting.tables import Table, plain_console
from groupify.scores import ModelCost
from groupify.structures import FLOAT32, Plan

_ERROR = "error: mean squared error of a conv's outputs on the images it was fitted on, ÷ their variance"


@dataclass(frozen=True)
class Outcome:
    """What there is to show.

    Attributes:
        title: of the whole.
        plan: what happened to each conv.
        dense, compressed: cost of one image.
        fits: how well each conv was fitted.
        method: one line on how the weights were found.
        accuracy: top-1 on the test part, as far as measured.
        metric: the user's own measure; None = none.
        weights: where the dense ones came from.
        notes: what the reader should know.
        preprocessing: how images become inputs; None where nothing says it.
    """

    title: str
    plan: Plan
    dense: ModelCost
    compressed: ModelCost
    fits: tuple[SiteFit, ...]
    method: str
    accuracy: AccuracyChange
    weights: WeightsOrigin
    notes: tuple[str, ...] = ()
    preprocessing: Preprocessing | None = None
    metric: MetricChange | None = None


def outcome_text(outcome: Outcome) -> str:
    """Return the tables and the lines below them, between rules as wide as the tables."""
    blocks = [_text(_sites(outcome)), _text(_totals(outcome)), "\n".join(_lines(outcome))]
    width = max(len(line) for block in blocks[:2] for line in block.splitlines())
    double, single = "=" * width, "-" * width
    return "\n".join((double, outcome.title, double, f"\n{single}\n".join(blocks), double))


def _sites(outcome: Outcome) -> Table:
    errors = {fit.name: f"{fit.error:.3g}" for fit in outcome.fits}
    header = ("conv", "shape", "groups", "params", "MACs", *(("error",) if errors else ()), "reason")
    rows = []
    for site in outcome.plan.sites:
        error = (errors.get(site.name, ""),) if errors else ()
        rows.append((*site_cells(site), *error, site.reason or ""))
    return Table(header, tuple(rows), words=("conv", "shape", "groups", "reason"))


def _totals(outcome: Outcome) -> Table:
    dense, compressed = outcome.dense, outcome.compressed
    rows = [
        (title, form(before), form(after), ratio(before / after if after else float("nan")))
        for title, form, before, after in (
            ("params", count, dense.params, compressed.params),
            ("MACs", count, dense.macs, compressed.macs),
            ("weight bytes", size, dense.weight_bytes, compressed.weight_bytes),
            ("peak activation bytes", size, dense.activation_bytes, compressed.activation_bytes),
        )
    ]
    return Table(("total", "dense", "compressed", "ratio"), tuple(rows), words=("total",))


def _lines(outcome: Outcome) -> Iterator[str]:
    plan, accuracy = outcome.plan, outcome.accuracy
    planned_for = plan.cpu if plan.precision == FLOAT32 else f"{plan.cpu}, {plan.precision}"
    yield f"{len(plan.converted)} of {len(plan.sites)} convs are converted, planned for {planned_for}"
    steps = (("dense", accuracy.dense), ("converted", accuracy.converted), ("fine-tuned", accuracy.recovered))
    shown = [f"{title} {percent(value)}" for title, value in steps if value is not None]
    if shown:
        yield f"top-1 on {accuracy.images} test images: " + " → ".join(shown) + with_error(accuracy)
    yield from metric_lines(outcome.metric)
    yield f"weights: {outcome.weights.sentence}; {outcome.method}"
    if outcome.preprocessing is not None:
        yield f"preprocessing: {outcome.preprocessing}"
    if outcome.fits:
        yield _ERROR
    yield from (f"note: {note}" for note in outcome.notes)


def metric_lines(metric: MetricChange | None) -> Iterator[str]:
    """Say what the user's metric is of each model: ``metric psnr: dense 31.2 → converted 30.9``."""
    if metric is not None:
        steps = (("dense", metric.dense), ("converted", metric.converted), ("fine-tuned", metric.recovered))
        shown = [f"{title} {value:.4g}" for title, value in steps if value is not None]
        yield f"metric {metric.name} (higher is better): " + " → ".join(shown)


def with_error(accuracy: AccuracyChange) -> str:
    """What was lost, image by image, and the error of that; an empty text where it is not known."""
    return "" if accuracy.changed is None else f", {lost(accuracy.changed)}"


def _text(table: Table) -> str:
    stream = io.StringIO()
    table.print(plain_console(stream))
    return stream.getvalue().rstrip("\n")
