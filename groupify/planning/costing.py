"""What a plan costs as a whole, and which plan loses the least within limits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from groupify.errors import PlanError
from groupify.measure.latency_table import Latencies
from groupify.planning.allocation import Option, allocate, least, nearest
from groupify.planning.budget import BYTES, COSTS, LATENCY, MACS, PARAMS, Limit
from groupify.planning.sensitivity import Sensitivity
from groupify.scores import ModelCost
from groupify.structures import Candidate, Choices, Uniform

Chosen = tuple[int, ...]
Costs = Mapping[str, float]  # quantity → MACs, parameters, bytes, milliseconds


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
    def quantities(self) -> tuple[str, ...]:
        """The quantities that are known."""
        return COSTS if self.latencies is not None else tuple(q for q in COSTS if q != LATENCY)

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

    def loss(self, chosen: Sequence[int], *, power: float = 1.0) -> float:
        """Return the predicted divergence of a plan, the sum of its convs' losses to a power."""
        pairs = zip(self.choices.sites, chosen, strict=True)
        losses = [self._loss(options[index]) for options, index in pairs]
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
        dense = self.dense_costs
        alone = [
            (limit, self.least(limit.quantity))
            for limit in limits
            if self.least(limit.quantity) > limit.at_most(dense[limit.quantity])
        ]
        if alone:
            parts = [
                f"{limit} cannot be held: the least that these choices reach is "
                f"{shown(limit.quantity, reached, dense[limit.quantity])}"
                for limit, reached in alone
            ]
            return PlanError("; ".join(parts) + "; allow more groups, smaller group widths or more sites")
        amounts = {limit.quantity: limit.at_most(dense[limit.quantity]) for limit in limits}
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
            BYTES: float(self.dense.weight_bytes - weights),
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
                    Option(self._loss(candidate) ** power, self._uses(number, index))
                    for index, candidate in enumerate(options)
                ]
            )
        return convs

    def _loss(self, candidate: Candidate) -> float:
        return self.sensitivity.loss(candidate)


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
