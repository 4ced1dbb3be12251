"""The plan that loses the least within limits, where that on the latency is held by measured latencies.

The sum over single convs is not the latency of a whole model: a small one keeps its weights in the caches.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from groupify.errors import PlanError
from groupify.planning.budget import LATENCY, Budget
from groupify.planning.costing import Chosen, Costing, Costs, shown
from groupify.structures import Plan

_TIMINGS = 6
_CLOSEST = 1.002  # limits that are nearer than this give the same plans
_WIDER = 1.02
_SLACK = 0.03  # a plan that is faster than asked by more than this could lose less
_WARM = 0.85  # of the predicted latency: a plan that is faster than this has its weights in the caches
_WARMER = 1.2  # how much more than other plans one may be faster than predicted
_NOISE = 0.01  # what a measured latency may be over its limit

Limits = Mapping[str, float]  # the most of each quantity


@dataclass(frozen=True)
class Finder:
    """Finds plans within limits.

    Attributes:
        budget: what was asked for, for messages.
        costing: predicted losses and costs.
        timer: measures the latency of a whole plan, milliseconds; None = the predicted one counts.
        warm: returns the costing for a model whose weights stay in the caches; None = there is none.
    """

    budget: Budget
    costing: Costing
    timer: Callable[[Plan], float] | None = None
    warm: Callable[[], Costing] | None = None

    def best(self, limits: Limits, power: float) -> Chosen:
        """Return the plan whose losses, to a power, add up to the least within limits.

        Raises:
            PlanError: there is none; says by how much.
        """
        costing = self.costing
        if self.timer is None or LATENCY not in limits:
            chosen = costing.best(limits, power=power)
            if chosen is None:
                raise costing.refuse(self.budget.costs)
            return chosen
        tried = self._timed(costing, limits, power)
        if self.warm is not None and any(
            time < _WARM * costing.costs(chosen)[LATENCY] for chosen, time in tried.items()
        ):
            tried |= self._timed(self._warm_costing, limits, power)
        if not tried:
            raise costing.refuse(self.budget.costs)
        holding = [chosen for chosen in tried if self.holds(chosen, limits)]
        if not holding:
            raise PlanError(
                f"{self.budget} cannot be held: the fastest plan that was tried has a measured "
                f"{shown(LATENCY, min(tried.values()), costing.dense_costs[LATENCY])}; allow more of it"
            )
        return min(holding, key=lambda chosen: costing.loss(chosen, power=power))

    def holds(self, chosen: Chosen, limits: Limits) -> bool:
        """Whether the measured latency, where there is one, is within its limit."""
        if self.timer is None or LATENCY not in limits:
            return True
        return self._milliseconds(chosen) <= limits[LATENCY] * (1 + _NOISE)

    def loosened(self, limits: Limits) -> Limits:
        """Return the limits, with that on a latency wide enough for all that measurement may find to hold."""
        if self.timer is None or LATENCY not in limits:
            return limits
        ratios = [time / self.costing.costs(chosen)[LATENCY] for chosen, time in self._times.items()]
        return {**limits, LATENCY: _WARMER * limits[LATENCY] / min([1.0, *ratios])}

    def costs(self, chosen: Chosen) -> Costs:
        """Return what a plan costs; its latency is measured where there is a timer."""
        costs = self.costing.costs(chosen)
        return costs if self.timer is None else {**costs, LATENCY: self._milliseconds(chosen)}

    def _timed(self, costing: Costing, limits: Limits, power: float) -> dict[Chosen, float]:
        """Plans whose measured latencies approach the limit, with these.

        The limit on the predicted latency is corrected by how far the prediction was off.
        """
        asked, least = limits[LATENCY], costing.least(LATENCY) * (1 + 1e-9)
        predicted = max(asked, least)
        low, high = 0.0, math.inf  # limits on what is predicted: of a plan that holds, of one that does not
        tried: dict[Chosen, float] = {}
        while high > low * _CLOSEST:
            chosen = costing.best({**limits, LATENCY: predicted}, power=power)
            if chosen is None or (chosen not in tried and len(tried) == _TIMINGS):
                break
            time = tried[chosen] = self._milliseconds(chosen)
            held = self.holds(chosen, limits)
            if (held and time >= asked * (1 - _SLACK)) or (not held and predicted == least):
                break
            low, high = (max(low, predicted), high) if held else (low, min(high, predicted))
            predicted = max(least, costing.costs(chosen)[LATENCY] * asked / time)
            if not low < predicted < high:  # plans come in steps, and their times scatter
                predicted = max(least, math.sqrt(low * high) if high < math.inf else _WIDER * low)
            if predicted > costing.dense_costs[LATENCY]:
                break
        return tried

    @functools.cached_property
    def _times(self) -> dict[Chosen, float]:
        """The latencies that were measured so far."""
        return {}

    def _milliseconds(self, chosen: Chosen) -> float:
        assert self.timer is not None
        if chosen not in self._times:
            self._times[chosen] = self.timer(self.costing.choices.plan(chosen))
        return self._times[chosen]

    @functools.cached_property
    def _warm_costing(self) -> Costing:
        assert self.warm is not None
        return self.warm()
