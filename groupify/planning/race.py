"""Plans for one budget compete: predicted ones and the best uniform one, converted and measured.

The frontier shows the same competition for several budgets, from dense to the smallest plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from tqdm import tqdm

from groupify.errors import PlanError
from groupify.paired import CONFIDENCE
from groupify.planning.budget import LATENCY, MACS, Budget
from groupify.planning.costing import Chosen, Costing, Finder, Limits
from groupify.scores import Judgement
from groupify.structures import Plan

# A plan that is predicted to lose so many times what another loses is not converted: of 119 such pairs among
# the random plans of scripts/benchmarks/ranking.py, on two nets, the other one diverged less in all.
_FAR_BEHIND = 2.0
BISECTIONS = 6
_CLOSE = 0.01  # relative to the cost: a nearer bisection would only resolve noise
_POINTS = 10  # of a frontier

Measure = Callable[[Plan], Judgement]
# The chance that a plan which is said to hold a limit on the drop does not: all that are tried share it.
_RISK = 1 - CONFIDENCE


class PlanJudge(Protocol):
    """Measures plans on held-out images; its text says on how many, and whether they have labels."""

    @property
    def labelled(self) -> bool:
        """Whether the drop is one of accuracy, and not of agreement."""

    def images_for(self, drop: float, confidence: float, /) -> int | None:
        """Return how many images it takes to tell a drop; None where there are enough."""

    def __call__(self, plan: Plan, /) -> Judgement:
        """Return how far a plan is from the dense model."""


@dataclass(frozen=True)
class Contender:
    """One plan in the race.

    Attributes:
        name: ``"planned"``, or which uniform plan it is.
        uniform: whether it has the same number of groups everywhere.
        chosen: index of each conv's candidate.
        loss: predicted; see :class:`groupify.planning.sensitivity.Sensitivity`.
        costs: MACs, parameters, bytes and, where asked for, milliseconds of the whole model: measured ones,
            unless they come from a table of another device.
        measured: by converting it; None where that was not done, as none other came near.
        at_most: percentage points of accuracy that it loses at most on other images, with 95% confidence for
            all plans that were measured together; infinite where none were measured.
    """

    name: str
    uniform: bool
    chosen: Chosen
    loss: float
    costs: Mapping[str, float]
    measured: Judgement | None = None
    at_most: float = math.inf

    @property
    def drop(self) -> float:
        """The measured drop in percentage points; infinite where it was not measured."""
        found = None if self.measured is None else self.measured.drop
        return math.inf if found is None else found


@dataclass(frozen=True)
class BudgetPlan:
    """The plan for a budget, and what it won against.

    Attributes:
        plan: the winner's.
        budget: what was asked for.
        contenders: the winner first, then the others from best to worst.
        dense_costs: MACs, parameters, bytes and milliseconds of the dense model.
        costing: choices, sensitivities and costs that it was made from.
        method: one line on how the losses were predicted.
        labelled: whether the measured drop is one of accuracy, and not of agreement.
        task: one line on what the model was taken for.
    """

    plan: Plan
    budget: Budget
    contenders: tuple[Contender, ...]
    dense_costs: Mapping[str, float]
    costing: Costing
    method: str
    labelled: bool
    task: str = ""

    @property
    def winner(self) -> Contender:
        """The contender whose plan it is."""
        return self.contenders[0]


@dataclass(frozen=True)
class Race:
    """Finds the best plan for a budget.

    Attributes:
        finder: finds plans within limits, for the budget.
        judge: measures plans; None = predicted losses decide.
        bisections: races for a limit on the drop.
        progress: show bars on stderr.
    """

    finder: Finder
    judge: PlanJudge | None = None
    bisections: int = BISECTIONS
    progress: bool = False

    def run(self) -> BudgetPlan:
        """Return the winner, and what it won against.

        Raises:
            PlanError: the budget cannot be held; says by how much.
        """
        costs, drop = self._budget.costs, self._budget.drop
        if drop is not None and self.judge is not None:
            self._check_images(drop, self.judge)
        if costs:
            contenders = self._within_costs()
        else:
            assert drop is not None
            contenders = self._within_drop(drop)
        return BudgetPlan(
            plan=self._costing.choices.plan(contenders[0].chosen),
            budget=self._budget,
            contenders=tuple(contenders),
            dense_costs=self._costing.dense_costs,
            costing=self._costing,
            method=self._costing.sensitivity.method,
            labelled=self.judge is not None and self.judge.labelled,
        )

    def _check_images(self, drop: float, judge: PlanJudge) -> None:
        """Refuse to judge on images that cannot tell the drop of any plan."""
        needed = judge.images_for(drop, self._confidence(1))
        if needed is not None:
            raise PlanError(
                f"drop={drop:g} cannot be told on {judge}: a plan that changes the class of none of them may "
                f"still lose more on others, until there are {needed}; give more images (of a tensor a "
                "quarter is held out), or allow a larger drop"
            )

    @property
    def _costing(self) -> Costing:
        return self.finder.costing

    @property
    def _budget(self) -> Budget:
        return self.finder.budget

    def _within_costs(self) -> list[Contender]:
        """All contenders within the costs, the best first, which holds the drop if one is asked."""
        costs, drop = self._budget.costs, self._budget.drop
        contenders = self._race(self._costing.amounts(costs))
        best = contenders[0].measured
        if drop is not None and best is not None and contenders[0].at_most > drop:
            remedy = "allow more of one of them" + self._or_more_images(contenders[0], drop)
            raise PlanError(
                f"{self._budget} cannot be held together: within {' and '.join(map(str, costs))} the "
                f"drop came to {self._lost(contenders[0])}; {remedy}"
            )
        return contenders

    def _within_drop(self, drop: float) -> list[Contender]:
        """The cheapest plan whose drop is within the limit as the images tell it, and what else was tried."""
        quantity = LATENCY if self._costing.latencies is not None else MACS
        dense, least = self._costing.dense_costs[quantity], self._costing.least(quantity)
        low, high = math.log(least), math.log(dense)  # of what holds nothing; of what holds
        seen: list[Contender] = []
        steps = range(self.bisections)
        for _ in tqdm(steps, desc="bisection", disable=None if self.progress else True, leave=False):
            if high - low < _CLOSE:
                break
            middle = (low + high) / 2
            raced = self._race({quantity: math.exp(middle)})
            seen += raced
            if raced[0].at_most <= drop:
                high = min(middle, math.log(raced[0].costs[quantity]))
            else:
                low = middle
        holding = [contender for contender in seen if contender.at_most <= drop]
        if not holding:
            best = min(seen, key=lambda contender: contender.at_most)
            raise PlanError(
                f"drop={drop:g} cannot be held: the mildest plan that was tried, with "
                f"{100 * best.costs[quantity] / dense:.0f}% of the {quantity}, lost {self._lost(best)}; "
                f"allow a larger drop{self._or_more_images(best, drop)}"
            )
        best = min(holding, key=lambda c: (c.costs[quantity], self._rank(c)))
        return [best, *sorted((c for c in seen if c is not best), key=lambda c: c.costs[quantity])]

    def to_convert(self) -> int:
        """Return how many plans a race converts, at most where a limit on the drop is searched for.

        Raises:
            PlanError: the budget cannot be held.
        """
        costs = self._budget.costs
        if not costs:
            return self.bisections * len(self._powers)
        return len(self._contest(self._contenders(self._costing.amounts(costs))))

    def _race(self, limits: Limits) -> list[Contender]:
        """All contenders within the limits, the best first."""
        return sorted(self._measured(self._contenders(limits)), key=self._rank)

    def _contenders(self, limits: Limits) -> list[Contender]:
        """The planned ones and the best uniform one within the limits, not measured."""
        dense = self._costing.dense_costs
        if all(dense[quantity] <= limit for quantity, limit in limits.items()):
            precision = self._costing.choices.precision
            raise PlanError(
                f"{self._budget} allows all that the dense model costs in {precision}; ask for less of it"
            )
        found: list[Contender] = []
        for power in self._powers:
            chosen = self.finder.best(limits, power)
            if all(chosen != other.chosen for other in found):
                name = "planned" if power == 1 else f"planned (losses to the power {power:g})"
                found.append(self._contender(name, chosen))
        for key, chosen in self._costing.uniform_within(self.finder.loosened(limits)):
            if self.finder.holds(chosen, limits):
                found.append(self._contender(str(key), chosen, uniform=True))
                break
        return found

    @property
    def _powers(self) -> tuple[float, ...]:
        """Losses to these powers make plans; where nothing tells the plans apart, the first."""
        powers = self._costing.sensitivity.powers
        return powers if self.judge is not None else powers[:1]

    def _contender(self, name: str, chosen: Chosen, *, uniform: bool = False) -> Contender:
        return Contender(name, uniform, chosen, self._costing.loss(chosen), self.finder.costs(chosen))

    def _measured(self, contenders: Sequence[Contender]) -> list[Contender]:
        """Convert and measure those that may win."""
        judge, contest = self.judge, self._contest(contenders)
        if judge is None or not contest:
            return list(contenders)
        confidence = self._confidence(len(contest))
        found = []
        for one in contenders:
            if one in contest:
                measured = judge(self._costing.choices.plan(one.chosen))
                one = replace(one, measured=measured, at_most=measured.loses_at_most(confidence))
            found.append(one)
        return found

    def _contest(self, contenders: Sequence[Contender]) -> list[Contender]:
        """Those that may win and are converted; a single one only if a limit on the drop asks for it."""
        if self.judge is None:
            return []
        near = _FAR_BEHIND * min(contender.loss for contender in contenders)
        contest = [contender for contender in contenders if contender.loss <= near]
        return [] if len(contest) == 1 and self._budget.drop is None else contest

    def _confidence(self, contenders: int) -> float:
        """That of one plan's bound, so that those of all that are measured hold together (Bonferroni)."""
        return 1 - _RISK / (contenders * (1 if self._budget.costs else self.bisections))

    def _lost(self, contender: Contender) -> str:
        bound = f", at most {contender.at_most:.2f} with {100 * CONFIDENCE:.0f}% confidence"
        counted = contender.measured is not None and contender.measured.changed is not None
        unit = "points" if contender.measured is None else contender.measured.unit
        return f"{contender.drop:.2f} {unit} on {self.judge}{bound if counted else ''}"

    @staticmethod
    def _or_more_images(contender: Contender, drop: float) -> str:
        return ", or give more images, which are too few to tell" if contender.drop <= drop else ""

    def _rank(self, contender: Contender) -> tuple[float, float, float, bool]:
        """What may exceed the drop, divergence, predicted loss; where all are equal, uniform first."""
        measured, drop = contender.measured, self._budget.drop
        excess = 0.0 if drop is None else max(0.0, contender.at_most - drop)
        divergence = math.inf if measured is None else measured.divergence
        return excess, divergence, contender.loss, not contender.uniform


@dataclass(frozen=True)
class FrontierPoint:
    """One plan.

    Attributes:
        name: ``"planned"``, or which uniform plan it is.
        uniform: whether it has the same number of groups everywhere.
        asked: whether it is the plan for the asked budget.
        share: its cost ÷ that of the dense model.
        cost: MACs, or milliseconds for one image.
        loss: predicted.
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
