"""The trade between cost and loss: planned against uniform groups, from dense to the smallest plan."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from groupify.planning.budget import LATENCY, MACS
from groupify.planning.costing import Chosen
from groupify.planning.race import BudgetPlan
from groupify.scores import Judgement
from groupify.structures import Plan

_POINTS = 10

Measure = Callable[[Plan], Judgement]


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
        rows.setdefault(chosen, (str(key), True, False))
    winner = result.winner
    rows[winner.chosen] = (winner.name, winner.uniform, True)
    found = [
        FrontierPoint(
            name, uniform, asked,
            share=costing.costs(chosen)[quantity] / dense,
            cost=costing.costs(chosen)[quantity],
            loss=costing.loss(chosen),
            measured=None if measure is None else measure(costing.choices.plan(chosen)),
        )
        for chosen, (name, uniform, asked) in rows.items()
    ]  # fmt: skip
    return Frontier(quantity, tuple(sorted(found, key=lambda point: -point.cost)))
