"""What a plan costs as a whole, and which plan loses the least within limits.

The sum over single convs is not quite the latency of a whole model. A limit on the latency is therefore held
by measured ones, where there is a timer.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from groupify.errors import PlanError
from groupify.measure.latency_table import Latencies
from groupify.planning.allocation import Option, allocate, least, nearest
from groupify.planning.budget import BYTES, LATENCY, MACS, PARAMS, Budget, Limit
from groupify.planning.sensitivity import Sensitivity
from groupify.scores import ModelCost
from groupify.structures import FLOAT32, INT8, Choices, Plan, Uniform

_VALUE_SHARE = {FLOAT32: 1.0, INT8: 0.25}  # bytes of a value ÷ those that it has in float32
_TIMINGS = 6
_CONFIRMATIONS = 3  # how many plans may turn out too slow when they are timed again
_CLOSEST = 1.002  # limits that are nearer than this give the same plans
_WIDER = 1.02
_SLACK = 0.03  # a plan that is faster than asked by more than this could lose less
_FASTER = 1.2  # how much more than other plans one may be faster than predicted
_NOISE = 0.01  # what a measured latency may be over its limit

Chosen = tuple[int, ...]
Costs = Mapping[str, float]  # quantity → MACs, parameters, bytes, milliseconds
Limits = Mapping[str, float]  # the most of each quantity


@dataclass(frozen=True)
class Costing:
    """The choices of a model with all that is known of them.

    Attributes:
        choices: what may become of each conv.
        sensitivity: what each candidate loses.
        dense: cost of the whole dense model.
        latencies: None where no latency is asked for.
    """

    choices: Choices
    sensitivity: Sensitivity
    dense: ModelCost
    latencies: Latencies | None = None

    @property
    def dense_costs(self) -> Costs:
        """What the dense model costs."""
        return self.costs((0,) * len(self.choices.sites))

    def costs(self, chosen: Sequence[int]) -> Costs:
        """Return what the whole model costs with a plan."""
        totals = dict(self._rest)
        for number, index in enumerate(chosen):
            for quantity, amount in self._uses(number, index).items():
                totals[quantity] += amount
        return totals

    def amounts(self, limits: Sequence[Limit]) -> Limits:
        """Return the most of each quantity that limits allow."""
        dense, latencies = self.dense_costs, self.latencies
        return {
            limit.quantity: limit.at_most(
                latencies.dense_float32_ms
                if limit.of_float32 and latencies is not None
                else dense[limit.quantity]
            )
            for limit in limits
        }

    def loss(self, chosen: Sequence[int], *, power: float = 1.0) -> float:
        """Return the predicted loss of a plan, the sum of its convs' losses to a power."""
        pairs = zip(self.choices.sites, chosen, strict=True)
        losses = [self.sensitivity.loss(options[index]) for options, index in pairs]
        return math.fsum(loss**power for loss in losses)

    def best(self, limits: Mapping[str, float], *, power: float = 1.0) -> Chosen | None:
        """Return the plan that loses the least within limits on the whole model; None where there is none.

        Args:
            limits: the most of each quantity.
            power: of the losses. Below 1, one large loss counts less than many small ones, since the layers
                behind it make good for a part of it.
        """
        found = allocate(self._options(power), limits)
        return None if found is None else found.chosen[1:]

    def uniform_within(self, limits: Mapping[str, float]) -> list[tuple[Uniform, Chosen]]:
        """Return the plans with one number of groups within limits, that which loses the least first."""
        held = [
            (key, chosen)
            for key, chosen in self.choices.uniform.items()
            if all(self.costs(chosen)[quantity] <= limit for quantity, limit in limits.items())
        ]
        return sorted(held, key=lambda item: self.loss(item[1]))

    def least(self, quantity: str) -> float:
        """Return the least that the whole model can cost."""
        return least(self._options(1.0), quantity)

    def refuse(self, limits: Sequence[Limit]) -> PlanError:
        """Say which limits cannot be held, and how close one comes."""
        dense, amounts = self.dense_costs, self.amounts(limits)
        alone = [
            (limit, self.least(limit.quantity))
            for limit in limits
            if self.least(limit.quantity) > amounts[limit.quantity]
        ]
        if alone:
            parts = [
                f"{limit} cannot be held: the least that these choices reach is "
                f"{shown(limit.quantity, reached, dense[limit.quantity])}"
                for limit, reached in alone
            ]
            return PlanError("; ".join(parts) + "; allow more groups, smaller group widths or more sites")
        reached_together = nearest(self._options(1.0), amounts).uses
        parts = [shown(name, amount, dense[name]) for name, amount in reached_together.items()]
        return PlanError(
            f"{' and '.join(map(str, limits))} cannot be held together: the nearest plan has "
            f"{', '.join(parts)}; allow more of one of them"
        )

    @property
    def _rest(self) -> dict[str, float]:
        """What no plan changes."""
        convs = [options[0].site for options in self.choices.sites]
        weights = sum(options[0].weight_bytes for options in self.choices.sites)
        rest = {
            MACS: float(self.dense.macs - sum(site.macs.dense for site in convs)),
            PARAMS: float(self.dense.params - sum(site.params.dense for site in convs)),
            BYTES: _VALUE_SHARE[self.choices.precision] * self.dense.weight_bytes - weights,
        }
        return rest if self.latencies is None else {**rest, LATENCY: self.latencies.rest_ms}

    def _uses(self, number: int, index: int) -> dict[str, float]:
        candidate = self.choices.sites[number][index]
        uses = {
            MACS: float(candidate.site.macs.grouped),
            PARAMS: float(candidate.site.params.grouped),
            BYTES: float(candidate.weight_bytes),
        }
        if self.latencies is not None:
            uses[LATENCY] = self.latencies.convs_ms[number][index]
        return uses

    def _options(self, power: float) -> list[list[Option]]:
        """The knapsack's options; what no plan changes stands first, as a conv without a choice."""
        convs = [[Option(0.0, self._rest)]]
        for number, options in enumerate(self.choices.sites):
            convs.append(
                [
                    Option(self.sensitivity.loss(candidate) ** power, self._uses(number, index))
                    for index, candidate in enumerate(options)
                ]
            )
        return convs


def shown(quantity: str, amount: float, dense: float) -> str:
    """Return an amount for a reader, with its share of the dense model's."""
    share = f" ({100 * amount / dense:.1f}%)" if dense else ""
    if quantity == LATENCY:
        return f"latency {amount:.3g} ms{share}"
    unit = "B" if quantity == BYTES else ""
    for scale, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if amount >= scale:
            return f"{quantity} {amount / scale:.4g} {prefix}{unit}{share}".replace(" G ", "G ")
    return f"{quantity} {amount:.4g} {unit}{share}"


@dataclass(frozen=True)
class Finder:
    """Finds plans within limits.

    Attributes:
        budget: what was asked for, for messages.
        costing: predicted losses and costs.
        timer: measures the latency of a whole plan, milliseconds; None = the predicted one counts.
        again: measures a latency a second time; None = the first one counts.
    """

    budget: Budget
    costing: Costing
    timer: Callable[[Plan], float] | None = None
    again: Callable[[Plan], float] | None = None

    def best(self, limits: Limits, power: float) -> Chosen:
        """Return the plan whose losses, to a power, add up to the least within limits.

        Raises:
            PlanError: there is none; says by how much.
        """
        if self.timer is None or LATENCY not in limits:
            chosen = self.costing.best(limits, power=power)
            if chosen is None:
                raise self.costing.refuse(self.budget.costs)
            return chosen
        for _ in range(_CONFIRMATIONS):
            chosen = self._holding(limits, power)
            if self._is_confirmed(chosen, limits):
                return chosen
        return self._holding(limits, power)

    def _is_confirmed(self, chosen: Chosen, limits: Limits) -> bool:
        """Whether the mean of two measured latencies is within its limit, which counts from now on.

        Of many measured plans a search takes one whose measurement was lucky.
        """
        if self.again is None or chosen in self._confirmed:
            return True
        self._confirmed.add(chosen)
        time = self.again(self.costing.choices.plan(chosen))
        self._times[chosen] = (self._milliseconds(chosen) + time) / 2
        return self.holds(chosen, limits)

    def _holding(self, limits: Limits, power: float) -> Chosen:
        """Return the plan that loses the least of those whose measured latencies are within the limit."""
        costing = self.costing
        tried = self._timed(limits, power)
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
        return {**limits, LATENCY: _FASTER * limits[LATENCY] / min([1.0, *ratios])}

    def costs(self, chosen: Chosen) -> Costs:
        """Return what a plan costs; its latency is measured where there is a timer."""
        costs = self.costing.costs(chosen)
        return costs if self.timer is None else {**costs, LATENCY: self._milliseconds(chosen)}

    def _timed(self, limits: Limits, power: float) -> dict[Chosen, float]:
        """Plans whose measured latencies approach the limit, with these.

        The limit on the predicted latency is corrected by how far the prediction was off.
        """
        costing = self.costing
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

    @functools.cached_property
    def _confirmed(self) -> set[Chosen]:
        """The plans that were measured twice."""
        return set()

    def _milliseconds(self, chosen: Chosen) -> float:
        assert self.timer is not None
        if chosen not in self._times:
            self._times[chosen] = self.timer(self.costing.choices.plan(chosen))
        return self._times[chosen]
