"""The trade between cost and loss: planned against uniform groups, from dense to the smallest plan."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from groupify.errors import GroupifyError, SpecError
from groupify.planning.budget import LATENCY, MACS
from groupify.planning.costing import Chosen
from groupify.planning.judge import Judgement
from groupify.planning.search import BudgetPlan, uniform_name

_POINTS = 10

Measure = Callable[[Chosen], Judgement]


@dataclass(frozen=True)
class FrontierPoint:
    """One plan.

    Attributes:
        name: ``"planned"``, or which uniform plan it is.
        uniform: whether it has the same number of groups everywhere.
        asked: whether it is the plan for the asked budget.
        share: its cost ÷ that of the dense model.
        cost: MACs, or milliseconds for one image.
        loss: predicted divergence.
        measured: by converting it; None where that was not done.
    """

    name: str
    uniform: bool
    asked: bool
    share: float
    cost: float
    loss: float
    measured: Judgement | None = None


@dataclass(frozen=True)
class Frontier:
    """All points, from the dearest to the cheapest.

    Attributes:
        quantity: what the cost is: ``"latency"`` where it is known, else ``"macs"``.
        points: planned and uniform ones.
    """

    quantity: str
    points: tuple[FrontierPoint, ...]


def trace_frontier(result: BudgetPlan, *, points: int = _POINTS, measure: Measure | None = None) -> Frontier:
    """Plan for several budgets between the dense and the smallest model, beside all uniform plans.

    Args:
        result: a plan for a budget, which is marked among them.
        points: number of budgets, evenly spread over the logarithm of the cost.
        measure: what converts and measures a plan; None = predicted losses alone.
    """
    costing = result.costing
    quantity = MACS if costing.latencies is None else LATENCY
    dense = costing.dense_costs[quantity]
    lowest = math.log(costing.least(quantity) * (1 + 1e-9))
    rows: dict[Chosen, tuple[str, bool, bool]] = {}
    for step in range(1, points + 1):
        limit = math.exp(math.log(dense) + (lowest - math.log(dense)) * step / points)
        chosen = costing.best({quantity: limit})
        if chosen is not None:
            rows.setdefault(chosen, ("planned", False, False))
    for key, chosen in costing.choices.uniform.items():
        rows.setdefault(chosen, (uniform_name(key), True, False))
    winner = result.winner
    rows[winner.chosen] = (winner.name, winner.uniform, True)
    found = [
        FrontierPoint(
            name, uniform, asked,
            share=costing.costs(chosen)[quantity] / dense,
            cost=costing.costs(chosen)[quantity],
            loss=costing.loss(chosen),
            measured=None if measure is None else measure(chosen),
        )
        for chosen, (name, uniform, asked) in rows.items()
    ]  # fmt: skip
    return Frontier(quantity, tuple(sorted(found, key=lambda point: -point.cost)))


def check_plot(path: Path) -> None:
    """Refuse what ``plot_frontier`` could not draw, before anything is measured for it.

    Raises:
        SpecError: matplotlib is not installed, or does not know the ending of the file.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise SpecError("a plot needs matplotlib: pip install matplotlib") from error
    known = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix.removeprefix(".") not in known:
        raise SpecError(
            f"cannot draw {path}: its ending is {path.suffix!r}, expected one of {', '.join(known)}"
        )


def plot_frontier(frontier: Frontier, path: Path) -> bool:
    """Draw the frontier into a file; return False where matplotlib is not installed.

    Raises:
        GroupifyError: the file cannot be written, or its name has an ending that matplotlib does not know.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogFormatter
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
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
    axes.set_ylabel(f"{'measured' if measured else 'predicted'} divergence, nats")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(LogFormatter())  # 20, not 2×10¹, and between the powers of ten as well
    axes.xaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    axes.set_yscale("log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise GroupifyError(f"cannot draw {path}: {error}; choose another file, for example x.png") from error
    return True


def _height(point: FrontierPoint, measured: bool) -> float:
    value = point.measured.divergence if measured and point.measured is not None else point.loss
    return max(value, 1e-9)
