"""Plans for a budget, and frontiers: as text, as JSON documents and as a picture."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from groupify.errors import GroupifyError, SpecError
from groupify.files import write_aside
from groupify.paired import CONFIDENCE
from groupify.planning.budget import MACS
from groupify.planning.costing import shown
from groupify.planning.race import BudgetPlan, Contender, Frontier, FrontierPoint
from groupify.reporting.document import clean, plan_document
from groupify.reporting.sites import print_plan
from groupify.reporting.tables import Table, print_lines
from groupify.structures import FLOAT32

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def race_lines(result: BudgetPlan) -> tuple[str, ...]:
    """Return what was asked for, what won, and against what."""
    winner = result.winner
    costs = ", ".join(shown(name, amount, result.dense_costs[name]) for name, amount in winner.costs.items())
    lines = [f"planned for {result.budget}: {costs}; what a plan loses is predicted by: {result.method}"]
    others = [contender for contender in result.contenders[1:] if contender.uniform != winner.uniform]
    lines.append("; against ".join(map(_of_contender, (winner, *others[:1]))))
    latencies = result.costing.latencies
    if latencies is not None and result.plan.precision != FLOAT32:
        lines.append(
            f"the dense model as measured: {latencies.dense_ms:.3g} ms in {result.plan.precision}, "
            f"{latencies.dense_float32_ms:.3g} ms in {FLOAT32}"
        )
    if winner.uniform:
        lines.append("no plan beat uniform groups, so the uniform plan is taken")
    return (*lines, result.task) if result.task else tuple(lines)


def _of_contender(contender: Contender) -> str:
    measured = contender.measured
    if measured is None:
        return f"{contender.name}: predicted to lose {contender.loss:.4g}, not converted to be measured"
    if measured.metric is not None:
        return (
            f"{contender.name}: {measured.drop:.4g} less {measured.unit} than the dense model "
            f"(predicted to lose {contender.loss:.4g})"
        )
    if measured.drop is None:
        return (
            f"{contender.name}: measured relative error of the outputs {measured.divergence:.4g} on held-out "
            f"images (predicted to lose {contender.loss:.4g})"
        )
    return (
        f"{contender.name}: measured class probabilities off by {measured.divergence:.4g} nats, accuracy "
        f"down by {measured.drop:.2f} points on {_images(contender)} (predicted to lose {contender.loss:.4g})"
    )


def _images(contender: Contender) -> str:
    """On how many images, and what that says of others."""
    changed = None if contender.measured is None else contender.measured.changed
    if changed is None:
        return "held-out images"
    most = f"at most {contender.at_most:.2f} on others, with {100 * CONFIDENCE:.0f}% confidence"
    return f"{changed.images} held-out images, {most}"


def print_budget_plan(result: BudgetPlan, console: Console) -> None:
    """Print the plan, then what was asked for and what it won against."""
    print_plan(result.plan, console)
    print_lines(race_lines(result), console)


def print_frontier(frontier: Frontier, console: Console) -> None:
    """Print one row for each plan, the asked budget marked."""
    macs = frontier.quantity == MACS
    header = ("plan", "MACs" if macs else "latency", "predicted", "measured", "drop", "")
    rows = []
    for point in frontier.points:
        amount = f"{point.cost / 1e6:.4g} M" if macs else f"{point.cost:.3g} ms"
        measured = point.measured
        rows.append(
            (
                point.name,
                f"{amount} ({100 * point.share:.1f}%)",
                f"{point.loss:.3g}",
                "" if measured is None else f"{measured.divergence:.3g}",
                "" if measured is None or measured.drop is None else f"{measured.drop:.2f}",
                "← asked budget" if point.asked else "",
            )
        )
    Table(header, tuple(rows), words=("plan", "")).print(console)


def budget_document(result: BudgetPlan, frontier: Frontier | None = None) -> dict[str, Any]:
    """Return a plan for a budget as plain JSON values."""
    document: dict[str, Any] = {
        "budget": [limit.text for limit in result.budget.limits],
        "method": result.method,
        "labelled": result.labelled,
        **plan_document(result.plan),
        "dense_costs": dict(result.dense_costs),
        "contenders": [
            {
                "name": contender.name,
                "uniform": contender.uniform,
                "costs": dict(contender.costs),
                "predicted_loss": contender.loss,
                **_measured(contender.measured),
            }
            for contender in result.contenders
        ],
    }
    if frontier is not None:
        document["frontier"] = {
            "quantity": frontier.quantity,
            "points": [
                {
                    "name": point.name,
                    "uniform": point.uniform,
                    "asked": point.asked,
                    "share": point.share,
                    "cost": point.cost,
                    "predicted_loss": point.loss,
                    **_measured(point.measured),
                }
                for point in frontier.points
            ],
        }
    cleaned: dict[str, Any] = clean(document)
    return cleaned


def _measured(measured: Any) -> dict[str, float | None]:
    if measured is None:
        return {"measured_divergence": None, "measured_drop": None}
    return {"measured_divergence": measured.divergence, "measured_drop": measured.drop}


def check_plot(path: Path) -> None:
    """Refuse what ``plot_frontier`` could not draw, before anything is measured for it.

    Raises:
        SpecError: matplotlib does not know the ending of the file.
    """
    from matplotlib.backend_bases import FigureCanvasBase

    known = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix.removeprefix(".") not in known:
        raise SpecError(
            f"cannot draw {path}: its ending is {path.suffix!r}, expected one of {', '.join(known)}"
        )


def plot_frontier(frontier: Frontier, path: Path) -> None:
    """Draw the frontier into a file, which is written aside and renamed.

    Raises:
        GroupifyError: the file cannot be written, or its name has an ending that matplotlib does not know.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    _draw(frontier, figure.subplots())
    drawn = io.BytesIO()
    try:
        figure.savefig(drawn, format=path.suffix.removeprefix("."))
        write_aside(path, drawn.getvalue())
    except (OSError, ValueError) as error:
        raise GroupifyError(f"cannot draw {path}: {error}; choose another file, for example x.png") from error


def _draw(frontier: Frontier, axes: Axes) -> None:
    """Divergence against cost, planned and uniform groups, with the asked budget."""
    from matplotlib.ticker import LogFormatter

    measured = all(point.measured is not None for point in frontier.points)
    kinds = {False: ("planned", "o-", "#0072b2"), True: ("uniform", "s", "#d55e00")}
    for uniform, (label, style, colour) in kinds.items():
        points = [point for point in frontier.points if point.uniform == uniform]
        if points:
            values = [_height(point, measured) for point in points]
            axes.plot([100 * point.share for point in points], values, style, color=colour, label=label)
    for point in frontier.points:
        if point.asked:
            place: Any = (100 * point.share, _height(point, measured))
            axes.plot(*place, "*", color="black", markersize=14, label="asked budget", zorder=3)
    axes.set_xlabel(f"{'MACs' if frontier.quantity == MACS else 'latency'}, % of the dense model")
    axes.set_ylabel("measured divergence from the dense model" if measured else "predicted loss")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(LogFormatter())  # 20, not 2×10¹, and between the powers of ten as well
    axes.xaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    axes.set_yscale("log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()


def _height(point: FrontierPoint, measured: bool) -> float:
    value = point.measured.divergence if measured and point.measured is not None else point.loss
    return max(value, 1e-9)
