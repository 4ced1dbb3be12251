"""Plans for a budget and frontiers as text and as JSON documents."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from groupify.planning.budget import LATENCY, MACS
from groupify.planning.costing import shown
from groupify.planning.frontier import Frontier
from groupify.planning.search import BudgetPlan, Contender
from groupify.reporting.document import change_document, clean, site_document
from groupify.reporting.text import print_plan


def race_lines(result: BudgetPlan) -> tuple[str, ...]:
    """Return what was asked for, what won, and against what."""
    winner = result.winner
    costs = ", ".join(shown(name, amount, result.dense_costs[name]) for name, amount in winner.costs.items())
    lines = [f"planned for {result.budget}: {costs}; losses predicted by: {result.method}"]
    others = [contender for contender in result.contenders[1:] if contender.uniform != winner.uniform]
    lines.append("; against ".join(map(_of_contender, (winner, *others[:1]))))
    if winner.uniform:
        lines.append("no plan beat uniform groups, so the uniform plan is taken")
    return tuple(lines)


def _of_contender(contender: Contender) -> str:
    measured = contender.measured
    if measured is None:
        return f"{contender.name}: predicted divergence {contender.loss:.4g}, not measured"
    return (
        f"{contender.name}: measured divergence {measured.divergence:.4g}, drop {measured.drop:.2f} points "
        f"on held-out images (predicted divergence {contender.loss:.4g})"
    )


def print_budget_plan(result: BudgetPlan, console: Console) -> None:
    """Print the plan, then what was asked for and what it won against."""
    print_plan(result.plan, console)
    for line in race_lines(result):
        console.print(Text(line), soft_wrap=True)


def print_frontier(frontier: Frontier, console: Console) -> None:
    """Print one row for each plan, the asked budget marked."""
    table = Table(box=None, pad_edge=False)
    for title in (
        "plan",
        "MACs" if frontier.quantity == MACS else "latency",
        "predicted",
        "measured",
        "drop",
    ):
        table.add_column(title, justify="left" if title == "plan" else "right", no_wrap=True)
    table.add_column("")
    for point in frontier.points:
        measured = point.measured
        amount = f"{point.cost:.3g} ms" if frontier.quantity == LATENCY else f"{point.cost / 1e6:.4g} M"
        table.add_row(
            point.name,
            f"{amount} ({100 * point.share:.1f}%)",
            f"{point.loss:.3g}",
            "" if measured is None else f"{measured.divergence:.3g}",
            "" if measured is None else f"{measured.drop:.2f}",
            "← asked budget" if point.asked else "",
        )
    console.print(table)


def budget_document(result: BudgetPlan, frontier: Frontier | None = None) -> dict[str, Any]:
    """Return a plan for a budget as plain JSON values."""
    document: dict[str, Any] = {
        "budget": [str(limit) for limit in result.budget.limits],
        "method": result.method,
        "labelled": result.labelled,
        "input_shape": list(result.plan.input_shape),
        "sites": [site_document(site) for site in result.plan.sites],
        "params": change_document(result.plan.params),
        "macs": change_document(result.plan.macs),
        "dense_costs": dict(result.dense_costs),
        "contenders": [
            {
                "name": contender.name,
                "uniform": contender.uniform,
                "costs": dict(contender.costs),
                "predicted_divergence": contender.loss,
                **_measured(contender.measured),
            }
            for contender in result.contenders
        ],
        "notes": list(result.plan.notes),
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
                    "predicted_divergence": point.loss,
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
